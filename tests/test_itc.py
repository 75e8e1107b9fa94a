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


# -------------------------------------------------------------------------- means, bags of words, soft targets

def with_words(cfg, idf, dims=3):
    """ITC with a bag of words of these weights {token: idf}, and random components."""
    torch.manual_seed(0)
    itc = ITC(cfg)
    for parameter in itc.parameters():
        if parameter.ndim:
            torch.nn.init.normal_(parameter)
    for token, weight in idf.items():
        itc.words.idf[token] = weight
    itc.words.mean.copy_(torch.rand(cfg.vocab_size) * (itc.words.idf > 0) / 10)
    itc.words.components.copy_(torch.randn(cfg.vocab_size, dims))
    return itc


def test_means_of_tokens_and_of_quarters(small_config, random_batch):
    cfg = small_config(itc=1.0, itc_pool="mean")
    itc, batch = ITC(cfg), random_batch(cfg)
    text, image = torch.randn(4, 12, 64), torch.randn(4, 17, 64)
    for row in range(4):
        length = int(batch["text_mask"][row].sum())
        assert length < 12 or row == 0
        mean = text[row, :length].mean(0) @ itc.text_proj.weight.T
        found = itc.text_features(text, batch)[row]
        torch.testing.assert_close(found, mean / mean.norm(), atol=1e-5, rtol=1e-4)
        quarters = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]  # of 4 x 4 patches
        means = torch.stack([image[row, 1:][quarter].mean(0) for quarter in quarters])      # (4, D)
        mean = means.T.flatten() @ itc.image_proj.weight.T
        torch.testing.assert_close(itc.image_features(image)[row], mean / mean.norm(), atol=1e-5, rtol=1e-4)


def test_a_bag_of_words_by_hand(small_config):
    """TF-IDF of the tokens that have a weight, each once, in any order."""
    cfg = small_config(itc=1.0, itc_words=3)
    itc = with_words(cfg, {7: 2.0, 8: 1.0, 9: 3.0})
    ids = torch.tensor([[0, 7, 8, 7, 2, 1], [0, 8, 7, 30, 2, 1], [0, 9, 31, 31, 2, 1], [0, 30, 31, 2, 1, 1]])
    wanted = torch.zeros(4, cfg.vocab_size)
    wanted[0, 7], wanted[0, 8], wanted[2, 9] = 2 / 5 ** 0.5, 1 / 5 ** 0.5, 1
    wanted[1] = wanted[0]                                     # no order, no repeats; 30 has no weight
    torch.testing.assert_close(itc.words.tf_idf(ids), wanted)
    cosines = (wanted @ wanted.T).fill_diagonal_(1)           # row 3 has no words that count
    torch.testing.assert_close(itc.words.similarity(ids), cosines)
    vectors = (wanted - itc.words.mean) @ itc.words.components @ itc.words.proj.weight.T       # (4, D)
    torch.testing.assert_close(itc.words(ids), vectors, atol=1e-5, rtol=1e-4)

    text = torch.randn(4, 6, 64)
    batch = {"text_ids": ids, "text_mask": (ids != 1).long()}
    read = text[:, 0] @ itc.text_proj.weight.T
    both = torch.cat([x / x.norm(dim=1, keepdim=True) for x in (read, vectors)], dim=1) / 2 ** 0.5
    torch.testing.assert_close(itc.text_features(text, batch), both, atol=1e-5, rtol=1e-4)

    # An image has a vector for each of the two, and the score is the mean of their cosines.
    image = torch.randn(5, 17, 64)
    seen = [image[:, 0] @ weight.T for weight in itc.image_proj.weight.split(64)]
    cosines = [torch.nn.functional.cosine_similarity(t[:, None], i, dim=-1)
               for t, i in zip((read, vectors), seen)]                # (4, 5) each
    found = itc.scores(itc.text_features(text, batch), itc.image_features(image))
    torch.testing.assert_close(found, itc.log_scale.exp() * (cosines[0] + cosines[1]) / 2, atol=1e-4, rtol=1e-4)


