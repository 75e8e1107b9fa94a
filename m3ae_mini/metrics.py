"""How good is it? Sums and counts over a chunk, which add up over chunks and processes to means."""
import torch

from .objectives import MIM

NAMES = {"acc": "accuracy", "acc_open": "on open questions", "acc_closed": "on closed questions",
         "unknown": "right answer not in the list"}


def tally(hits, rows=None):
    """hits, any shape: what is averaged; rows: bool of that shape, which of them count. -> (sum, count)."""
    hits = hits.float()
    rows = torch.ones_like(hits) if rows is None else rows.float()
    return torch.stack([(hits * rows).sum(), rows.sum()])


@torch.no_grad()
def pretraining(model, batch):
    """Everything validation wants to know of one chunk -> {name: tensor (2,) of sum and count}.

    The cross-modal gain asks whether the two modalities have learned to use each other. The same hidden words
    are restored with the right picture, with another row's (`other`) and with one of the same kind (`kin`);
    the same hidden patches with the right text and with another row's. Rows without one don't count."""
    own = torch.arange(len(batch["image"]), device=batch["image"].device)     # (B,)
    other, kin = batch["other_index"], batch["kin_index"]                     # (B,) each
    text = model.encode_text(batch["text_ids"], batch["text_mask"])           # (B, T, D)
    image = model.encode_image(batch["image"])                                # (B, 1+L, D)
    sums = {}

    if "mlm" in model.objectives:
        def restored(index):
            out = model.objectives["mlm"](model, batch, None, image.index_select(0, index))
            return out, (out["mlm_logits"].argmax(-1) == out["mlm_targets"])  # (M,)

        out, right = restored(own)
        counts = out["mlm_targets"] != -100                                   # (M,) fillers don't count
        row = batch["mlm_positions"] // batch["mlm_ids"].shape[1]             # (M,) each masked token's row
        sums["mlm_loss"] = torch.stack([out["mlm_loss"] * counts.sum(), counts.sum()])
        sums["mlm_acc"] = tally(right, counts)
        for name, index in (("other", other), ("kin", kin)):
            partner = counts & (index != own)[row]                            # (M,)
            wrong = restored(index)[1]
            sums[f"mlm_acc_{name}"] = tally(wrong, partner)
            sums[f"mlm_gain_{name}"] = tally(right.float() - wrong.float(), partner)

    if "mim" in model.objectives:
        def error(index):
            swapped = batch | {"text_mask": batch["text_mask"].index_select(0, index)}
            out = model.objectives["mim"](model, swapped, text.index_select(0, index), None)
            target = MIM.target(batch["image"], model.cfg)
            return (out["mim_pred"] - target).square().mean(-1), out["mim_hidden"].bool()   # (B, L) each

        right, hidden = error(own)
        sums["mim_loss"] = tally(right, hidden)
        sums["mim_gain_other"] = tally(error(other)[0] - right, hidden & (other != own)[:, None])

    if "itm" in model.objectives:
        def says_match(index):
            out = model.objectives["itm"](model, batch | {"itm_index": index}, text, image)
            return out["itm_logits"].argmax(-1) == 1, out["itm_loss"]         # (B,), ()

        right = says_match(own)[0]
        mixed, loss = says_match(batch["itm_index"])
        sums["itm_loss"] = torch.stack([loss * len(own), loss.new_tensor(len(own))])
        sums["itm_acc"] = tally(mixed == (batch["itm_index"] == own))
        for name, index in (("other", other), ("kin", kin)):
            partner = index != own                                            # (B,)
            both = (right.float() + (~says_match(index)[0]).float()) / 2
            sums[f"itm_acc_{name}"] = tally(both, partner)
    return sums


def choice(told, truths, choices, task, closed):
    """What a model told of each row of a chunk, and the names of which any is right -> {name: tensor (2,) of
    sum and count}. vqa: accuracy over all, open and closed questions (closed: True, False, or None where the
    data set does not say), and the share of questions whose answer is not in the list `choices`, which count
    as wrong. cls: accuracy, and the recall of each class."""
    right = torch.tensor([name in truth for name, truth in zip(told, truths)])            # (B,)
    if task == "cls":
        recalls = {f"recall of {name}": tally(right, torch.tensor([name in truth for truth in truths]))
                   for name in choices}
        return {"acc": tally(right), **recalls}
    known = set(choices)
    return {"acc": tally(right),
            "acc_open": tally(right, torch.tensor([flag is False for flag in closed])),
            "acc_closed": tally(right, torch.tensor([flag is True for flag in closed])),
            "unknown": tally(torch.tensor([known.isdisjoint(truth) for truth in truths]))}


def recall(scores, right, direction):
    """scores (Q, C) of every candidate for every query, right bool (Q, C) -> {name: share of the queries with
    a right candidate among the first 1, 5, 10}. Among equal scores the wrong ones come first, so that a model
    that scores all alike finds nothing."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)                   # (Q, 1)
    before = ((scores >= best) & ~right).sum(1)                                           # (Q,)
    return {f"{direction}, recall@{k}": (before < k).float().mean().item() for k in (1, 5, 10)}
