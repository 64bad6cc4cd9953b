"""The Llama family in PyTorch: a function of a flat dict of tensors under Hugging Face's names.

Master weights are float32; matrix products are in autocast's dtype, and so are the hidden states between the blocks.

Shapes: B batch, L sequence, D d_model, H query heads, K key/value heads, E head width.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anarchobot.config.schema import ModelConfig
from anarchobot.model.llama.rope import attention_factor, inverse_frequencies
from anarchobot.model.parameters import by_block

MPS_BLOCK_BYTES = 64 << 20  # of float32 attention scores in a block of queries
Params = dict[str, Tensor]
KeepMasks = tuple[Tensor, Tensor]  # bool [B, L, D]: which elements of each half's output dropout keeps


class AttentionContext(NamedTuple):
    """Shared by the blocks of a pass that have the same sliding window: cos and sin of the positions' angles
    [L, rotary_size / 2], float32; what scores are multiplied by (None: 1 / sqrt(E)); with several documents in a row or
    a window, which keys a query may see, bool [B or 1, 1, L, L] (None: causal); the queries per block (None: all); and
    whether the backward pass recomputes the scores of such a block."""

    cos: Tensor
    sin: Tensor
    scale: float | None
    mask: Tensor | None = None
    block_size: int | None = None
    recompute_scores: bool = True


# The type of `block_forward`, compiled or not.
BlockForward = Callable[[Params, Tensor, ModelConfig, AttentionContext, KeepMasks | None], Tensor]


def block_forward(
    p: Params,
    x: Tensor,
    model: ModelConfig,
    context: AttentionContext,
    keep: KeepMasks | None,
) -> Tensor:
    """A block's output for `x` [B, L, D]. `p` are its parameters by their names inside it. A pure function of its
    tensors, so that it can be recomputed, and compiled once for all blocks."""
    normed = rms_norm(x, p["input_layernorm.weight"], model.norm_eps)
    q, k, v = (_heads(linear(p, f"self_attn.{name}_proj", normed), model) for name in "qkv")
    if model.qk_norm:
        q = rms_norm(q, p["self_attn.q_norm.weight"], model.norm_eps)
        k = rms_norm(k, p["self_attn.k_norm.weight"], model.norm_eps)
    out = (
        attention(apply_rope(q, context), apply_rope(k, context), v, context).transpose(1, 2).flatten(2)
    )  # [B, L, H E]
    out = linear(p, "self_attn.o_proj", out)
    if model.post_norms:
        out = rms_norm(out, p["attention_output_layernorm.weight"], model.norm_eps)
    x = x + _dropout(out, model, keep and keep[0])
    normed = rms_norm(x, p["post_attention_layernorm.weight"], model.norm_eps)
    gate, up = linear(p, "mlp.gate_proj", normed), linear(p, "mlp.up_proj", normed)
    gated = F.silu(gate) if model.ffn_activation == "silu" else F.gelu(gate, approximate="tanh")
    out = linear(p, "mlp.down_proj", gated * up)
    if model.post_norms:
        out = rms_norm(out, p["mlp_output_layernorm.weight"], model.norm_eps)
    return x + _dropout(out, model, keep and keep[1])


@dataclass(frozen=True)
class StepOptions:
    """Options of a forward and backward pass; they change the results only by rounding.

    `recompute`: save only each block's input and run its forward pass again (gradient checkpointing; Chen et al.,
    2016). `attention_block`: queries per block; None: by device. `loss_chunk`: tokens per chunk of the head. `block`:
    the block's forward pass, compiled or not.
    """

    recompute: bool = False
    attention_block: int | None = None
    loss_chunk: int = 256
    block: BlockForward = block_forward


def hidden_states(
    params: Params,
    tokens: Tensor,
    model: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    segments: Tensor | None = None,
    dropout_key: str | None = None,
    options: StepOptions = StepOptions(),
) -> Tensor:
    """Returns the final hidden states [B, L, D], normalized and in `dtype`, for integer `tokens` [B, L].

    `segments` [B, L] number the documents of a row: a token sees only its own. `dropout_key` turns dropout on; the same
    key drops the same elements.
    """
    contexts = {
        # A recomputed transformer block saves the scores of one layer only, so they need not be recomputed once more.
        window: attention_context(tokens, model, segments, options.attention_block, window)._replace(
            recompute_scores=not options.recompute
        )
        for window in set(model.windows)
    }

    def run(p: Params, x: Tensor, i: int) -> Tensor:
        # The masks are drawn here from a key, so that a recomputed block drops the same elements; the state of a
        # generator, which `checkpoint` could restore, is not readable on every device.
        keep = None if dropout_key is None else _keep_masks(x, model, f"{dropout_key}/{i}")
        return options.block(p, x, model, contexts[model.windows[i]], keep)

    with torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype != torch.float32):
        x = F.embedding(tokens, params["model.embed_tokens.weight"])
        x = (x if model.embedding_scale is None else x * model.embedding_scale).to(dtype)
        for i, p in enumerate(by_block(params, model)):
            if options.recompute and torch.is_grad_enabled():
                x = checkpoint(run, p, x, i, use_reentrant=False, preserve_rng_state=False)
            else:
                x = run(p, x, i)
        return rms_norm(x, params["model.norm.weight"], model.norm_eps)


def head_name(model: ModelConfig) -> str:
    """The name of the output head's weight [V, D]: the token embedding if they are tied."""
    return "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"


