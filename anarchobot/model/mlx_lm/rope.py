"""RoPE of mlx-lm's modules where it differs from the models' own (mlx-lm 0.32.2): the bounds of YaRN's interpolation
(Peng et al., 2023) are always rounded, but `truncate: false` says that they are not (gpt-oss)."""

import math
from typing import Any

import mlx.core as mx

Module = Any  # of mlx.nn, which has no types


def correct_rope(module: Module, config: dict[str, Any]) -> None:
    """Recomputes YaRN's frequencies without rounding, if `config`, the contents of config.json, says so."""
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
