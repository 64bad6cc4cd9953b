"""Where mlx-lm's modules (0.32.2) compute something else than config.json says:

- YaRN (Peng et al., 2023): the bounds of the interpolation are always rounded, also with `truncate: false` (gpt-oss)
- GPT-NeoX: GELU is always the tanh approximation, also with `hidden_act: gelu` (Pythia)
"""

import math
from typing import Any

import mlx.core as mx
from mlx.nn.layers.activations import gelu

Module = Any  # of mlx.nn, which has no types


def correct(module: Module, config: dict[str, Any]) -> None:
    """Changes a module to what `config`, the contents of its config.json, says."""
    _correct_yarn(module, config)
    if config.get("model_type") == "gpt_neox" and config.get("hidden_act") == "gelu":
        for block in module.layers:
            base = type(block.mlp)
            block.mlp.__class__ = type(base.__name__, (base,), {"__call__": _mlp_with_exact_gelu})


def _mlp_with_exact_gelu(mlp: Module, x: mx.array) -> mx.array:
    y: mx.array = mlp.dense_4h_to_h(gelu(mlp.dense_h_to_4h(x)))
    return y


def _correct_yarn(module: Module, config: dict[str, Any]) -> None:
    from mlx_lm.models.rope_utils import YarnRoPE  # a slow import

    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, dict) or scaling.get("truncate", True):
        return
    theta = config.get("rope_theta") or scaling["rope_theta"]
    for rope in module.modules():
        if isinstance(rope, YarnRoPE):
            rope._freqs = _wavelengths(rope.dims, theta, scaling)


def _wavelengths(width: int, theta: float, scaling: dict[str, Any]) -> mx.array:
    """Positions per radian of each pair: plain up to beta_fast rotations in the original context, times `factor` from
    beta_slow rotations on, with a linear transition of the frequencies over the index of the pair."""

    def pair(rotations: float) -> float:
        """The (fractional) index of the pair that turns so often."""
        original = scaling["original_max_position_embeddings"]
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(pair(scaling.get("beta_fast", 32)), 0), min(pair(scaling.get("beta_slow", 1)), width - 1)
    plain = theta ** (mx.arange(0, width, 2) / width)
    stretched = mx.clip((mx.arange(width // 2) - low) / (high - low), 0, 1)
    frequencies: mx.array = (1 - stretched) / plain + stretched / (scaling["factor"] * plain)
    return 1 / frequencies
