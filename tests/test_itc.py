"""Image-text contrast: its loss and gradient by hand, what it may not count, and ranking by it."""
import pytest
import torch

from data import ranking
from m3ae_mini import M3AE
from m3ae_mini.config import UserError
from m3ae_mini.objectives import ITC


def by_hand(text, image, text_proj, image_proj, scale, same):
    """The loss in float64, row by row, in plain Python; same[i][j]: is j no negative of i?"""
    def unit(vector, matrix):
        projected = matrix @ vector
        return projected / projected.square().sum().sqrt()

    texts = [unit(row, text_proj) for row in text]
    images = [unit(row, image_proj) for row in image]
    losses = []
    for queries, candidates in ((texts, images), (images, texts)):
        for i, query in enumerate(queries):
            scores = [scale * (query * candidate).sum() for candidate in candidates]
            kept = [score for j, score in enumerate(scores) if j == i or not same[i][j]]
            losses.append(torch.stack(kept).logsumexp(0) - scores[i])
    return torch.stack(losses).mean()


def test_loss_and_gradient_by_hand(small_config, random_batch):
    cfg = small_config(mlm=0.0, mim=0.0, itm=0.0, itc=1.0)
    torch.manual_seed(0)
    objective = ITC(cfg).double()
    text = torch.randn(5, 12, 64, dtype=torch.double, requires_grad=True)              # (B, T, D)
    image = torch.randn(5, 17, 64, dtype=torch.double, requires_grad=True)             # (B, 1+L, D)
    ids = {"image_id": torch.tensor([0, 1, 0, 3, 4]), "text_id": torch.tensor([0, 1, 2, 1, 4])}
    same = [[i != j and bool(ids["image_id"][i] == ids["image_id"][j]
                             or ids["text_id"][i] == ids["text_id"][j]) for j in range(5)]
            for i in range(5)]
    assert sum(map(sum, same)) == 4

    inputs = [text, image, *objective.parameters()]
    loss = objective(None, ids, text, image)["itc_loss"]
    scale = objective.log_scale.exp()
    wanted = by_hand(text[:, 0], image[:, 0], objective.text_proj.weight,
                     objective.image_proj.weight, scale, same)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6, check_dtype=False)
    for mine, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, inputs)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_all_rows_alike_leave_nothing_to_learn(small_config):
    """Where all rows share their image no row has a negative: the loss is 0, and finite."""
    objective = ITC(small_config(itc=1.0))
    torch.manual_seed(0)
    torch.nn.init.normal_(objective.text_proj.weight)
    torch.nn.init.normal_(objective.image_proj.weight)
    ids = {"image_id": torch.zeros(4, dtype=torch.long), "text_id": torch.arange(4)}
    loss = objective(None, ids, torch.randn(4, 3, 64), torch.randn(4, 5, 64))["itc_loss"]
    assert loss == 0


def test_it_is_built_only_where_it_has_a_weight(small_config, random_batch):
    for task, weight, built in (("pretrain", 0.0, False), ("pretrain", 0.5, True),
                                ("irtr", 1.0, True), ("irtr", 0.0, False), ("vqa", 1.0, False)):
        cfg = small_config(task=task, itc=weight)
        model = M3AE(cfg)
        assert ("itc" in model.objectives) == built
        out = model(random_batch(cfg))
        assert ("itc_loss" in out) == built
    whole = M3AE(small_config(itc=0.5))
    out = whole(random_batch(whole.cfg))
    parts = out["mlm_loss"] + out["mim_loss"] + out["itm_loss"] + 0.5 * out["itc_loss"]
    torch.testing.assert_close(out["loss"], parts)


def test_all_weights_0_is_an_error_that_names_the_flags(small_config):
    with pytest.raises(UserError, match="--mlm, --mim, --itm, --itc are all 0"):
        M3AE(small_config(mlm=0.0, mim=0.0, itm=0.0))
    M3AE(small_config(mlm=0.0, mim=0.0, itm=0.0, itc=0.1))


def test_scores_are_not_rounded_to_ties(small_config):
    """In bf16 too: bf16's 8 bits would make many scores equal, and a tie is no hit."""
    itc = ITC(small_config(itc=1.0))
    text, image = torch.nn.functional.normalize(torch.randn(2, 40, 64), dim=-1)        # (40, 64) each
    with torch.autocast("cpu", torch.bfloat16):
        found = itc.scores(text, image)
    assert torch.equal(found, itc.scores(text, image))


class OneProcess:
    rank, world_size, is_main, device = 0, 1, False, "cpu"

    def all_reduce(self, tensor):
        return tensor


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_reranking_orders_the_best_candidates_by_matching(small_config, random_batch, direction):
    cfg = small_config(task="irtr", itc=1.0)
    torch.manual_seed(0)
    model = M3AE(cfg).eval()
    batch = random_batch(cfg, rows=7)
    with torch.no_grad():
        texts = model.encode_text(batch["text_ids"], batch["text_mask"])               # (7, T, D)
        images = model.encode_image(batch["image"])                                    # (7, 1+L, D)
        itc = model.objectives["itc"]
        scores = itc.scores(itc.text_features(texts, batch), itc.image_features(images))      # (7, 7)
        ranked = ranking.rerank(model, scores, texts, batch["text_mask"], images, 3, direction,
                                  OneProcess())
        fc = model.objectives["irtr"].fc
        match = torch.stack([fc(model.pooled_pair(texts, image[None], batch["text_mask"]))[:, 0]
                             for image in images], dim=1)                              # (7, 7)
        whole = ranking.rerank(model, scores, texts, batch["text_mask"], images, 7, direction,
                                 OneProcess())
    if direction == "i2t":
        scores, ranked, match, whole = scores.T, ranked.T, match.T, whole.T
    assert torch.equal(whole.argsort(1), match.argsort(1))     # all candidates: as matching alone
    for query in range(7):
        best = scores[query].topk(3).indices.tolist()
        wanted = sorted(best, key=lambda j: -match[query, j])
        rest = [j for j in scores[query].argsort(descending=True).tolist() if j not in best]
        assert ranked[query].argsort(descending=True).tolist() == wanted + rest


def test_the_report_knows_chance(small_config, random_batch):
    """One of the micro-batch's images: of 4 and of 2 rows, weighted by rows."""
    from m3ae_mini.evaluate import itc_metrics, means
    cfg, tables = small_config(itc=1.0), []
    torch.manual_seed(0)
    model = M3AE(cfg).eval()
    for rows in 4, 2:
        batch = random_batch(cfg, rows=rows)
        text = model.encode_text(batch["text_ids"], batch["text_mask"])
        tables.append(itc_metrics(model, batch, text, model.encode_image(batch["image"])))
    rows = {name: torch.cat([table[name] for table in tables]).detach().numpy() for name in tables[0]}
    assert means(rows)["itc_chance"] == pytest.approx(2 / 6)
    assert len(rows["itc_loss"]) == rows["itc_acc"][:, 1].sum() == 6
