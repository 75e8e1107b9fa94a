"""What M³AE learns from: each objective is one module with its head, its pass through the trunk and its loss.

An objective is called with the model, the batch, the whole text and the whole image, encoded once (None where
none `reads` it). It returns a dict: `NAME_loss` and what it predicted. A new loss: one more in OBJECTIVES."""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .model import ViTBlock, Backbone, initialise, patchify


class MLM(nn.Module):
    """Masked language modelling: restore hidden words from the other words and the whole image, by an MLP
    on the text stream after the last fusion layer: words are high-level (paper, section 2.3)."""
    inputs = ("image",)

    def __init__(self, cfg):
        super().__init__()
        self.dense = nn.Linear(cfg.fusion_width, cfg.fusion_width)
        self.norm = nn.LayerNorm(cfg.fusion_width, eps=1e-12)
        self.decoder = nn.Linear(cfg.fusion_width, cfg.vocab_size)

    def forward(self, model, batch, text, image):
        """image (B, 1+L, D) -> mlm_logits (M, V) and mlm_targets (M,) for the masked tokens, row-major, and
        their cross-entropy. M may count filler at the end, of target -100, where the loader rounded up."""
        labels = batch["mlm_labels"].flatten()                                         # (B·T,)
        where = batch.get("mlm_positions")
        if where is None:
            where = (labels != -100).nonzero()[:, 0]                                   # (M,)
        stream = model.encode_text(batch["mlm_ids"], batch["text_mask"])               # (B, T, D)
        stream, _ = model.fuse(stream, image, batch["text_mask"], streams=("text",))      # (B, T, D)

        # The vocabulary is the widest layer of all: only masked tokens pay for it.
        states = stream.flatten(0, 1).index_select(0, where)                           # (M, D)
        logits = self.decoder(self.norm(F.gelu(self.dense(states)))).float()           # (M, V)
        targets = labels.index_select(0, where)                                        # (M,)
        loss = F.cross_entropy(logits, targets, reduction="sum") / (targets != -100).sum().clamp(min=1)
        return {"mlm_loss": loss, "mlm_logits": logits, "mlm_targets": targets}


class MIM(nn.Module):
    """Masked image modelling: restore hidden patches from the visible quarter and the text, by a small
    Transformer on the image stream entering fusion layer `mim_layer`: pixels are low-level (section 2.3)."""

    def __init__(self, cfg):
        super().__init__()
        width, side = cfg.decoder_width, cfg.image_size // cfg.patch_size
        self.depth = cfg.fusion_layers if cfg.mim_layer == -1 else cfg.mim_layer
        self.inputs = ("text",) if self.depth else ()
        self.embed = nn.Linear(cfg.fusion_width, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.register_buffer("pos_embed", sine_cosine_positions(width, side), persistent=False)
        self.blocks = nn.ModuleList(ViTBlock(width, cfg.decoder_heads) for _ in range(cfg.decoder_layers))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.pred = nn.Linear(width, 3 * cfg.patch_size ** 2)

    def forward(self, model, batch, text, image):
        """text (B, T, D) -> mim_pred (B, L, 3·P²), mim_hidden (B, L), 1 where a patch was hidden, and the
        squared error: mean within a patch, then over the hidden patches."""
        kept, ids_restore = model.encode_image(batch["image"], batch["mim_noise"])         # (B, 1+K, D), (B, L)
        _, kept = model.fuse(text, kept, batch["text_mask"], depth=self.depth, streams=("image",))
        pred = self.decode(kept, ids_restore).float()                                      # (B, L, 3·P²)
        target = self.target(batch["image"], model.cfg)                                # (B, L, 3·P²)
        hidden = (ids_restore >= kept.shape[1] - 1).float()                                # (B, L)
        error = (pred - target).square().mean(-1)                                      # (B, L)
        return {"mim_loss": (error * hidden).sum() / hidden.sum(), "mim_pred": pred, "mim_hidden": hidden}

    def decode(self, kept, ids_restore):
        """kept (B, 1+K, D), ids_restore (B, L) -> predicted patches (B, L, 3·P²)"""
        x = self.embed(kept)                                                           # (B, 1+K, W)
        # Mask tokens fill up the row behind the kept patches; then every patch goes back to its place.
        filler = self.mask_token.to(x.dtype).expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], filler], dim=1)                                 # (B, L, W)
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[-1]))    # (B, L, W)
        x = torch.cat([x[:, :1], patches], dim=1) + self.pos_embed                           # (B, 1+L, W)
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x[:, 1:]))                                          # class token dropped

    @staticmethod
    def target(image, cfg):
        """image (B, 3, S, S) -> the patches to restore (B, L, 3·P²), each normalised by its mean and unbiased
        variance where norm_pix_loss says so: contrast then counts as much in dark patches as in bright."""
        patches = patchify(image, cfg.patch_size)
        if not cfg.norm_pix_loss:
            return patches
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (var + 1e-6).sqrt()


