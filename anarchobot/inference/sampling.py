"""Samples the next token: repetition penalty, temperature, the method's filter, then a draw.

The penalty and the filters are mlx-lm's. The draw has no random state: it is a function of the logits, the seed and the
token's position in its text. So a text does not depend on the other rows of its batch.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from anarchobot.config.schema import GenerationConfig

PENALTY_WINDOW = 20  # most recent tokens that repetition_penalty applies to


def apply_repetition_penalty(z: mx.array, recent: mx.array, penalty: float) -> mx.array:
    """Divides the logits [1, V] of the ids in `recent` [n] by `penalty`, or multiplies them if negative.

    Keskar et al., 2019: https://arxiv.org/abs/1909.05858
    """
    if penalty == 1:
        return z
    from mlx_lm.sample_utils import make_repetition_penalty  # a slow import

    penalized: mx.array = make_repetition_penalty(penalty, PENALTY_WINDOW)(recent, mx.array(z))  # modifies its argument
    return penalized


def filter_logits(z: mx.array, settings: GenerationConfig) -> mx.array:
    """Applies temperature, then the method's filter, to logits [B, V]. Excluded tokens become -inf."""
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    # mlx-lm filters before applying temperature; temperature first is the common order, as in transformers.
    z = z / settings.temperature
    z = z - mx.logsumexp(z, axis=-1, keepdims=True)
    if settings.method == "top_k" and settings.top_k < z.shape[-1]:
        z = apply_top_k(z, settings.top_k)
    elif settings.method == "nucleus" and settings.top_p < 1:
        top_p: Any = mx.array(settings.top_p)  # a Python number would compile the filter again for each value
        z = apply_top_p(z, top_p)
    elif settings.method == "min_p":
        z = apply_min_p(z, settings.min_p)
    return z


def sample(z: mx.array, settings: Sequence[GenerationConfig], positions: Sequence[int]) -> mx.array:
    """Draws ids [B] from logits [B, V]. `positions` counts the tokens that each row's text already has."""
    if len({_filter_key(s) for s in settings}) == 1:
        return _sample(z, settings[0], [s.seed for s in settings], positions)
    rows = zip(settings, positions, strict=True)
    return mx.concatenate([_sample(z[b : b + 1], s, [s.seed], [position]) for b, (s, position) in enumerate(rows)])


def _sample(z: mx.array, settings: GenerationConfig, seeds: Sequence[int], positions: Sequence[int]) -> mx.array:
    if settings.is_greedy:
        return mx.argmax(z, axis=-1)
    return mx.argmax(filter_logits(z, settings) + _gumbel_noise(z.shape[-1], seeds, positions), axis=-1)


def _gumbel_noise(vocab_size: int, seeds: Sequence[int], positions: Sequence[int]) -> mx.array:
    """Returns Gumbel noise [B, V], keyed by each row's seed and position.

    The argmax of log-probabilities plus Gumbel noise is a sample from those probabilities (Gumbel, 1954).
    """
    keys = mx.array([[position, seed] for position, seed in zip(positions, seeds, strict=True)], mx.uint32)  # [B, 2]
    noise: mx.array = mx.vmap(lambda key: mx.random.gumbel((vocab_size,), key=key))(keys)
    return noise


def _filter_key(settings: GenerationConfig) -> tuple[object, ...]:
    """Rows with equal keys can be filtered in one call."""
    return settings.method, settings.temperature, settings.top_k, settings.top_p, settings.min_p