def test_soft_targets_by_hand(small_config):
    """Half of the target goes to the texts of the batch, by a softmax of their cosines."""
    cfg = small_config(itc=1.0, itc_words=3, itc_soft=0.5)
    itc = with_words(cfg, {7: 2.0, 8: 1.0, 9: 3.0})
    ids = torch.tensor([[0, 7, 8, 2], [0, 8, 9, 2], [0, 9, 31, 2]])
    batch = {"text_ids": ids, "text_mask": torch.ones(3, 4).long(),
             "image_id": torch.tensor([0, 1, 1]), "text_id": torch.arange(3)}
    text, image = torch.randn(3, 4, 64), torch.randn(3, 17, 64)
    found = itc(None, batch, text, image)["itc_loss"]

    features = itc.text_features(text, batch), itc.image_features(image)
    tables = []                                               # one of each vector: both have a loss
    for text_part, image_part in zip(*(feature.split(64, dim=1) for feature in features)):
        cosines = torch.nn.functional.cosine_similarity(text_part[:, None], image_part, dim=-1)
        tables += [logits := (itc.log_scale.exp() * cosines).double(), logits.T]
    alike = itc.words.similarity(ids).double()
    losses = []
    for i in range(3):
        kept = [j for j in range(3) if {i, j} != {1, 2}]      # rows 1 and 2 share their image
        soft = {j: (alike[i, j] / 0.1).exp() for j in kept}
        total = sum(soft.values())
        for table in tables:
            log_p = {j: table[i, j] - torch.stack([table[i, k] for k in kept]).logsumexp(0) for j in kept}
            column = {j: soft[j] / total for j in kept}
            target = {j: 0.5 * (i == j) + 0.5 * column[j] for j in kept}
            losses.append(-sum(target[j] * log_p[j] for j in kept) / 4)
    torch.testing.assert_close(found.double(), sum(losses) / 3, atol=1e-5, rtol=1e-4)


def test_soft_targets_need_a_bag_of_words(small_config):
    for changes, sentence in (({"itc_soft": 0.5}, "give --itc_words, too"), ({"itc_pool": "max"}, "class or mean"),
                              ({"itc_soft": 1.0, "itc_words": 3}, "at least 0 and below 1")):
        with pytest.raises(UserError, match=sentence):
            M3AE(small_config(itc=1.0, **changes))


class Main:
    """Rank 0: keeps the last line that was printed."""

    def print(self, line):
        self.line = line


def training_texts(folder, texts, vocabulary, dims):
    """(the training samples of a pack of these texts, a model with a bag of words, rank 0)"""
    from m3ae_mini.loader import Samples
    from m3ae_mini.tokenizer import Tokenizer
    from test_loader import settings, write_pack

    tokenizer = Tokenizer.train(texts, vocabulary)
    pack, _ = write_pack(folder / "p", texts, {"train": len(texts)})
    cfg, train_cfg = settings(tokenizer)
    cfg.itc, cfg.itc_words = 1.0, dims
    return Samples([pack], "train", tokenizer, cfg, train_cfg), M3AE(cfg), Main()