def sine_cosine_positions(width, side):
    """Fixed 2-D positions (1 + side², width), class token zeros. The first half of the channels tells the
    column, the second the row; in a half all sines, then all cosines, of 10000^(-4i/width), i < width/4."""
    frequency = 10000.0 ** (-np.arange(width // 4) / (width / 4))                      # float64, as released
    angle = np.arange(side)[:, None] * frequency                                       # (side, width/4)
    code = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)                      # (side, width/2)
    grid = np.concatenate([np.tile(code, (side, 1)), code.repeat(side, axis=0)], axis=1)   # (side², width)
    return torch.from_numpy(np.concatenate([np.zeros((1, width)), grid])).float()


class ITM(nn.Module):
    """The third objective, image-text matching: half the rows get another row's image; which ones?"""
    inputs = ("text", "image")

    def __init__(self, cfg):
        super().__init__()
        self.fc = nn.Linear(2 * cfg.fusion_width, 2)

    def forward(self, model, batch, text, image):
        """text (B, T, D), image (B, 1+L, D); row i of the text goes with image itm_index[i] -> itm_logits
        (B, 2), class 1: they match. A wrong image is a row that is encoded already, so it costs nothing."""
        index = batch["itm_index"]                                                     # (B,)
        feature = model.pooled_pair(text, image.index_select(0, index), batch["text_mask"])  # (B, 2D)
        logits = self.fc(feature).float()                                              # (B, 2)
        match = (index == torch.arange(len(index), device=index.device)).long()        # (B,)
        return {"itm_loss": F.cross_entropy(logits, match), "itm_logits": logits}


class ClassifierHead(nn.Module):
    """What VQA and classification share: a head on the joint feature, (B, 2D) -> (B, choices)."""
    inputs = ("text", "image")

    def __init__(self, cfg):
        super().__init__()
        width = 2 * cfg.fusion_width
        choices = {"vqa": cfg.num_answers, "cls": cfg.num_classes}[cfg.task]
        self.head = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width, eps=1e-5), nn.GELU(),
                                  nn.Linear(width, choices))


class VQA(ClassifierHead):
    """Question answering as a choice from the answer list. A label of -1 (outside it) has no right choice."""

    def forward(self, model, batch, text, image):
        """-> vqa_logits (B, A); binary cross-entropy summed over the answers, averaged over the rows."""
        logits = self.head(model.pooled_pair(text, image, batch["text_mask"])).float()       # (B, A)
        answers = torch.arange(logits.shape[1], device=logits.device)                  # (A,)
        target = (batch["vqa_labels"][:, None] == answers).float()                     # (B, A) one-hot
        loss = F.binary_cross_entropy_with_logits(logits, target) * logits.shape[1]
        return {"vqa_loss": loss, "vqa_logits": logits}


class Classification(ClassifierHead):
    """One class for an image with its text."""

    def forward(self, model, batch, text, image):
        """-> cls_logits (B, C) and their cross-entropy."""
        logits = self.head(model.pooled_pair(text, image, batch["text_mask"])).float()       # (B, C)
        return {"cls_loss": F.cross_entropy(logits, batch["cls_labels"]), "cls_logits": logits}


class Retrieval(nn.Module):
    """Which text belongs to the image: the right one against F texts of other rows."""
    inputs = ("text", "image")

    def __init__(self, cfg):
        super().__init__()
        self.fc = nn.Linear(2 * cfg.fusion_width, 1)

    def forward(self, model, batch, text, image):
        """false_text_index (B, F) -> irtr_logits (B, 1+F), the right text first, and their cross-entropy."""
        false = batch["false_text_index"]                                              # (B, F)
        own = torch.arange(len(false), device=false.device)[:, None]                   # (B, 1)
        texts = torch.cat([own, false], dim=1)                                         # (B, 1+F)
        pairs = texts.flatten()                                                        # (B·(1+F),)
        feature = model.pooled_pair(text.index_select(0, pairs), image.repeat_interleave(texts.shape[1], dim=0),
                              batch["text_mask"].index_select(0, pairs))               # (B·(1+F), 2D)
        logits = self.fc(feature).float().view(texts.shape)                            # (B, 1+F)
        # Where a row had too few partners its own text fills up the false ones: no choice at all.
        logits = logits.masked_fill(F.pad(false == own, (1, 0)), -torch.inf)           # (B, 1+F)
        return {"irtr_loss": F.cross_entropy(logits, torch.zeros_like(own[:, 0])), "irtr_logits": logits}


OBJECTIVES = {"pretrain": {"mlm": MLM, "mim": MIM, "itm": ITM},
              "vqa": {"vqa": VQA}, "cls": {"cls": Classification}, "irtr": {"irtr": Retrieval}}


class M3AE(Backbone):
    """The trunk and the objectives in use. An objective of weight 0 is not built, and its work not done."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.loss_weights = {name: weight for name in OBJECTIVES[cfg.task]
                             if (weight := getattr(cfg, name, 1.0))}    # a task's one loss has no field: 1
        self.objectives = nn.ModuleDict({name: OBJECTIVES[cfg.task][name](cfg) for name in self.loss_weights})
        initialise(self)
        if "mim" in self.objectives:
            nn.init.normal_(self.objectives["mim"].mask_token, std=0.02)
            for block in self.objectives["mim"].blocks:
                nn.init.xavier_uniform_(block.attn.qkv.weight)

    def forward(self, batch):
        """A dict of tensors (the loader's, or a golden case's) -> every objective's outputs, and `loss`,
        their weighted sum. With dropout on, MIM and ITM share one draw for the text (two in the release)."""
        read = {what for objective in self.objectives.values() for what in objective.inputs}
        text = self.encode_text(batch["text_ids"], batch["text_mask"]) if "text" in read else None
        image = self.encode_image(batch["image"]) if "image" in read else None

        out = {}
        for name, objective in self.objectives.items():
            out.update(objective(self, batch, text, image))
        out["loss"] = sum(weight * out[f"{name}_loss"] for name, weight in self.loss_weights.items())
        return out
