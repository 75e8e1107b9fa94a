"""The objectives: each is one module with its head, its forward pass and its loss.

An objective is called with the model, the batch, and the encodings that it names in `inputs`: text,
masked_text, image. Each of them is computed once and shared. It returns a dict: `NAME_loss` and its
predictions. A new loss is one class here and one entry in OBJECTIVES. The batch's tensors are
listed at Samples.batch in loader.py."""
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig, require
from .model import Backbone, ViTBlock, initialise, patchify


NEVER = -1e4                           # logit of what is no candidate
SOFT_SCALE = 0.1                       # temperature of the softmax of ITC's soft targets


# ------------------------------------------------------------------------------------- pre-training

class MLM(nn.Module):
    """Masked language modelling: restore the hidden words from the other words and the whole image.

    Words are high-level: an MLP reads the text stream after the last fusion layer (paper, section
    2.3)."""
    inputs = ("masked_text", "image")

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(cfg.fusion_width, cfg.fusion_width)
        self.norm = nn.LayerNorm(cfg.fusion_width, eps=1e-12)
        self.decoder = nn.Linear(cfg.fusion_width, cfg.vocab_size)

    def forward(self, model: Backbone, batch: dict, masked_text: Tensor, image: Tensor) -> dict:
        """masked_text (B, T, D), image (B, 1+L, D) -> mlm_loss (), mlm_logits (M, V),
        mlm_targets (M,)

        M may count padding at its end, of target -100: the loader rounds M up to repeat shapes."""
        # Fuse the masked text with the whole image.
        x, _ = model.fuse(masked_text, image, batch["text_mask"], streams=("text",))  # (B, T, D)

        # The vocabulary is the widest layer of all: only masked tokens are projected onto it.
        labels = batch["mlm_labels"].flatten()                        # (B·T,)
        positions = batch.get("mlm_positions")
        if positions is None:
            positions = (labels != -100).nonzero()[:, 0]              # (M,)
        x = x.flatten(0, 1).index_select(0, positions)                # (M, D)
        logits = self.decoder(self.norm(F.gelu(self.dense(x)))).float()  # (M, V)

        # Cross-entropy, averaged over the masked tokens.
        targets = labels.index_select(0, positions)                   # (M,)
        num_masked = (targets != -100).sum().clamp(min=1)
        loss = F.cross_entropy(logits, targets, reduction="sum") / num_masked
        return {"mlm_loss": loss, "mlm_logits": logits, "mlm_targets": targets}


