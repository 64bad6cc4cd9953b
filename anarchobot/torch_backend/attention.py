"""Causal attention by PyTorch's own kernels, and what comes before it: heads, their norms, their rotation.

Shapes: B batch, L sequence, H query heads, K key/value heads, E head width.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anarchobot.config.schema import ModelConfig

BLOCK_BYTES = 64 << 20  # of float32 scores in a block of queries, where the scores are kept


class Sight(NamedTuple):
    """What the blocks of a pass share: the angles of positions as cos and sin [L, E / 2], float32, and with documents
    side by side who sees whom, bool [B, 1, L, L]; None: every token what came before it. `queries` at a time; None:
    all."""

    cos: Tensor
    sin: Tensor
    seen: Tensor | None = None
    queries: int | None = None


def sight(tokens: Tensor, model: ModelConfig, segments: Tensor | None = None, queries: int | None = None) -> Sight:
    """For tokens [B, L]; `segments` [B, L] number the documents of a row: a token sees its own."""
    rows, length = tokens.shape
    cos, sin = _angles(length, model.head_size, model.rope_theta, tokens.device)
    if queries is None and tokens.device.type == "mps":
        queries = queries_by_memory(rows, length, model)
    if segments is None:
        return Sight(cos, sin, None, queries)
    same = segments[:, None, :, None] == segments[:, None, None, :]  # [B, 1, L, L]
    return Sight(cos, sin, same & _before(0, length, tokens.device), queries)


def queries_by_memory(rows: int, length: int, model: ModelConfig) -> int:
    """Queries whose float32 scores take BLOCK_BYTES. Where PyTorch has no fused kernel with a gradient (MPS), attention
    in one piece would keep all scores of every layer, 4 B H L^2 bytes."""
    return max(32, BLOCK_BYTES // (4 * rows * model.n_heads * length) // 32 * 32)


def attend(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """Causal attention of queries [B, H, L, E] to keys and values [B, K, L, E]: [B, H, L, E].

    By blocks of queries where `sight` says so: each sees the keys up to its own end, and its scores are computed again
    in the backward pass.
    """
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    # Not enable_gqa: kernels that lack it would fall back to one that keeps all scores.
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if sight.queries is None or sight.queries >= length:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sight.seen, is_causal=sight.seen is None)
    outs: list[Tensor] = []
    for start in range(0, length, sight.queries):
        end = min(start + sight.queries, length)
        seen = _before(start, end, q.device) if sight.seen is None else sight.seen[:, :, start:end, :end]
        block = (q[:, :, start:end], k[:, :, :end], v[:, :, :end], seen)
        outs.append(checkpoint(F.scaled_dot_product_attention, *block, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outs, dim=2)


def _before(start: int, end: int, device: torch.device) -> Tensor:
    """bool [end - start, end]: which keys are no later than the queries start..end."""
    return torch.arange(start, end, device=device)[:, None] >= torch.arange(end, device=device)


def turned(x: Tensor, sight: Sight) -> Tensor:
    """Heads [B, H, L, E] rotated by their positions: the halves of a head are pairs, as in Hugging Face's Llama."""
    a, b = x.float().chunk(2, dim=-1)
    turned = torch.cat([a * sight.cos - b * sight.sin, b * sight.cos + a * sight.sin], dim=-1)
    return turned.to(x.dtype)


@lru_cache(maxsize=8)
def _angles(length: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    # In float64, but not on the device: MPS has none.
    angles = np.arange(length)[:, None] * theta ** (-np.arange(0, width, 2) / width)
    cos, sin = (torch.tensor(f(angles).astype(np.float32), device=device) for f in (np.cos, np.sin))
    return cos, sin
