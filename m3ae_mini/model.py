"""The backbone of M³AE: image encoder (ViT), text encoder (BERT-style), fusion.

Shapes: B samples, L patches of an image, K of them visible, T tokens of a text, N tokens of either,
Q queries, D the fusion's width, W a module's own width, H heads, P a patch's side, S an image's
side; (B, K | L) is (B, K) or (B, L), and () a scalar. Losses: objectives.py."""
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import ModelConfig
from .masking import random_masking
from .ops import attention, attention_weights, drop, quick_gelu, split_heads


# ------------------------------------------------------------------------------------------- layers

class SelfAttention(nn.Module):
    """Tokens attend to each other. One matrix product makes queries, keys and values."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None,
                num_queries: int | None = None) -> Tensor:
        """x (B, N, W) -> (B, N, W), or (B, num_queries, W) for the first `num_queries` tokens"""
        q, k, v = self.qkv(x).chunk(3, dim=-1)                        # (B, N, W) each
        dropout = self.dropout if self.training else 0.0
        return self.out(attention(q[:, :num_queries], k, v, self.heads, mask, dropout))


class CrossAttention(nn.Module):
    """Tokens of one stream attend to the other stream."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, Q, W), other (B, N, W) -> (B, Q, W); mask: False at padding of `other`"""
        k, v = self.kv(other).chunk(2, dim=-1)                        # (B, N, W) each
        dropout = self.dropout if self.training else 0.0
        return self.out(attention(self.q(x), k, v, self.heads, mask, dropout))

    def weights(self, x: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
        """The attention weights of `forward`, for plots: (B, H, Q, N)."""
        q, k = self.q(x), self.kv(other).chunk(2, dim=-1)[0]          # (B, Q | N, W)
        return attention_weights(split_heads(q, self.heads), split_heads(k, self.heads), mask)


class ViTBlock(nn.Module):
    """CLIP's pre-norm block, for image encoder and pixel decoder. act: quick_gelu or gelu."""

    def __init__(self, width: int, heads: int, act: str = "quick_gelu"):
        super().__init__()
        self.act = act
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, W) -> (B, N, W)"""
        x = x + self.attn(self.norm1(x))
        act = quick_gelu if self.act == "quick_gelu" else F.gelu
        return x + self.fc2(act(self.fc1(self.norm2(x))))


class BertLayer(nn.Module):
    """BERT's post-norm layer, with cross-attention in the fusion."""

    def __init__(self, cfg: ModelConfig, width: int, heads: int, eps: float, cross: bool = False):
        super().__init__()
        self.attn = SelfAttention(width, heads, cfg.attn_dropout)
        self.attn_norm = nn.LayerNorm(width, eps=eps)
        self.cross = CrossAttention(width, heads, cfg.attn_dropout) if cross else None
        self.cross_norm = nn.LayerNorm(width, eps=eps) if cross else None
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.fc2_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = cfg.dropout

    def forward(self, x: Tensor, mask: Tensor | None = None, other: Tensor | None = None,
                other_mask: Tensor | None = None, num_queries: int | None = None) -> Tensor:
        """x (B, N, W), other (B, M, W) to cross-attend to -> (B, N, W), or (B, num_queries, W)

        Masks are bool (B, 1, 1, N | M), False where a token is padding."""
        residual = x[:, :num_queries]
        update = drop(self.attn(x, mask, num_queries), self.dropout, self.training)
        x = self.attn_norm(residual + update)
        if self.cross is not None:
            update = drop(self.cross(x, other, other_mask), self.dropout, self.training)
            x = self.cross_norm(x + update)
        update = drop(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training)
        return self.fc2_norm(x + update)


# ------------------------------------------------------------------------------------ image encoder

def patchify(image: Tensor, size: int) -> Tensor:
    """image (B, 3, S, S) -> patches (B, L, 3·size²), row by row, channels last"""
    x = image.unflatten(3, (-1, size)).unflatten(2, (-1, size))       # (B, 3, S/P, P, S/P, P)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)       # (B, L, 3·P²)


