"""Attention, dropout, QuickGELU: the fast paths. Skip this file on a first reading."""
import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None,
              dropout: float = 0.0) -> Tensor:
    """Multi-head attention of q (B, Q, W) over k, v (B, N, W) -> (B, Q, W).

    q, or k and v, may have a batch of 1 while the other has many. mask: bool (B, 1, 1, N), False
    where a key is padding. dropout: share of the attention weights that is set to zero."""
    q, k, v = (split_heads(x, heads) for x in (q, k, v))              # (B, H, Q | N, W/H)
    if fused_is_faster(q, dropout):
        # The fused kernel wants equal batches; an expanded tensor takes no memory.
        q, k, v = (x.expand(max(len(q), len(k)), -1, -1, -1) for x in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout)    # (B, H, Q, W/H)
    else:
        x = drop(attention_weights(q, k, mask), dropout) @ v          # (B, H, Q, W/H)
    return x.transpose(1, 2).flatten(2)                               # (B, Q, W)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """x (B, N, W) -> (B, H, N, W/H)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B, H, Q, W/H), k (B, H, N, W/H) -> attention weights (B, H, Q, N); each row sums to 1."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)          # (B, H, Q, N)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


def fused_is_faster(q: Tensor, dropout: float) -> bool:
    """CPU SDPA has no fused dropout, and is slow in the backward pass in bf16."""
    if q.is_cuda:
        return True
    return not dropout and (q.dtype == torch.float32 or not q.requires_grad)


def drop(x: Tensor, share: float, training: bool = True) -> Tensor:
    """Dropout. On a CPU it draws 16 random bits a number, F.dropout 32: half the time."""
    if x.device.type != "cpu" or not share or not training:
        return F.dropout(x, share, training)
    words = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2 ** 63, None)
    bits = words.view(torch.int16)[:x.numel()].view(x.shape)
    keep = bits >= round(share * 2 ** 16) - 2 ** 15                      # True for 1 - share of all
    return (x * keep).mul_(1 / (1 - share))


def quick_gelu(x: Tensor) -> Tensor:
    """x·σ(1.702x), OpenAI CLIP's activation; so written, backward keeps one tensor."""
    return F.silu(1.702 * x) / 1.702
