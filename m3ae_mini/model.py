"""The trunk of M³AE, in the order data meets it: patches → ViT, tokens → BERT-style encoder, both → fusion.

Shapes: B rows, L patches of an image, K of them kept, T tokens of a text, N of either, Q that look at them,
D the fusion's width, W a module's own, H heads, P a patch's side, S an image's. Losses: objectives.py."""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .masking import random_masking


def attend(q, k, v, heads, mask=None, dropout=0.0):
    """Multi-head attention of q (B, Q, W) over k, v (B, N, W) -> (B, Q, W); either may have 1 row for all.
    mask: bool (B, 1, 1, N), False where a key is padding. dropout: share of attention weights set to zero."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))      # (B, H, Q | N, W/H)
    if fused_is_faster(q, dropout):
        q, k, v = (x.expand(max(len(q), len(k)), -1, -1, -1) for x in (q, k, v))      # one beside many
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    else:
        x = drop(attention_weights(q, k, mask), dropout) @ v
    return x.transpose(1, 2).flatten(2)                                              # (B, Q, W)


def attention_weights(q, k, mask=None):
    """Who looks where: q (B, H, Q, W/H), k (B, H, N, W/H) -> (B, H, Q, N), each row sums to 1."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                         # (B, H, Q, N)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


def fused_is_faster(q, dropout):
    """On a CPU the fused kernel knows no dropout, and its backward pass is slow in bf16 (README, Speed)."""
    return q.is_cuda or (not dropout and (q.dtype == torch.float32 or not q.requires_grad))


def drop(x, share, training=True):
    """Dropout. On a CPU by 16 random bits a number, where F.dropout draws 32: half the time, less memory."""
    if x.device.type != "cpu" or not share or not training:
        return F.dropout(x, share, training)
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
    keep = bits[:x.numel()].view(x.shape) >= round(share * 2 ** 16) - 2 ** 15   # True for 1 - share of all
    return (x * keep).mul_(1 / (1 - share))


class SelfAttention(nn.Module):
    """Tokens look at each other. One matrix product makes queries, keys and values."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, mask=None, num_queries=None):
        """x (B, N, W) -> (B, N, W), or (B, queries, W): only the first `num_queries` tokens look."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)                                       # (B, N, W) each
        x = attend(q[:, :num_queries], k, v, self.heads, mask, self.dropout if self.training else 0.0)
        return self.out(x)


class CrossAttention(nn.Module):
    """Tokens of one stream look at the other stream."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, other, mask=None):
        """x (B, Q, W), other (B, N, W) -> (B, Q, W); mask says which tokens of `other` are real."""
        k, v = self.kv(other).chunk(2, dim=-1)                                       # (B, N, W) each
        return self.out(attend(self.q(x), k, v, self.heads, mask, self.dropout if self.training else 0.0))

    def weights(self, x, other, mask=None):
        """Where x looks, for images: (B, H, Q, N)."""
        q, k = self.q(x), self.kv(other).chunk(2, dim=-1)[0]
        q, k = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k))   # (B, H, Q | N, W/H)
        return attention_weights(q, k, mask)


def quick_gelu(x):
    """x·σ(1.702x); written so, one tensor is kept for the backward pass, not two"""
    return F.silu(1.702 * x) / 1.702


class ViTBlock(nn.Module):
    """CLIP's block: norm, self-attention, norm, feed-forward with QuickGELU. Image encoder, pixel decoder."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        """x (B, N, W) -> (B, N, W)"""
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(quick_gelu(self.fc1(self.norm2(x))))


class BertLayer(nn.Module):
    """BERT's layer: self-attention, (cross-attention,) GELU feed-forward, a norm after each. Text, fusion."""

    def __init__(self, cfg, width, heads, eps, cross=False):
        super().__init__()
        self.attn = SelfAttention(width, heads, cfg.attn_dropout)
        self.attn_norm = nn.LayerNorm(width, eps=eps)
        self.cross = CrossAttention(width, heads, cfg.attn_dropout) if cross else None
        self.cross_norm = nn.LayerNorm(width, eps=eps) if cross else None
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.fc2_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = cfg.dropout

    def forward(self, x, mask=None, other=None, other_mask=None, num_queries=None):
        """x (B, N, W), and to look at other (B, M, W) -> (B, N, W), or (B, queries, W) for the first alone"""
        how = self.dropout, self.training
        x = self.attn_norm(x[:, :num_queries] + drop(self.attn(x, mask, num_queries), *how))
        if self.cross is not None:
            x = self.cross_norm(x + drop(self.cross(x, other, other_mask), *how))
        return self.fc2_norm(x + drop(self.fc2(F.gelu(self.fc1(x))), *how))