class ViT(nn.Module):
    """The paper's vision encoder, CLIP's ViT. Given ids_keep, it sees only those patches."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        width, num_patches = cfg.vit_width, (cfg.image_size // cfg.patch_size) ** 2
        self.patch_embed = nn.Linear(3 * cfg.patch_size ** 2, width, bias=False)
        self.cls_token = nn.Parameter(torch.empty(width))
        self.pos_embed = nn.Parameter(torch.empty(1 + num_patches, width))
        self.norm_pre = nn.LayerNorm(width, eps=1e-5)
        self.blocks = nn.ModuleList(ViTBlock(width, cfg.vit_heads, cfg.vit_act)
                                    for _ in range(cfg.vit_blocks))
        self.norm_post = nn.LayerNorm(width, eps=1e-5)

    def forward(self, patches: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """patches (B, L, 3·P²), ids_keep (B, K) or None for all -> (B, 1+K | 1+L, W)"""
        # Drop the hidden patches, and the position embeddings that belong to them.
        pos_embed = self.pos_embed[1:]                                # (L, W)
        if ids_keep is not None:
            index = ids_keep[..., None].expand(-1, -1, patches.shape[-1])
            patches = patches.gather(1, index)                        # (B, K, 3·P²)
            pos_embed = pos_embed.index_select(0, ids_keep.flatten())
            pos_embed = pos_embed.view(*ids_keep.shape, -1)           # (B, K, W)

        # Embed the patches; the class token goes first.
        x = self.patch_embed(patches) + pos_embed                     # (B, K | L, W)
        cls_token = (self.cls_token + self.pos_embed[0]).expand(len(x), 1, -1)  # (B, 1, W)
        x = torch.cat([cls_token.to(x.dtype), x], dim=1)              # (B, 1+K | 1+L, W)

        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return self.norm_post(x)


# ------------------------------------------------------------------------------------- text encoder

class TextEncoder(nn.Module):
    """The paper's language encoder, RoBERTa or BERT."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.is_roberta = cfg.text_kind == "roberta"
        self.pad_id, eps = (1, 1e-5) if self.is_roberta else (0, 1e-12)
        self.word = nn.Embedding(cfg.vocab_size, cfg.text_width)
        self.position = nn.Embedding(cfg.text_max_positions, cfg.text_width)
        self.token_type = nn.Embedding(1 if self.is_roberta else 2, cfg.text_width)
        self.norm = nn.LayerNorm(cfg.text_width, eps=eps)
        self.dropout = cfg.dropout
        self.layers = nn.ModuleList(BertLayer(cfg, cfg.text_width, cfg.text_heads, eps)
                                    for _ in range(cfg.text_layers))

    def positions(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> indices of the position embedding (B, T) or (T,).

        BERT counts from 0. RoBERTa counts real tokens from pad_id + 1, and gives padding pad_id."""
        if not self.is_roberta:
            return torch.arange(ids.shape[1], device=ids.device)      # (T,)
        real = ids.ne(self.pad_id).long()
        return real.cumsum(1) * real + self.pad_id                    # (B, T)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, T), mask 1 where a token is real -> (B, T, W)"""
        x = self.word(ids) + self.position(self.positions(ids)) + self.token_type.weight[0]
        x = drop(self.norm(x), self.dropout, self.training)           # (B, T, W)
        mask = mask.bool()[:, None, None]                             # (B, 1, 1, T)
        for layer in self.layers:
            x = layer(x, mask)
        return x


# ------------------------------------------------------------------------------------------- fusion

class Fusion(nn.Module):
    """The paper's fusion: in each layer both streams attend to the other's previous outputs.

    To try another fusion, write another class of this name. The rest of the code asks this of it:
    - forward takes text (B, T, D), image (B, N, D), text_mask (B, T) and returns both streams in
      the same shapes. Padding, where text_mask is 0, must not change any other output, and no row
      of the batch may change another.
    - Either side may have a batch of 1: retrieval scores one image with many texts.
    - It must accept depth, streams and num_queries, but may ignore them and return both streams
      whole: they only save work. (Without depth, pixels are decoded after the last layer.)
    - attention_map may be left out: then `finetune.py --predict` draws none."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        args, layers = (cfg.fusion_width, cfg.fusion_heads, 1e-12), range(cfg.fusion_layers)
        self.text_layers = nn.ModuleList(BertLayer(cfg, *args, cross=True) for _ in layers)
        self.image_layers = nn.ModuleList(BertLayer(cfg, *args, cross=True) for _ in layers)

    def forward(self, text: Tensor, image: Tensor, text_mask: Tensor, depth: int | None = None,
                streams: tuple[str, ...] = ("text", "image"),
                num_queries: int | None = None) -> tuple[Tensor | None, Tensor | None]:
        """text (B, T, D), image (B, N, D), text_mask (B, T) -> both, after `depth` layers

        The last layer computes only what is read: the streams named in `streams` (the other is
        returned as None), and of those the first `num_queries` tokens. Depth 0 returns both streams
        unchanged."""
        mask = text_mask.bool()[:, None, None]                        # (B, 1, 1, T)
        depth = len(self.text_layers) if depth is None else depth

        for i in range(depth):
            # Only the last layer may leave out what no later step reads.
            wanted, queries = ("text", "image"), None
            if i == depth - 1:
                wanted, queries = streams, num_queries
            # Both layers read the streams as the previous layer left them.
            new_text = new_image = None
            if "text" in wanted:
                new_text = self.text_layers[i](text, mask, image, None, queries)  # (B, T | Q, D)
            if "image" in wanted:
                new_image = self.image_layers[i](image, None, text, mask, queries)  # (B, N | Q, D)
            text, image = new_text, new_image
        return text, image

    def attention_map(self, text: Tensor, image: Tensor, text_mask: Tensor) -> Tensor:
        """text (B, T, D), image (B, N, D) -> attention of text to image tokens (B, T, N)

        Of the last layer, the mean of its heads. For plots."""
        text, image = self(text, image, text_mask, depth=len(self.text_layers) - 1)
        layer, mask = self.text_layers[-1], text_mask.bool()[:, None, None]
        text = layer.attn_norm(text + layer.attn(text, mask))         # (B, T, D)
        return layer.cross.weights(text, image).mean(1)               # (B, T, N)


# ----------------------------------------------------------------------------------------- backbone

class Backbone(nn.Module):
    """What all objectives share: encoders, projections, fusion, poolers (paper, section 2.1)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        cfg.check()
        self.cfg = cfg
        self.mask_ratio = cfg.mask_ratio                       # `fit` may change it during training
        self.vit = ViT(cfg)
        self.text = TextEncoder(cfg)
        self.image_proj = nn.Linear(cfg.vit_width, cfg.fusion_width)
        self.text_proj = nn.Linear(cfg.text_width, cfg.fusion_width)
        self.modality = nn.Parameter(torch.empty(2, cfg.fusion_width))     # row 0 text, row 1 image
        self.fusion = Fusion(cfg)
        self.text_pooler = nn.Linear(cfg.fusion_width, cfg.fusion_width)
        self.image_pooler = nn.Linear(cfg.fusion_width, cfg.fusion_width)

    def encode_image(self, image: Tensor) -> Tensor:
        """image (B, 3, S, S), normalised -> (B, 1+L, D), class token first"""
        patches = patchify(image, self.cfg.patch_size)                # (B, L, 3·P²)
        return self.image_proj(self.vit(patches)) + self.modality[1]  # (B, 1+L, D)

    def encode_visible(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Encode the visible patches: image (B, 3, S, S), noise (B, L).

        Patches of the highest noise are hidden. Returns visible tokens (B, 1+K, D), class token
        first, and ids_restore (B, L): the position of every patch in [visible ; hidden]
        (masking.random_masking)."""
        patches = patchify(image, self.cfg.patch_size)                # (B, L, 3·P²)
        mask_ratio = self.mask_ratio if self.training else self.cfg.mask_ratio
        ids_keep, ids_restore = random_masking(noise, mask_ratio)     # (B, K), (B, L)
        visible = self.image_proj(self.vit(patches, ids_keep)) + self.modality[1]  # (B, 1+K, D)
        return visible, ids_restore

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, T) int64, mask 1 where a token is real -> (B, T, D)"""
        return self.text_proj(self.text(ids, mask)) + self.modality[0]

    def fuse(self, text: Tensor, image: Tensor, text_mask: Tensor, **limits) -> tuple:
        """Fuse text and image; see Fusion.forward for shapes and `limits`."""
        if limits.get("depth") == 0:                                 # depth 0: MIM passes text=None
            return text, image
        return self.fusion(text, image, text_mask, **limits)

    def pooled_pair(self, text: Tensor, image: Tensor, text_mask: Tensor) -> Tensor:
        """text (B, T, D), image (B, N, D) -> the pair's pooled feature [text ; image] (B, 2D).

        The poolers read token 0 alone, so the last layer computes nothing else."""
        text, image = self.fuse(text, image, text_mask, num_queries=1)  # (B, 1, D) each
        text, image = self.text_pooler(text[:, 0]), self.image_pooler(image[:, 0])  # (B, D) each
        return torch.cat([text, image], dim=-1).tanh()                # (B, 2D)


def compile_layers(model: nn.Module) -> None:
    """torch.compile for the layers. They share their code, so each kind is compiled once, however
    deep the model; the whole model took minutes. Call it before use_grad_checkpointing."""
    torch._dynamo.config.recompile_limit = 64      # kinds of layer, training or not, masked or not
    for layer in model.modules():
        if isinstance(layer, (ViTBlock, BertLayer)):
            layer.forward = torch.compile(layer.forward, dynamic=True)


def use_grad_checkpointing(model: nn.Module) -> None:
    """Keep only what enters each layer; the backward pass computes the rest again."""
    for layer in model.modules():
        if isinstance(layer, (ViTBlock, BertLayer)):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@torch.no_grad()
def initialise(model: Backbone) -> None:
    """Initial values: matrices normal, biases 0; the image encoder as CLIP from scratch.

    The paper's 0.02 suits its width of 768. A narrower model gets more, so that a sub-layer's
    output stays as large relative to the residual: at width 128 words were then learned nearly
    twice as fast (one run each)."""
    std = 0.02 * (768 / model.cfg.fusion_width) ** 0.5
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.normal_(model.modality, std=0.02)

    vit, width = model.vit, model.cfg.vit_width
    residual = (2 * len(vit.blocks)) ** -0.5          # smaller, the more blocks add to the residual
    nn.init.normal_(vit.cls_token, std=width ** -0.5)
    nn.init.normal_(vit.pos_embed, std=width ** -0.5)
    for block in vit.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=width ** -0.5)
        nn.init.normal_(block.attn.out.weight, std=width ** -0.5 * residual)
        nn.init.normal_(block.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.fc2.weight, std=width ** -0.5 * residual)
