"""How good is it? Sums and counts over a chunk, which add up over chunks and processes to means."""
import torch


def sum_and_count(hits, rows=None):
    """hits, any shape: what is averaged; rows: bool of that shape, which of them count. -> (sum, count)."""
    hits, rows = hits.float(), (torch.ones_like(hits) if rows is None else rows).float()
    return torch.stack([(hits * rows).sum(), rows.sum()])


def answer_metrics(told, truths, choices, task, closed):
    """What a model told of each row of a chunk, and the names of which any is right -> {name: (sum, count)}.
    vqa: accuracy over all, open and closed questions (closed: True, False or None, not known), and the share
    whose answer is not in the list `choices` and counts as wrong. cls: accuracy, recall of each class."""
    right = torch.tensor([name in truth for name, truth in zip(told, truths)])            # (B,)
    if task == "cls":
        recalls = {f"recall of {name}": sum_and_count(right, torch.tensor([name in truth for truth in truths]))
                   for name in choices}
        return {"acc": sum_and_count(right), **recalls}
    known = set(choices)
    return {"acc": sum_and_count(right),
            "acc_open": sum_and_count(right, torch.tensor([flag is False for flag in closed])),
            "acc_closed": sum_and_count(right, torch.tensor([flag is True for flag in closed])),
            "answer_not_in_list": sum_and_count(torch.tensor([known.isdisjoint(truth) for truth in truths]))}


def recall(scores, right, direction):
    """scores (Q, C) of every candidate for every query, right bool (Q, C) -> {name: share of the queries with
    a right candidate among the first 1, 5, 10}. Where scores are equal, or not numbers, the wrong ones come
    first: a model that scores all alike finds nothing."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)                   # (Q, 1)
    before = (~(scores < best) & ~right).sum(1)                                           # (Q,)
    return {f"{direction}_r{k}": (before < k).float().mean().item() for k in (1, 5, 10)}