def patchify(image, size):
    """image (B, 3, S, S) -> patches (B, L, 3·size²), in reading order, each flattened row, column, channel"""
    x = image.unflatten(3, (-1, size)).unflatten(2, (-1, size))                      # (B, 3, S/P, P, S/P, P)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)                      # (B, L, 3·P²)


class ViT(nn.Module):
    """The paper's vision encoder, CLIP's ViT. Given `ids_keep`, no block sees the other, hidden patches."""

    def __init__(self, cfg):
        super().__init__()
        width, patches = cfg.vit_width, (cfg.image_size // cfg.patch_size) ** 2
        self.patch_embed = nn.Linear(3 * cfg.patch_size ** 2, width, bias=False)
        self.cls_token = nn.Parameter(torch.empty(width))
        self.pos_embed = nn.Parameter(torch.empty(1 + patches, width))
        self.norm_pre = nn.LayerNorm(width, eps=1e-5)
        self.blocks = nn.ModuleList(ViTBlock(width, cfg.vit_heads) for _ in range(cfg.vit_blocks))
        self.norm_post = nn.LayerNorm(width, eps=1e-5)

    def forward(self, patches, ids_keep=None):
        """patches (B, L, 3·P²), ids_keep: numbers of the visible (B, K) or None for all -> (B, 1+K | 1+L, W)"""
        pos = self.pos_embed[1:]                                                           # (L, W)
        if ids_keep is not None:
            patches = patches.gather(1, ids_keep[..., None].expand(-1, -1, patches.shape[-1]))   # (B, K, 3·P²)
            pos = pos.index_select(0, ids_keep.flatten()).view(*ids_keep.shape, -1)          # (B, K, W)

        x = self.patch_embed(patches) + pos                                                # (B, K | L, W)
        cls = (self.cls_token + self.pos_embed[0]).expand(len(x), 1, -1).to(x.dtype)             # (B, 1, W)
        x = self.norm_pre(torch.cat([cls, x], dim=1))                                # (B, 1+K | 1+L, W)
        for block in self.blocks:
            x = block(x)
        return self.norm_post(x)


class TextEncoder(nn.Module):
    """The paper's language encoder, RoBERTa or BERT: word + position + token type, then post-norm layers."""

    def __init__(self, cfg):
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

    def positions(self, ids):
        """ids (B, T) -> rows of the table of positions (B, T) or (T,). BERT counts from 0; RoBERTa counts the
        tokens that are not padding, from pad_id + 1 on, and gives pad_id to padding."""
        if not self.is_roberta:
            return torch.arange(ids.shape[1], device=ids.device)                     # (T,)
        real = ids.ne(self.pad_id).long()
        return real.cumsum(1) * real + self.pad_id                                   # (B, T)

    def forward(self, ids, mask):
        """ids, mask (B, T), mask 1 where a token is real -> (B, T, W)"""
        x = self.word(ids) + self.position(self.positions(ids)) + self.token_type.weight[0]
        x = drop(self.norm(x), self.dropout, self.training)                          # (B, T, W)
        mask = mask.bool()[:, None, None]                                            # (B, 1, 1, T)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Fusion(nn.Module):
    """The paper's fusion: in a pair of layers both streams read the previous pair's outputs, side by side."""

    def __init__(self, cfg):
        super().__init__()
        size, depth = (cfg.fusion_width, cfg.fusion_heads, 1e-12), cfg.fusion_layers
        self.text_layers = nn.ModuleList(BertLayer(cfg, *size, cross=True) for _ in range(depth))
        self.image_layers = nn.ModuleList(BertLayer(cfg, *size, cross=True) for _ in range(depth))

    def forward(self, text, image, text_mask, depth=None, streams=("text", "image"), num_queries=None):
        """text (B, T, D), image (B, N, D), text_mask (B, T) -> both, after `depth` pairs (default: all). Only
        what somebody reads is computed: the last pair makes the streams in `streams` (the other comes back as
        None), and of those only the first `num_queries` tokens. Depth 0 returns both streams as they came."""
        mask = text_mask.bool()[:, None, None]                                       # (B, 1, 1, T)
        pairs = list(zip(self.text_layers, self.image_layers))[:depth]
        for text_layer, image_layer in pairs[:-1]:
            text, image = text_layer(text, mask, image), image_layer(image, None, text, mask)
        if pairs:
            text_layer, image_layer = pairs[-1]
            text, image = (text_layer(text, mask, image, num_queries=num_queries) if "text" in streams else None,
                           image_layer(image, None, text, mask, num_queries) if "image" in streams else None)
        return text, image


class Backbone(nn.Module):
    """What all objectives share: two encoders, two projections, fusion, two poolers (paper, section 2.1)."""

    def __init__(self, cfg):
        super().__init__()
        cfg.check()
        self.cfg = cfg
        self.vit = ViT(cfg)
        self.text = TextEncoder(cfg)
        self.image_proj = nn.Linear(cfg.vit_width, cfg.fusion_width)
        self.text_proj = nn.Linear(cfg.text_width, cfg.fusion_width)
        self.modality = nn.Parameter(torch.empty(2, cfg.fusion_width))               # row 0 text, row 1 image
        self.fusion = Fusion(cfg)
        self.text_pooler = nn.Linear(cfg.fusion_width, cfg.fusion_width)
        self.image_pooler = nn.Linear(cfg.fusion_width, cfg.fusion_width)

    def encode_image(self, image, noise=None):
        """image (B, 3, S, S), normalised -> (B, 1+L, D), class token first. With noise (B, L), the patches of
        high noise are hidden: -> kept tokens (B, 1+K, D), and ids_restore (B, L), the place of every patch among
        the kept, then the hidden (masking.random_masking)."""
        patches = patchify(image, self.cfg.patch_size)                               # (B, L, 3·P²)
        if noise is None:
            return self.image_proj(self.vit(patches)) + self.modality[1]             # (B, 1+L, D)
        ids_keep, ids_restore = random_masking(noise, self.cfg.mask_ratio)                    # (B, K), (B, L)
        return self.image_proj(self.vit(patches, ids_keep)) + self.modality[1], ids_restore  # (B, 1+K, D), (B, L)

    def encode_text(self, ids, mask):
        """ids, mask (B, T) int64, mask 1 where a token is real -> (B, T, D)"""
        return self.text_proj(self.text(ids, mask)) + self.modality[0]

    def fuse(self, text, image, text_mask, **limits):
        """-> both streams after the last layer; for shapes and `limits` see Fusion.forward"""
        return self.fusion(text, image, text_mask, **limits)

    def pooled_pair(self, text, image, text_mask):
        """text (B, T, D), image (B, N, D) -> the pair's joint feature [text ; image] (B, 2D). Of the last
        layer only token 0 is computed: the poolers read nothing else."""
        text, image = self.fuse(text, image, text_mask, num_queries=1)                   # (B, 1, D) each
        text, image = self.text_pooler(text[:, 0]), self.image_pooler(image[:, 0])   # (B, D) each
        return torch.cat([text, image], dim=-1).tanh()                               # (B, 2D)


def recompute(model):
    """Activation checkpointing: a layer keeps what enters it, the backward pass computes the rest again."""
    for layer in model.modules():
        if isinstance(layer, (ViTBlock, BertLayer)):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@torch.no_grad()
def initialise(model):
    """Initial values: matrices normal, biases 0, norms 1 and 0; the image encoder as CLIP does from scratch.
    The paper's 0.02 suits its width of 768. A narrower model gets more, so that a sub-layer keeps its size
    beside the residual: at width 128 words were then learned nearly twice as fast (one run each)."""
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
    for vector in (vit.cls_token, vit.pos_embed):
        nn.init.normal_(vector, std=width ** -0.5)
    for block in vit.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=width ** -0.5)
        nn.init.normal_(block.attn.out.weight, std=width ** -0.5 * (2 * len(vit.blocks)) ** -0.5)
        nn.init.normal_(block.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.fc2.weight, std=width ** -0.5 * (2 * len(vit.blocks)) ** -0.5)
