"""The frequencies of rotary position embeddings (RoPE; Su et al., 2021), plain or scaled for longer contexts. Does not
import MLX: both backends use it.

Pair i of a head's E rotated elements turns by theta^(-2 i / E) radians per position. model.rope_scaling divides these
frequencies, so that an extended context has the angles that the model was first trained on:

- linear: all of them by `factor` (position interpolation; Chen et al., 2023)
- llama3: those whose wavelength is long compared to the original context (Llama 3.1)
- yarn: those that turn only a few times in the original context; `attention_factor` then sharpens the attention (Peng
  et al., 2023)
- longrope: each by its own factor, with one list up to the original length and one for longer sequences (Ding et al.,
  2024)
"""

import math

import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import ModelConfig, RopeScaling

Float64 = npt.NDArray[np.float64]


def has_local_rope(model: ModelConfig, window: int | None) -> bool:
    """Whether the blocks with this sliding window rotate by model.rope_local_theta, unscaled."""
    return window is not None and model.rope_local_theta is not None


def inverse_frequencies(model: ModelConfig, window: int | None, length: int) -> Float64:
    """Radians per position of each rotated pair [rotary_size / 2], for sequences of `length` tokens in the blocks with
    this sliding window."""
    local, scaling = has_local_rope(model, window), model.rope_scaling
    theta = model.rope_local_theta if local and model.rope_local_theta else model.rope_theta
    inverse: Float64 = theta ** (-np.arange(0, model.rotary_size, 2) / model.rotary_size)
    if local or scaling.type is None:
        return inverse
    if scaling.type == "linear":
        return inverse / scaling.factor
    assert scaling.original_max_seq_len is not None
    if scaling.type == "llama3":
        return _llama3(inverse, scaling, scaling.original_max_seq_len)
    if scaling.type == "yarn":
        return _yarn(inverse, scaling, scaling.original_max_seq_len, theta)
    is_long = length > scaling.original_max_seq_len
    divided: Float64 = inverse / np.array(scaling.long_factor if is_long else scaling.short_factor)
    return divided


def attention_factor(model: ModelConfig, window: int | None) -> float:
    """What rotated queries and keys are multiplied by."""
    scaling = model.rope_scaling
    if has_local_rope(model, window) or scaling.type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    if scaling.type == "yarn":
        return 0.1 * math.log(scaling.factor) + 1
    assert scaling.original_max_seq_len is not None
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_seq_len))


def _llama3(inverse: Float64, scaling: RopeScaling, original: int) -> Float64:
    """Short wavelengths stay, long ones are divided by the factor, and those in between are interpolated."""
    rotations = original * inverse / (2 * math.pi)
    unchanged = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    unchanged = np.clip(unchanged, 0, 1)
    scaled: Float64 = inverse * (unchanged + (1 - unchanged) / scaling.factor)
    return scaled


def _yarn(inverse: Float64, scaling: RopeScaling, original: int, theta: float) -> Float64:
    """Like llama3, but interpolated over the index of the pair instead of its frequency."""
    width = 2 * len(inverse)

    def pair(rotations: float) -> float:
        """The (fractional) index of the pair that turns this often in the original context."""
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    divided = np.clip((np.arange(len(inverse)) - low) / (high - low), 0, 1)
    scaled: Float64 = inverse * (1 - divided + divided / scaling.factor)
    return scaled
