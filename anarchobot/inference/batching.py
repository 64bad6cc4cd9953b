"""Several texts written at once (continuous batching): they come and go between two steps, whatever their lengths.

A prompt goes through the model by itself, a limited number of tokens at each step, so that nobody waits long for
another's prompt and memory stays bounded. Then its keys and values are put under those of the others: rows of different
lengths that end at the same place, padded on the left (mlx-lm's BatchKVCache). A row alone is not padded (KVCache).

A step's tokens are computed while those of the step before are read, so one more than needed is computed of each text.

Shapes: B rows, L sequence, V vocabulary.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.inference.sampling import PENALTY_WINDOW, draw, penalised
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.llama.forward import hidden_states, logits
from anarchobot.numerics.sequencing import free

PROMPT_TOKENS = 512  # of prompts, at a step
ROWS = 16  # texts at a time
_TIDY_EVERY = 256  # steps: buffers of sizes that no longer occur are given back

End = Literal["stop", "length"]


class Drawn(NamedTuple):
    """What a step brings of one request: a token, and with `end` it is over. At "stop" there is no token: it was one
    of those that end a text."""

    request: int
    token: int | None
    end: End | None


@dataclass
class _Row:
    """A request: `context` is what of its prompt the model has not seen yet, `recent` the ids that the penalty is
    about, `drawn` and `read` count its tokens, of which the last drawn may still be under way."""

    request: int
    context: list[int]
    settings: GenerationConfig
    stop: frozenset[int]
    limit: int
    recent: mx.array
    caches: list[Any]
    drawn: int = 0
    read: int = 0


class Batch:
    """Requests, waiting and under way. For one thread; computes in the dtype of the parameters' norms."""

    def __init__(self, params: Params, shape: ModelConfig, rows: int = ROWS) -> None:
        """`rows`: texts written at a time; what is inserted beyond them waits."""
        self._params, self._shape, self._most = params, shape, rows
        self._dtype = params["model.norm.weight"].dtype
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._caches: list[Any] = []  # one a layer, of all rows
        self._next = mx.array([], mx.uint32)  # [B] drawn, perhaps under way, and not read
        self._requests = self._steps = 0

    def __len__(self) -> int:
        """How many requests are not over."""
        return len(self._waiting) + len(self._rows)

    def insert(self, context: list[int], settings: GenerationConfig, stop: Collection[int]) -> int:
        """Takes a request: tokens are to be drawn behind those of `context`, until one of `stop`, max_new_tokens or
        max_seq_len; returns its number. Raises UserError for a context that leaves no room in max_seq_len."""
        from mlx_lm.models.cache import KVCache  # late: the package takes seconds to import

        room = self._shape.max_seq_len - len(context)
        if room < 1:
            raise UserError(
                f"the prompt is {len(context)} tokens long and the model's max_seq_len is {self._shape.max_seq_len}: "
                "shorten it"
            )
        self._requests += 1
        caches = [KVCache() for _ in range(self._shape.n_layers)]  # type: ignore[no-untyped-call]
        recent = mx.array(context[-PENALTY_WINDOW:])
        limit = min(settings.max_new_tokens, room)
        self._waiting.append(_Row(self._requests, context, settings, frozenset(stop), limit, recent, caches))
        return self._requests

    def remove(self, request: int) -> None:
        """Ends a request; one that is over already is none any more, which is no mistake."""
        self._waiting = deque(row for row in self._waiting if row.request != request)
        self._keep([i for i, row in enumerate(self._rows) if row.request != request])

    def step(self) -> list[Drawn]:
        """Reads on in the prompts that wait, then one token of each text under way; empty while there is none yet."""
        self._read_prompts()
        if not self._rows:
            return []
        tokens = self._next
        if any(row.drawn < row.limit for row in self._rows):
            self._next = self._drawn(self._last_logits(tokens[:, None], self._caches), self._rows)
            mx.async_eval(self._next)  # type: ignore[no-untyped-call]
        self._steps += 1
        if self._steps % _TIDY_EVERY == 0:
            mx.clear_cache()
        result, going_on = [], []
        for i, (row, token) in enumerate(zip(self._rows, np.array(tokens).tolist(), strict=True)):
            row.read += 1
            end: End | None = "stop" if token in row.stop else "length" if row.read == row.limit else None
            result.append(Drawn(row.request, None if end == "stop" else token, end))
            if end is None:
                going_on.append(i)
        self._keep(going_on)
        return result

    def _read_prompts(self) -> None:
        """Through the model with PROMPT_TOKENS tokens of those that wait, first come first served."""
        left = PROMPT_TOKENS
        while left and self._waiting and len(self._rows) < self._most:
            row = self._waiting[0]
            chunk, row.context = row.context[:left], row.context[left:]
            left -= len(chunk)
            z = self._last_logits(mx.array([chunk]), row.caches)
            if row.context:
                mx.eval([cache.state for cache in row.caches])
                continue
            self._waiting.popleft()
            first = self._drawn(z, [row])
            mx.async_eval(first)  # type: ignore[no-untyped-call]
            self._join(row, first)

    def _last_logits(self, tokens: mx.array, caches: list[Any]) -> mx.array:
        """float32 [B, V] of what comes behind tokens [B, L]."""
        hidden = hidden_states(self._params, tokens, self._shape, dtype=self._dtype, caches=caches, wait=free)
        return logits(hidden[:, -1], self._params, self._shape)

    def _drawn(self, z: mx.array, rows: list[_Row]) -> mx.array:
        """The next ids [B] of these rows, from logits [B, V]."""
        penalties = [row.settings.repetition_penalty for row in rows]
        if any(penalty != 1 for penalty in penalties):
            numbered = enumerate(zip(rows, penalties, strict=True))
            z = mx.concatenate([penalised(z[b : b + 1], row.recent, penalty) for b, (row, penalty) in numbered])
        ids = draw(z, [row.settings for row in rows], [row.drawn for row in rows])
        for b, (row, penalty) in enumerate(zip(rows, penalties, strict=True)):
            row.drawn += 1
            if penalty != 1:
                row.recent = mx.concatenate([row.recent, ids[b : b + 1]])[-PENALTY_WINDOW:]
        return ids

    def _join(self, row: _Row, first: mx.array) -> None:
        """Puts a row, whose prompt was read, under the others."""
        from mlx_lm.models.cache import KVCache

        if not self._rows:
            self._caches = row.caches
        elif len(self._rows) == 1:
            both = zip(self._caches, row.caches, strict=True)
            self._caches = [KVCache.merge(pair) for pair in both]  # type: ignore[no-untyped-call]
        else:
            for cache, own in zip(self._caches, row.caches, strict=True):
                cache.extend(KVCache.merge([own]))  # type: ignore[no-untyped-call]
        row.caches = []
        self._rows.append(row)
        self._next = mx.concatenate([self._next, first])

    def _keep(self, numbers: list[int]) -> None:
        """Lets go of all rows but these."""
        if len(numbers) == len(self._rows):
            return
        if len(self._rows) > 1 and len(numbers) == 1:
            self._caches = [cache.extract(numbers[0]) for cache in self._caches]
        elif numbers:
            for cache in self._caches:
                cache.filter(numbers)
        else:
            self._caches = []
        self._rows = [self._rows[i] for i in numbers]
        self._next = self._next[mx.array(numbers, mx.uint32)]
