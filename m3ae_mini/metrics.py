"""How good is it? Sums and counts over a chunk, which add up over chunks and processes to means."""
import numpy as np
import torch

from .data import VAL_SEED, load, validation_chunks
from .masking import split_patches
from .model import patchify
from .objectives import MIM


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
            target = model.objectives["mim"].target(batch["image"], model.cfg)
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


@torch.no_grad()
def ignorance(train, test, limit, device, drawn_clean=None, pictures=8192):
    """What can be had on at most `limit` test samples without understanding them: {name: float}.

    commonest: the share of the commonest token among the masked ones. kind_alone: matching accuracy over any
    wrong picture of one who sees only its kind. constant_patch: error of the mean normalised patch at each
    place, the best guess that knows only the place, from at most `pictures` training pictures. noise_floor:
    error of the pictures drawn_clean(sample number) -> (B, 3, S, S), which know all but the noise."""
    cfg, mean, seen = test.cfg, 0, 0
    for _, _, _, batch in load(train, validation_chunks(train, pictures), VAL_SEED, device):
        mean = mean + MIM.target(batch["image"], cfg).sum(0)                  # (L, 3·P²)
        seen += len(batch["image"])
    mean = mean / seen

    tokens, sums = [], {}
    for _, _, numbers, batch in load(test, validation_chunks(test, limit), VAL_SEED, device):
        image, target = batch["image"], MIM.target(batch["image"], cfg)       # (B, L, 3·P²)
        keep, restore = split_patches(batch["mim_noise"], cfg.mask_ratio)
        hidden = restore >= keep.shape[1]                                     # (B, L)
        pairs = {"constant_patch": tally((mean - target).square().mean(-1), hidden)}
        if drawn_clean:
            clean = patchify(drawn_clean(numbers).to(image), cfg.patch_size)  # (B, L, 3·P²)
            if cfg.norm_pix_loss:          # measured in the same units: the noisy patch's own mean and spread
                var, middle = torch.var_mean(patchify(image, cfg.patch_size), dim=-1, keepdim=True)
                clean = (clean - middle) / (var + 1e-6).sqrt()
            pairs["noise_floor"] = tally((clean - target).square().mean(-1), hidden)

        group = np.array([test.packs[pack].samples["group"][row] for pack, row in map(test.locate, numbers)])
        other = batch["other_index"].cpu().numpy()
        partner = torch.from_numpy(other != np.arange(len(other)))
        told = torch.from_numpy(group != group[other])     # who knows the kind says "no" to these, else "yes"
        pairs["kind_alone"] = tally((1 + told.float()) / 2, partner).to(device)
        tokens.append(batch["mlm_labels"][batch["mlm_labels"] != -100].cpu())
        sums = {name: sums.get(name, 0) + pair for name, pair in pairs.items()}

    tokens = torch.cat(tokens)
    return {"commonest": (tokens.bincount().max() / len(tokens)).item(),
            **{name: (total / count).item() for name, (total, count) in sums.items()}}