class MIM(nn.Module):
    """Masked image modelling: restore hidden patches from the visible ones and the text.

    Pixels are low-level: a small Transformer reads the image stream after `mim_layer` fusion layers
    (paper, section 2.3)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        width, grid = cfg.decoder_width, cfg.image_size // cfg.patch_size
        self.depth = cfg.fusion_layers if cfg.mim_layer == -1 else cfg.mim_layer
        self.inputs = ("text",) if self.depth else ()
        self.embed = nn.Linear(cfg.fusion_width, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.register_buffer("pos_embed", sine_cosine_positions(width, grid), persistent=False)
        self.blocks = nn.ModuleList(ViTBlock(width, cfg.decoder_heads)
                                    for _ in range(cfg.decoder_layers))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.pred = nn.Linear(width, 3 * cfg.patch_size ** 2)

    def forward(self, model: Backbone, batch: dict, text: Tensor | None = None) -> dict:
        """text (B, T, D) -> mim_loss (), mim_pred (B, L, 3·P²), mim_hidden (B, L)

        mim_hidden is 1 for a hidden patch. The loss is the squared error: its mean within a patch,
        then its mean over the hidden patches."""
        # Encode the visible patches, fuse them with the text for `depth` layers, decode them all.
        pixels, noise = batch["image"], batch["mim_noise"]            # (B, 3, S, S), (B, L)
        visible, ids_restore = model.encode_visible(pixels, noise)    # (B, 1+K, D), (B, L)
        _, visible = model.fuse(text, visible, batch["text_mask"], depth=self.depth,
                                streams=("image",))                   # (B, 1+K, D)
        pred = self.decode(visible, ids_restore).float()              # (B, L, 3·P²)

        # Only hidden patches count.
        target = self.target(pixels, model.cfg)                       # (B, L, 3·P²)
        hidden = (ids_restore >= visible.shape[1] - 1).float()        # (B, L)
        error = (pred - target).square().mean(-1)                     # (B, L)
        loss = (error * hidden).sum() / hidden.sum()
        return {"mim_loss": loss, "mim_pred": pred, "mim_hidden": hidden}

    def decode(self, visible: Tensor, ids_restore: Tensor) -> Tensor:
        """visible (B, 1+K, D), ids_restore (B, L) -> predicted patches (B, L, 3·P²)"""
        x = self.embed(visible)                                       # (B, 1+K, W)
        num_hidden = ids_restore.shape[1] + 1 - x.shape[1]                             # L - K

        # Append a mask token for every hidden patch, then put all patches back into reading order.
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), num_hidden, -1)  # (B, L-K, W)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)           # (B, L, W)
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[-1]))  # (B, L, W)

        x = torch.cat([x[:, :1], patches], dim=1) + self.pos_embed    # (B, 1+L, W)
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x[:, 1:]))                                  # class token dropped

    @staticmethod
    def target(image: Tensor, cfg: ModelConfig, like: Tensor | None = None) -> Tensor:
        """image (B, 3, S, S) -> the patches to restore (B, L, 3·P²)

        With norm_pix_loss each patch is normalised by its mean and unbiased variance (or by those
        of the image `like`), so that contrast counts as much in dark patches as in bright ones."""
        patches = patchify(image, cfg.patch_size)
        if not cfg.norm_pix_loss:
            return patches
        statistics = patches if like is None else patchify(like, cfg.patch_size)
        var, mean = torch.var_mean(statistics, dim=-1, keepdim=True)  # (B, L, 1) each
        return (patches - mean) / (var + 1e-6).sqrt()


def sine_cosine_positions(width: int, grid: int) -> Tensor:
    """Fixed 2-D position embedding (1 + grid², width); zeros for the class token (released code).

    The first half of the channels codes the column, the second the row. Within a half all sines
    come first, then all cosines, of 10000^(-4i/width), i < width/4."""
    frequency = 10000.0 ** (-np.arange(width // 4) / (width / 4))     # (width/4,)
    angle = np.arange(grid)[:, None] * frequency                      # (grid, width/4)
    code = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)     # (grid, width/2)
    column, row = np.tile(code, (grid, 1)), code.repeat(grid, axis=0)  # (grid², width/2) each
    table = np.concatenate([np.zeros((1, width)), np.concatenate([column, row], axis=1)])
    return torch.from_numpy(table).float()                            # (1 + grid², width)


class ITM(nn.Module):
    """Image-text matching: half of the texts get a wrong image (paper, section 2.4)."""
    inputs = ("text", "image")

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.fc = nn.Linear(2 * cfg.fusion_width, 2)

    def forward(self, model: Backbone, batch: dict, text: Tensor, image: Tensor) -> dict:
        """text (B, T, D), image (B, 1+L, D) -> itm_loss (), itm_logits (B, 2)

        itm_index (B,) names the image of each text. Class 1 means "they match". A wrong image is a
        row that is encoded already, so it costs nothing."""
        index = batch["itm_index"]                                    # (B,)
        paired = image.index_select(0, index)                         # (B, 1+L, D)
        feature = model.pooled_pair(text, paired, batch["text_mask"])  # (B, 2D)
        logits = self.fc(feature).float()                             # (B, 2)
        match = (index == torch.arange(len(index), device=index.device)).long()  # (B,)
        return {"itm_loss": F.cross_entropy(logits, match), "itm_logits": logits}


class ITC(nn.Module):
    """Image-text contrast: find the image of each text in the micro-batch, and vice versa.

    Not in the paper; CLIP and ALBEF have it. A text and an image are one vector each, before the
    fusion, so that a million pairs are one matrix product. Both are projections: of the class
    token, or with `itc_pool mean` of the mean of the text's tokens and of `quarter_means` of the
    image. `itc_words` adds a second pair of vectors with a loss of its own: the text's bag of words
    and a second projection of the image, K = 2 instead of 1. A pair's score is the mean of the K
    cosines."""
    inputs = ("text", "image")

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.pool_mean, self.soft = cfg.itc_pool == "mean", cfg.itc_soft
        self.num_vectors = 2 if cfg.itc_words else 1                  # K
        width = cfg.fusion_width
        self.text_proj = nn.Linear(width, width, bias=False)
        pooled_width = 4 * width if self.pool_mean else width
        self.image_proj = nn.Linear(pooled_width, self.num_vectors * width, bias=False)
        self.words = BagOfWords(cfg) if cfg.itc_words else None
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())            # CLIP's first value

    def forward(self, model: Backbone, batch: dict, text: Tensor, image: Tensor) -> dict:
        """text (B, T, D), image (B, 1+L, D) -> itc_loss (), itc_logits (B, B): text i with image j

        The loss is the mean of both directions. Rows with the same image or text are not negatives
        of each other. They have equal batch["image_id"] or batch["text_id"], (B,), if given."""
        text = self.text_features(text, batch)                        # (B, K·D)
        image = self.image_features(image)                            # (B, K·D)
        own = torch.eye(len(text), dtype=torch.bool, device=text.device)       # (B, B)
        same = torch.zeros_like(own)                                  # (B, B)
        for name in ("image_id", "text_id"):
            if name in batch:
                same = same | (batch[name][:, None] == batch[name])
        same = same & ~own

        # A text may fit other images a little, by how alike the words of the texts are.
        targets = own.float()                                         # (B, B)
        if self.soft:
            alike = self.words.similarity(batch["text_ids"]).masked_fill(same, NEVER)  # (B, B)
            targets = (1 - self.soft) * targets + self.soft * (alike / SOFT_SCALE).softmax(1)

        # Each of the K vectors learns to tell the pairs apart alone. They are of length 1/√K, so
        # K times their product is a cosine. Likeness is symmetric: the targets of text i are those
        # of image i.
        losses = []
        for text_part, image_part in zip(self.split(text), self.split(image)):
            logits = self.num_vectors * self.scores(text_part, image_part)     # (B, B)
            logits = logits.masked_fill(same, NEVER)
            losses += [F.cross_entropy(logits, targets), F.cross_entropy(logits.T, targets)]
        logits = self.scores(text, image).masked_fill(same, NEVER)
        return {"itc_loss": torch.stack(losses).mean(), "itc_logits": logits}

    def text_features(self, text: Tensor, batch: dict) -> Tensor:
        """text (B, T, D); text_ids, text_mask (B, T) of the batch -> (B, K·D) of length 1"""
        pooled = text[:, 0]                                           # (B, D)
        if self.pool_mean:
            mask = batch["text_mask"][..., None].to(text.dtype)       # (B, T, 1)
            pooled = (text * mask).sum(1) / mask.sum(1)
        vectors = [self.text_proj(pooled)]                            # (B, D)
        if self.words is not None:
            vectors.append(self.words(batch["text_ids"]))             # (B, D)
        return self.join(vectors)

    def image_features(self, image: Tensor) -> Tensor:
        """image (B, 1+L, D) -> (B, K·D) of length 1"""
        pooled = quarter_means(image) if self.pool_mean else image[:, 0]       # (B, 4·D | D)
        return self.join(self.split(self.image_proj(pooled)))

    def split(self, features: Tensor) -> tuple[Tensor, ...]:
        """(B, K·D) -> K vectors (B, D)"""
        return features.chunk(self.num_vectors, dim=1)

    def join(self, vectors: Sequence[Tensor]) -> Tensor:
        """K vectors (B, D) -> (B, K·D) of length 1, to which each contributes the same"""
        vectors = [F.normalize(vector.float(), dim=-1) for vector in vectors]
        return torch.cat(vectors, dim=1) / len(vectors) ** 0.5

    def scores(self, text: Tensor, image: Tensor) -> Tensor:
        """Features (Q, C), (P, C) -> scores of all pairs (Q, P), scaled by at most 100"""
        device = text.device.type.replace("meta", "cpu")              # meta has no autocast
        with torch.autocast(device, enabled=False):                   # bf16 makes many scores equal
            return self.log_scale.exp().clamp(max=100) * (text.float() @ image.float().T)


def quarter_means(image: Tensor) -> Tensor:
    """image (B, 1+L, D) -> (B, 4·D), the mean of the patches in each quarter of the image

    One mean of all patches would lose the layout, and with it the plane of a CT or MR image."""
    side = math.isqrt(image.shape[1] - 1)
    grid = image[:, 1:].mT.unflatten(2, (side, side))                 # (B, D, √L, √L)
    return F.adaptive_avg_pool2d(grid, 2).flatten(1)


class BagOfWords(nn.Module):
    """Which words a text has: TF-IDF (TF 0 or 1), in the space of its principal components (LSA).

    A few thousand texts teach an encoder too little. Here only `proj` is trained. The rest are
    statistics of the training texts (data/bag_of_words.py)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.register_buffer("idf", torch.zeros(cfg.vocab_size))      # 0: the token is not counted
        self.register_buffer("mean", torch.zeros(cfg.vocab_size))
        self.register_buffer("components", torch.zeros(cfg.vocab_size, cfg.itc_words))
        self.proj = nn.Linear(cfg.itc_words, cfg.fusion_width, bias=False)

    def tf_idf(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, V) of length 1; how often a token occurs does not matter"""
        present = torch.zeros(len(ids), len(self.idf), device=ids.device).scatter(1, ids, 1.0)
        return F.normalize(present * self.idf, dim=1)

    def similarity(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> cosines of TF-IDF (B, B); 1 with itself, even if no token counts"""
        tf_idf = self.tf_idf(ids)                                     # (B, V)
        return (tf_idf @ tf_idf.T).fill_diagonal_(1)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, D)"""
        return self.proj((self.tf_idf(ids) - self.mean) @ self.components)


# --------------------------------------------------------------------------------- downstream tasks

class ClassifierHead(nn.Module):
    """What VQA and classification share: a head on the pooled pair, (B, 2D) -> (B, classes)."""
    inputs = ("text", "image")

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        width = 2 * cfg.fusion_width
        num_labels = {"vqa": cfg.num_answers, "cls": cfg.num_classes}[cfg.task]
        self.head = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width, eps=1e-5), nn.GELU(),
                                  nn.Linear(width, num_labels))


class VQA(ClassifierHead):
    """Question answering as classification over the answer list; -1: not in the list."""

    def forward(self, model: Backbone, batch: dict, text: Tensor, image: Tensor) -> dict:
        """vqa_labels (B,) -> vqa_logits (B, A), vqa_loss (): BCE, sum over A, mean over B"""
        logits = self.head(model.pooled_pair(text, image, batch["text_mask"])).float()  # (B, A)
        answers = torch.arange(logits.shape[1], device=logits.device)  # (A,)
        target = (batch["vqa_labels"][:, None] == answers).float()    # (B, A) one-hot
        loss = F.binary_cross_entropy_with_logits(logits, target) * logits.shape[1]
        return {"vqa_loss": loss, "vqa_logits": logits}


class Classification(ClassifierHead):
    """One class for an image with its text, or several labels, each with a sigmoid of its own."""

    def forward(self, model: Backbone, batch: dict, text: Tensor, image: Tensor) -> dict:
        """cls_labels (B,), or (B, C) of 0 and 1 -> cls_logits (B, C), cls_loss (): (binary)
        cross-entropy"""
        logits = self.head(model.pooled_pair(text, image, batch["text_mask"])).float()  # (B, C)
        labels = batch["cls_labels"]
        several = labels.ndim == 2
        loss = F.binary_cross_entropy_with_logits if several else F.cross_entropy
        return {"cls_loss": loss(logits, labels), "cls_logits": logits}


class Retrieval(nn.Module):
    """Which text belongs to the image: the right one against F texts of other rows."""
    inputs = ("text", "image")

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.fc = nn.Linear(2 * cfg.fusion_width, 1)

    def forward(self, model: Backbone, batch: dict, text: Tensor, image: Tensor) -> dict:
        """false_text_index (B, F) -> irtr_logits (B, 1+F), right text first, and irtr_loss ()"""
        # Each image with its own text and F texts of other rows.
        false = batch["false_text_index"]                             # (B, F)
        positive_index = torch.arange(len(false), device=false.device)[:, None]  # (B, 1)
        texts = torch.cat([positive_index, false], dim=1)             # (B, 1+F)
        pairs = texts.flatten()                                       # (B·(1+F),)
        feature = model.pooled_pair(
            text.index_select(0, pairs),                              # (B·(1+F), T, D)
            image.repeat_interleave(texts.shape[1], dim=0),           # (B·(1+F), 1+L, D)
            batch["text_mask"].index_select(0, pairs))                # -> (B·(1+F), 2D)
        logits = self.fc(feature).float().view(texts.shape)           # (B, 1+F)

        # Rows with too few negatives are padded with their own text; mask the padding out.
        logits = logits.masked_fill(F.pad(false == positive_index, (1, 0)), -torch.inf)
        loss = F.cross_entropy(logits, torch.zeros_like(positive_index[:, 0]))
        return {"irtr_loss": loss, "irtr_logits": logits}


OBJECTIVES = {"pretrain": {"mlm": MLM, "mim": MIM, "itm": ITM, "itc": ITC},
              "vqa": {"vqa": VQA},
              "cls": {"cls": Classification},
              "irtr": {"irtr": Retrieval, "itc": ITC}}


# ---------------------------------------------------------------------------------------- the model

def loss_weights(cfg: ModelConfig) -> dict[str, float]:
    """The weight of each objective that is built. UserError if all are 0."""
    weights = {name: getattr(cfg, name, cfg.loss_weights.get(name, 1.0))
               for name in OBJECTIVES[cfg.task]}
    require(any(weights.values()), f"the weights --{', --'.join(weights)} are all 0, so nothing is "
            "learned: set one above 0")
    return {name: weight for name, weight in weights.items() if weight}


class M3AE(Backbone):
    """The backbone and its objectives. An objective of weight 0 is not built and costs nothing."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.loss_weights = loss_weights(cfg)  # `fit` may change them during training
        self.objectives = nn.ModuleDict({name: OBJECTIVES[cfg.task][name](cfg)
                                         for name in self.loss_weights})
        initialise(self)
        if "mim" in self.objectives:           # as MAE and the release start the decoder
            nn.init.normal_(self.objectives["mim"].mask_token, std=0.02)
            for block in self.objectives["mim"].blocks:
                nn.init.xavier_uniform_(block.attn.qkv.weight)

    def encode(self, batch: dict) -> dict[str, Tensor]:
        """What the objectives read, each once: text, masked_text (B, T, D), image (B, 1+L, D)"""
        inputs = {name for objective in self.objectives.values() for name in objective.inputs}
        encoded = {"image": self.encode_image(batch["image"])} if "image" in inputs else {}

        # Both texts in one pass of 2B rows: half as many kernels for a GPU to launch.
        ids = {"text": batch["text_ids"], "masked_text": batch.get("mlm_ids")}  # (B, T) each
        ids = {name: ids[name] for name in ids if name in inputs}
        if ids:
            mask = batch["text_mask"].repeat(len(ids), 1)             # (B | 2B, T)
            texts = self.encode_text(torch.cat([*ids.values()]), mask)  # (B | 2B, T, D)
            encoded |= zip(ids, texts.chunk(len(ids)))
        return encoded

    def forward(self, batch: dict) -> dict:
        """batch: tensors from the loader -> every objective's outputs, and `loss`

        `loss` is the weighted sum. MIM and ITM share one encoding of the text, so also its dropout
        (the release encodes it twice)."""
        encoded = self.encode(batch)
        out = {}
        for objective in self.objectives.values():
            inputs = {name: encoded[name] for name in objective.inputs}
            out.update(objective(self, batch, **inputs))
        out["loss"] = sum(weight * out[f"{name}_loss"]
                          for name, weight in self.loss_weights.items())
        return out