def test_components_of_the_training_texts(tmp_path, monkeypatch):
    """The bag of words of the training texts has mean 0 and uncorrelated components of variance 1 / dims; rare
    tokens have no weight; first weights stay."""
    import numpy as np

    from data.bag_of_words import LEAST, fit_bag_of_words
    from test_loader import CAPTIONS

    samples, model, main = training_texts(tmp_path, [*CAPTIONS, "An odd word: zebra."], 400, dims=5)
    cfg = model.cfg
    fit_bag_of_words(model, samples, main, resumed=True)      # a checkpoint will fill it
    assert not model.objectives["itc"].words.idf.any()
    fit_bag_of_words(model, samples, main, resumed=False)
    assert main.line.startswith("bag of words of ITC: ") and "5 components" in main.line

    words = model.objectives["itc"].words
    ids = [torch.from_numpy(np.asarray(samples.token_ids(n) >> 1).astype(np.int64)) for n in range(samples.n)]
    count = sum(torch.bincount(i.unique(), minlength=cfg.vocab_size) for i in ids)     # texts with each token
    for token in range(cfg.vocab_size):
        wanted = np.log(samples.n / count[token].item()) if count[token] >= LEAST else 0
        assert words.idf[token].item() == pytest.approx(wanted, abs=1e-6)
    assert (count[words.idf == 0] > 0).any()                  # some tokens are rare
    vectors = torch.cat([(words.tf_idf(i[None]) - words.mean) @ words.components for i in ids])
    torch.testing.assert_close(vectors.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(vectors.T @ vectors / samples.n, torch.eye(5) / 5, atol=1e-3, rtol=0)

    before = words.components.clone()
    words.components += 1
    fit_bag_of_words(model, samples, main, resumed=False)     # they are there: kept
    assert torch.equal(words.components, before + 1) and main.line.endswith("--init is kept")


def test_components_that_do_not_vary_are_left_out(tmp_path):
    """Four distinct texts span three directions, however many are asked for: the others stay 0."""
    from data.bag_of_words import fit_bag_of_words

    texts = [f"{size} {what}." for size in ("large", "small") for what in ("nodule", "effusion")] * 6
    samples, model, main = training_texts(tmp_path, texts, 300, dims=10)
    fit_bag_of_words(model, samples, main, resumed=False)
    assert main.line.endswith("2 components") or main.line.endswith("3 components")
    words = model.objectives["itc"].words
    new = torch.tensor([[int(i) >> 1 for i in samples.token_ids(0)][:3]])
    assert ((words.tf_idf(new) - words.mean) @ words.components).norm() < 10

    (tmp_path / "few").mkdir()
    few, model, main = training_texts(tmp_path / "few", texts[:3], 300, dims=10)
    few.cfg.max_text_len = 3                                  # of each text the model reads one token
    with pytest.raises(UserError, match="no token stands in 4 training texts: leave out --itc_words"):
        fit_bag_of_words(model, few, main, resumed=False)


def test_a_text_without_counted_words_has_its_own_image_as_target(small_config):
    itc = with_words(small_config(itc=1.0, itc_words=3, itc_soft=0.5), {7: 2.0})
    assert torch.equal(itc.words.similarity(torch.tensor([[0, 30, 2], [0, 31, 2], [0, 7, 2]])), torch.eye(3))


# -------------------------------------------------------------------------------- the report on pairs

def test_views_are_the_image_and_crops_of_it():
    from data.report import views
    image = torch.zeros(1, 3, 20, 20)
    image[..., 0, 0], image[..., 19, 19] = 1.0, 2.0           # two corners
    found = list(views(image))
    assert len(found) == 10 and torch.equal(found[0], image)
    assert all(view.shape == image.shape for view in found)
    corners = [(view[0, 0, 0, 0].item(), view[0, 0, 19, 19].item()) for view in found[1:]]
    assert corners[0] == (1.0, 0.0) and corners[-1] == (0.0, 2.0)      # the first and the last position
    assert [corner for corner in corners[1:-1] if corner != (0.0, 0.0)] == []


def test_the_report_has_the_figures_of_pairs(tmp_path, monkeypatch, capsys):
    """Those of pair_metrics.py, by ITC's scores on test, with val's threshold."""
    import train
    from data.pair_metrics import pair_figures
    from data.report import itc_scores
    from m3ae_mini.config import TrainConfig
    from m3ae_mini.distributed import DistEnv
    from m3ae_mini.config import RunConfig
    from m3ae_mini.loader import Samples
    from m3ae_mini.tokenizer import Tokenizer
    from test_loader import CAPTIONS, write_pack
    from test_train import SMALL, logged

    captions = [f"{caption} Number {i}." for i in range(2) for caption in CAPTIONS][:40]
    pack, _ = write_pack(tmp_path / "p", captions, {"train": 24, "val": 8, "test": 8})
    monkeypatch.setattr("sys.argv", ["train.py", *SMALL, "--data", str(pack.folder), "--itc", "1", "--steps", "2",
                                     "--out", str(tmp_path / "run"), "--device", "cpu", "--dtype", "float32"])
    train.main()
    printed = capsys.readouterr().out
    for words in "right above wrong", "image to text, R@10", "9 crops of it":
        assert words in printed

    # The same by hand, from the best checkpoint.
    state = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    from m3ae_mini import ModelConfig
    cfg = ModelConfig(**state["model_config"])
    model = M3AE(cfg)
    model.load_state_dict(state["model"])
    threshold = None
    for split in "val", "test":
        samples = Samples([pack], split, Tokenizer.load(tmp_path / "run"), cfg, TrainConfig())
        indices, scores = itc_scores(model, samples, 8, DistEnv(RunConfig(device="cpu", dtype="float32")))
        images = samples.identities(indices)[0].tolist()
        found = pair_figures(scores, [samples.line(n)["text"] for n in indices], threshold, images)
        threshold = found.pop("threshold")
    (line,) = logged(tmp_path / "run", "test")
    for name, value in found.items():
        assert line[name] == pytest.approx(value, abs=1e-6)
        assert line[f"low_{name}"] <= value <= line[f"high_{name}"]
