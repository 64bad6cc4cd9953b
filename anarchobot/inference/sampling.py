"""Samples the next token: penalties, temperature, filters, then a draw.

The draw has no random state: it is a function of the logits, the seed and the token's position in its text. So a text
does not depend on the other rows of its batch.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from anarchobot.config.schema import GenerationConfig

PENALTY_WINDOW = 20  # most recent tokens that repetition_penalty applies to, as in mlx-lm


class Penalties:
    """Lowers the logits of the tokens that a text already has.

    repetition_penalty counts the last tokens of prompt and answer (Keskar et al., 2019:
    https://arxiv.org/abs/1909.05858), presence_penalty and frequency_penalty all tokens of the answer, as OpenAI's do.
    """

    def __init__(self, settings: GenerationConfig, context: list[int], vocab_size: int) -> None:
        self._repetition, self._presence = settings.repetition_penalty, settings.presence_penalty
        self._frequency = settings.frequency_penalty
        self._recent = mx.array(context[-PENALTY_WINDOW:]) if self._repetition != 1 else None
        self._counts = mx.zeros(vocab_size) if self._presence or self._frequency else None  # [V]

    def __bool__(self) -> bool:
        """Whether they change anything."""
        return self._recent is not None or self._counts is not None

    def apply(self, z: mx.array) -> mx.array:
        """Logits [1, V]."""
        if self._recent is not None:
            from mlx_lm.sample_utils import make_repetition_penalty  # a slow import

            z = make_repetition_penalty(self._repetition, PENALTY_WINDOW)(self._recent, mx.array(z))  # modifies z
        if self._counts is not None:
            z = z - self._frequency * self._counts - self._presence * (self._counts > 0)
        return z

    def add(self, token: mx.array) -> None:
        """Adds a token [1] to the text; it may still be being computed."""
        if self._recent is not None:
            self._recent = mx.concatenate([self._recent, token])[-PENALTY_WINDOW:]
        if self._counts is not None:
            self._counts = self._counts.at[token].add(1)


class TokenScores(NamedTuple):
    """The log-probability of a sampled token, and the ids [k] and log-probabilities [k] of the most likely tokens at
    its position, the most likely first. They are the model's: before penalties, temperature and filters."""

    logprob: mx.array
    top_ids: mx.array
    top_logprobs: mx.array

    @classmethod
    def of(cls, z: mx.array, token: mx.array, k: int) -> "TokenScores":
        """From logits [V]."""
        logprobs = z - mx.logsumexp(z)
        top = mx.argsort(-logprobs)[:k]
        return cls(logprobs[token], top, logprobs[top])


def sample(z: mx.array, settings: Sequence[GenerationConfig], positions: Sequence[int]) -> mx.array:
    """Draws ids [B] from logits [B, V]. `positions` counts the tokens that each row's text already has."""
    greedy = mx.argmax(z, axis=-1)
    if all(s.is_greedy for s in settings):
        return greedy
    noise = _gumbel_noise(z.shape[-1], [s.seed for s in settings], positions)
    drawn = mx.argmax(filter_logits(z, settings) + noise, axis=-1)
    return mx.where(mx.array([s.is_greedy for s in settings]), greedy, drawn)


def filter_logits(z: mx.array, settings: Sequence[GenerationConfig]) -> mx.array:
    """Applies each row's temperature, then its top_k, then its top_p to what is left, then its min_p, to logits [B, V].
    Excluded tokens become -inf.

    Each filter is a minimum of the log-probabilities. Rows without a filter are not changed by those of the others.
    """
    z = z / _column([1.0 if s.is_greedy else s.temperature for s in settings])
    z = z - mx.logsumexp(z, axis=-1, keepdims=True)
    filters, vocab_size = [s.filters for s in settings], z.shape[-1]
    lowest = z.max(axis=-1, keepdims=True) + mx.log(_column([min_p for _, _, min_p in filters]))
    counts = [min(top_k or vocab_size, vocab_size) for top_k, _, _ in filters]
    if min(counts) < vocab_size or any(top_p < 1 for _, top_p, _ in filters):
        ranked = z if max(counts) == vocab_size else mx.topk(z, max(counts), axis=-1)
        ranked = -mx.sort(-ranked, axis=-1)
        in_top_k = mx.arange(ranked.shape[-1]) < _column(counts)
        p = mx.where(in_top_k, mx.exp(ranked), 0)
        before = mx.cumsum(p, axis=-1, inclusive=False)  # the probability of all tokens that rank higher
        total = before[:, -1:] + p[:, -1:]
        share = _column([top_p if top_p < 1 else 2.0 for _, top_p, _ in filters])  # rounding must exclude no token
        kept = (in_top_k & (before < share * total)).sum(axis=-1, keepdims=True)
        lowest = mx.maximum(lowest, mx.take_along_axis(ranked, kept - 1, axis=-1))
    return mx.where(z < lowest, -mx.inf, z)


def _column(values: list[float] | list[int]) -> mx.array:
    return mx.array(values, mx.float32)[:, None]


def _gumbel_noise(vocab_size: int, seeds: Sequence[int], positions: Sequence[int]) -> mx.array:
    """Returns Gumbel noise [B, V], keyed by each row's seed and position.

    The argmax of log-probabilities plus Gumbel noise is a sample from those probabilities (Gumbel, 1954).
    """
    keys = mx.array([[position, seed] for position, seed in zip(positions, seeds, strict=True)], mx.uint32)  # [B, 2]
    noise: mx.array = mx.vmap(lambda key: mx.random.gumbel((vocab_size,), key=key))(keys)
    return noise
