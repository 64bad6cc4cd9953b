"""Which token comes next: the repetition penalty, then the temperature, then the method's filter, then the draw.

The penalty and the filters are mlx-lm's. The draw has no random state: it is a function of the logits, the seed and the
token's place in its text, so that a text is the same in any company, and sampling disturbs nothing.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from anarchobot.config.schema import GenerationConfig

PENALTY_WINDOW = 20  # tokens that repetition_penalty looks back


def penalised(z: mx.array, recent: mx.array, penalty: float) -> mx.array:
    """Logits [1, V] with those of the ids `recent` [n] made smaller: divided by `penalty`, multiplied if negative
    (Keskar et al., 2019)."""
    if penalty == 1:
        return z
    from mlx_lm.sample_utils import make_repetition_penalty  # late: the package takes seconds to import

    lowered: mx.array = make_repetition_penalty(penalty, PENALTY_WINDOW)(recent, mx.array(z))  # it writes into it
    return lowered


def filtered(z: mx.array, settings: GenerationConfig) -> mx.array:
    """Logits [B, V] of the tokens that may be drawn, by the temperature and then the method; -inf for all others."""
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    # mlx-lm filters before its temperature; dividing first is the field's order (as in transformers).
    z = z / settings.temperature
    z = z - mx.logsumexp(z, axis=-1, keepdims=True)
    if settings.method == "top_k" and settings.top_k < z.shape[-1]:
        z = apply_top_k(z, settings.top_k)
    elif settings.method == "nucleus" and settings.top_p < 1:
        top_p: Any = mx.array(settings.top_p)  # a number would be compiled into the filter, each anew
        z = apply_top_p(z, top_p)
    elif settings.method == "min_p":
        z = apply_min_p(z, settings.min_p)
    return z


def draw(z: mx.array, settings: Sequence[GenerationConfig], places: Sequence[int]) -> mx.array:
    """Ids [B] drawn from logits [B, V], each row by its own settings; `places`: how many tokens its text has so far."""
    if len({_how(s) for s in settings}) == 1:
        return _draw(z, settings[0], [s.seed for s in settings], places)
    rows = zip(settings, places, strict=True)
    return mx.concatenate([_draw(z[b : b + 1], s, [s.seed], [place]) for b, (s, place) in enumerate(rows)])


def _draw(z: mx.array, settings: GenerationConfig, seeds: Sequence[int], places: Sequence[int]) -> mx.array:
    if settings.method == "greedy":
        return mx.argmax(z, axis=-1)
    return mx.argmax(filtered(z, settings) + _noise(z.shape[-1], seeds, places), axis=-1)


def _noise(size: int, seeds: Sequence[int], places: Sequence[int]) -> mx.array:
    """[B, V] of Gumbel's distribution: the place of the largest sum of log-probability and noise is a draw from those
    probabilities (Gumbel, 1954). A row's key is its seed and its place."""
    keys = mx.array([[place, seed] for place, seed in zip(places, seeds, strict=True)], mx.uint32)  # [B, 2]
    noise: mx.array = mx.vmap(lambda key: mx.random.gumbel((size,), key=key))(keys)
    return noise


def _how(settings: GenerationConfig) -> tuple[object, ...]:
    """What rows must have in common to be filtered together."""
    return settings.method, settings.temperature, settings.top_k, settings.top_p, settings.min_p
