"""The two halves of a transformer block: attention, and a gated MLP, each after a norm and added to its input.

A pure function of its tensors, so that it can be recomputed, and compiled once for all blocks.

Shapes: B batch, L sequence, D d_model.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from anarchobot.config.schema import ModelConfig
from anarchobot.torch_backend.attention import Sight, attend, turned

Params = dict[str, Tensor]
Keep = tuple[Tensor, Tensor]  # bool [B, L, D]: what dropout leaves of each half's output


class BlockForward(Protocol):
    """`block_forward`, or the same compiled."""

    def __call__(
        self, p: Params, x: Tensor, model: ModelConfig, sight: Sight, keep: Keep | None, first_v: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


def block_forward(
    p: Params, x: Tensor, model: ModelConfig, sight: Sight, keep: Keep | None, first_v: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A block's output for `x` [B, L, D], and its values [B, K, L, E]. `p` are its parameters by their names inside it.

    With `first_v`, the first block's values, its own are averaged with them (value residual; Zhou et al., 2024).
    """
    normed = rms_norm(x, p["input_layernorm.weight"], model.norm_eps)
    q, k, v = (_heads(linear(p, f"self_attn.{name}_proj", normed), model) for name in "qkv")
    if first_v is not None:
        v = 0.5 * (v + first_v)
    if model.qk_norm:
        q = rms_norm(q, p["self_attn.q_norm.weight"], model.norm_eps)
        k = rms_norm(k, p["self_attn.k_norm.weight"], model.norm_eps)
    out = attend(turned(q, sight), turned(k, sight), v, sight).transpose(1, 2).flatten(2)  # [B, L, H E]
    x = x + _kept(linear(p, "self_attn.o_proj", out), model, keep and keep[0])
    normed = rms_norm(x, p["post_attention_layernorm.weight"], model.norm_eps)
    gate, up = linear(p, "mlp.gate_proj", normed), linear(p, "mlp.up_proj", normed)
    gated = F.silu(gate) if model.ffn_activation == "silu" else F.gelu(gate, approximate="tanh")
    return x + _kept(linear(p, "mlp.down_proj", gated * up), model, keep and keep[1]), v


def linear(p: Params, name: str, x: Tensor) -> Tensor:
    """x W^T, plus the bias where there is one, in autocast's dtype."""
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in x's dtype; sums in float32."""
    with torch.autocast(x.device.type, enabled=False):  # which would keep a float32 copy of x for the backward pass
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def _heads(x: Tensor, model: ModelConfig) -> Tensor:
    """[B, L, H E] -> [B, H, L, E]."""
    return x.reshape(*x.shape[:2], -1, model.head_size).transpose(1, 2)


def _kept(x: Tensor, model: ModelConfig, keep: Tensor | None) -> Tensor:
    return x if keep is None else torch.where(keep, x * (1 / (1 - model.dropout)), 0)