def linear(p: Params, name: str, x: Tensor) -> Tensor:
    """x W^T, plus the bias if there is one, in autocast's dtype, for `x` [B, L, columns of W]."""
    # In two dimensions: with three, MPS computes wrong products on M5 in half precision until PyTorch 2.12 (pytorch
    # issue 180776), and on all chips with a bias and more than 65,536 rows (189495).
    y = F.linear(x.flatten(0, 1), p[f"{name}.weight"], p.get(f"{name}.bias"))
    return y.reshape(*x.shape[:2], -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in x's dtype; sums in float32."""
    with torch.autocast(x.device.type, enabled=False):  # which would save a float32 copy of x for the backward pass
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def attention_context(
    tokens: Tensor,
    model: ModelConfig,
    segments: Tensor | None = None,
    block_size: int | None = None,
    window: int | None = None,
) -> AttentionContext:
    """For tokens [B, L] and the blocks with this sliding window; `segments` [B, L] number the documents of a row: a
    token sees only its own."""
    rows, length = tokens.shape
    inverse = tuple(inverse_frequencies(model, window, length))
    cos, sin = _angles(length, inverse, attention_factor(model, window), tokens.device)
    if block_size is None and tokens.device.type == "mps":
        block_size = block_size_by_memory(rows, length, model)
    if segments is None and (window is None or window >= length):
        return AttentionContext(cos, sin, model.attention_scale, None, block_size)
    mask = _causal(0, length, tokens.device, window)[None, None]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return AttentionContext(cos, sin, model.attention_scale, mask, block_size)


def block_size_by_memory(rows: int, length: int, model: ModelConfig) -> int:
    """Queries whose float32 scores take MPS_BLOCK_BYTES. Where PyTorch has no fused kernel with a gradient (MPS),
    attention in one piece would save all scores of every layer, 4 B H L^2 bytes."""
    return max(32, MPS_BLOCK_BYTES // (4 * rows * model.n_heads * length) // 32 * 32)


def attention(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """Causal attention of queries [B, H, L, E] to keys and values [B, K, L, E]: [B, H, L, E].

    In blocks of queries if the context says so: each sees the keys up to its own end.
    """
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    # Not enable_gqa: devices without a kernel for it would fall back to one that saves all scores.
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if context.block_size is None or context.block_size >= length:
        causal = context.mask is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask, is_causal=causal, scale=context.scale)
    outs: list[Tensor] = []
    for start in range(0, length, context.block_size):
        end = min(start + context.block_size, length)
        mask = _causal(start, end, q.device) if context.mask is None else context.mask[:, :, start:end, :end]
        block = (q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask)
        attend = partial(F.scaled_dot_product_attention, scale=context.scale)
        if context.recompute_scores:
            out = checkpoint(attend, *block, use_reentrant=False, preserve_rng_state=False)
        else:
            out = attend(*block)
        outs.append(out)
    return torch.cat(outs, dim=2)


def apply_rope(x: Tensor, context: AttentionContext) -> Tensor:
    """Rotates the first part of heads [B, H, L, E] by their positions; its halves are pairs, as in Hugging Face's
    Llama."""
    width = 2 * context.cos.shape[-1]
    a, b = x[..., :width].float().chunk(2, dim=-1)
    rotated = torch.cat([a * context.cos - b * context.sin, b * context.cos + a * context.sin], dim=-1).to(x.dtype)
    return rotated if width == x.shape[-1] else torch.cat([rotated, x[..., width:]], dim=-1)


def try_compile(block: BlockForward, try_out: Callable[[BlockForward], object]) -> tuple[BlockForward, str | None]:
    """Returns the compiled block after a trial run via `try_out`; if that fails, the block itself and a warning. A
    compiler may be missing (Triton, C++), or not support an operation on this device.

    One block is compiled, not the whole model: all blocks share it, and it takes seconds instead of minutes.
    """
    try:
        compiled: BlockForward = torch.compile(block, dynamic=False)
        try_out(compiled)
    except Exception as error:  # compiler errors have no common class
        reason, *_ = [line for line in str(error).splitlines() if line.strip()] or [""]
        why = f"{type(error).__name__}: {reason.strip()}"
        return block, f"train.compile: PyTorch cannot compile on this machine; the step runs uncompiled ({why})"
    return compiled, None


def _causal(start: int, end: int, device: torch.device, window: int | None = None) -> Tensor:
    """Returns the mask, bool [end - start, end], of the keys that queries start..end may see: the last `window`."""
    queries, keys = torch.arange(start, end, device=device)[:, None], torch.arange(end, device=device)
    return queries >= keys if window is None else (queries >= keys) & (queries < keys + window)


@lru_cache(maxsize=8)
def _angles(length: int, inverse: tuple[float, ...], factor: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles [L, pairs], times `factor`, given the pairs' radians per position."""
    # In float64, which MPS lacks, so not on the device.
    angles = np.arange(length)[:, None] * np.array(inverse)
    cos, sin = (torch.tensor((factor * f(angles)).astype(np.float32), device=device) for f in (np.cos, np.sin))
    return cos, sin


def _heads(x: Tensor, model: ModelConfig) -> Tensor:
    """[B, L, H E] -> [B, H, L, E]."""
    return x.reshape(*x.shape[:2], -1, model.head_size).transpose(1, 2)


def _dropout(x: Tensor, model: ModelConfig, keep: Tensor | None) -> Tensor:
    return x if keep is None else torch.where(keep, x * (1 / (1 - model.dropout)), 0)


def _keep_masks(x: Tensor, model: ModelConfig, key: str) -> KeepMasks | None:
    """The masks depend only on the key."""
    if model.dropout == 0:
        return None
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
    generator = torch.Generator(x.device).manual_seed(seed)
    first, second = (torch.rand(x.shape, generator=generator, device=x.device) >= model.dropout for _ in range(2))
    return first, second
