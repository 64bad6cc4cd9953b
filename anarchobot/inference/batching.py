"""Continuous batching: requests of any length join and leave the batch between two steps.

Prompts are prefilled one at a time, a limited number of tokens per step, so that a long prompt neither stalls the other
requests nor uses much memory. Then the row joins the batch, with its keys and values padded on the left so that all
rows end at the same position (mlx-lm's BatchKVCache). A single row needs no padding (KVCache). Other caches of mlx-lm
(rotating, state-space) do the same by the methods of their types; rows whose caches can't be batched take turns.

Each step computes its tokens while the previous step's tokens are read, so one unused token is computed per request.

Why not mlx-lm's BatchGenerator (0.32.2)? With our sampler it gives the same tokens, and with a single request, or 16
prompts of similar lengths, about the same speed. But it prefills prompts either together, padded to the longest, or one
per step, and neither suits mixed traffic. Measured with the shape of configs/small.yaml on two CPU cores: 15 prompts of
16 tokens and one of 900 took 2.3 times as long and 1.26 times the memory with prefill_batch_size 16, and 16 prompts of
16 to 31 tokens took 1.5 times as long with prefill_batch_size 1. It also calls one sampler per row if seeds differ, and
evaluates all log-probabilities at every step.

Shapes: B rows, L sequence, V vocabulary.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.inference.prefixes import KeptPrefixes
from anarchobot.inference.sampling import Penalties, TokenScores, sample
from anarchobot.model.architecture import forward_pass
from anarchobot.model.frozen import compute_dtype
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.loss import logits
from anarchobot.numerics.eval_order import unordered

PREFILL_TOKENS = 512  # prompt tokens per step
MAX_ROWS = 16  # rows in a batch
_CLEAR_CACHE_EVERY = 256  # steps between releases of buffers whose sizes no longer occur

FinishReason = Literal["stop", "length", "error"]


class Constraint(Protocol):
    """What a text may be, such as JSON. `error`: why it could not be followed to the end; empty without an error."""

    error: str

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, bool [V]. Never none."""

    def accept(self, token: int) -> None:
        """Adds a token to the text; never one that ends it."""


class StepOutput(NamedTuple):
    """A request's result of one step. `finish_reason` is set in its last one; with "stop", the token was a stop token
    and is None here, and with "error", its constraint failed. `scores` are those of the token, if requested; `reused`
    is how many tokens of the prompt were not prefilled, because an earlier prompt started with them."""

    request: int
    token: int | None
    finish_reason: FinishReason | None
    scores: TokenScores | None = None
    reused: int = 0


@dataclass
class Row:
    """A request. `context` holds the tokens of the prompt that are not prefilled yet; `length` is how long its text may
    become; `first` [V] says which tokens its text may start with; `top_logprobs` is how many tokens have scores at each
    position. Of the `sampled` tokens, the last one may not have been `read` yet."""

    request: int
    prompt: list[int]
    settings: GenerationConfig
    stop: frozenset[int]
    limit: int
    length: int
    penalties: Penalties
    first: mx.array | None
    constraint: Constraint | None
    top_logprobs: int | None
    context: list[int] = field(default_factory=list)
    caches: list[Any] = field(default_factory=list)
    scores: deque[TokenScores] = field(default_factory=deque)  # of the tokens that are sampled and not read
    reused: int = 0
    sampled: int = 0
    read: list[int] = field(default_factory=list)

    def allowed(self) -> mx.array | None:
        """Which tokens may be sampled next, bool [V]; None: all."""
        allowed = None if self.constraint is None else mx.array(self.constraint.allowed())
        return self.first if self.sampled == 0 and allowed is None else allowed


class Batch:
    """Waiting and running requests. Not thread-safe. Computes in the dtype of the norm parameters. `prefixes`:
    keys and values of earlier prompts of the same model, none by default."""

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        max_rows: int = MAX_ROWS,
        *,
        prefixes: KeptPrefixes | None = None,
    ) -> None:
        self._params, self._model, self._forward = params, model, forward_pass(model)
        self._max_rows = max_rows if self._forward.can_batch(params, model) else 1
        self._dtype = compute_dtype(params)
        self._prefixes = prefixes or KeptPrefixes(0)
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []
        self._caches: list[Any] = []  # one per layer, for all rows
        self._next = mx.array([], mx.uint32)  # [B] sampled, perhaps still being computed, and not read
        self._requests = self._steps = 0

    def __len__(self) -> int:
        """The number of unfinished requests."""
        return len(self._waiting) + len(self._rows)

    def insert(
        self,
        context: list[int],
        settings: GenerationConfig,
        stop: Collection[int],
        first: mx.array | None = None,
        *,
        constraint: Constraint | None = None,
        top_logprobs: int | None = None,
    ) -> int:
        """Adds a request to continue `context` until a token in `stop`, max_new_tokens or max_seq_len. The first token
        is one of `first`, bool [V], unless there is a constraint, which the text follows. `top_logprobs`: each token
        has scores, with those of so many likely tokens.

        Returns the request's number. Raises UserError if the context leaves no room within max_seq_len.
        """
        room = self._model.max_seq_len - len(context)
        if room < 1:
            raise UserError(
                f"the prompt has {len(context)} tokens, but the model's max_seq_len is {self._model.max_seq_len}: "
                "shorten it"
            )
        self._requests += 1
        penalties = Penalties(settings, context, self._model.vocab_size)
        limit = min(settings.max_new_tokens, room)
        self._waiting.append(
            Row(
                self._requests,
                context,
                settings,
                frozenset(stop),
                limit,
                len(context) + limit,
                penalties,
                first,
                constraint,
                top_logprobs,
            )
        )
        return self._requests

    def remove(self, request: int) -> None:
        """Cancels a request. Does nothing if it is already finished."""
        self._waiting = deque(row for row in self._waiting if row.request != request)
        self._keep([i for i, row in enumerate(self._rows) if row.request != request])

    def step(self) -> list[StepOutput]:
        """Prefills waiting prompts, then returns one token per running request; empty while none is running."""
        self._prefill()
        if not self._rows:
            return []
        tokens = self._next
        scores = [row.scores.popleft() if row.scores else None for row in self._rows]
        self._advance(tokens)
        self._steps += 1
        if self._steps % _CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        outputs, unfinished = [], []
        for i, (row, token) in enumerate(zip(self._rows, np.array(tokens).tolist(), strict=True)):
            row.read.append(token)
            reason: FinishReason | None = (
                "stop" if token in row.stop else "length" if len(row.read) == row.limit else None
            )
            if row.constraint is not None and row.constraint.error:
                reason = "error"
            outputs.append(StepOutput(row.request, None if reason == "stop" else token, reason, scores[i], row.reused))
            if reason is None:
                unfinished.append(i)
        self._keep(unfinished)
        return outputs

    def _advance(self, tokens: mx.array) -> None:
        """Starts to compute the tokens after `tokens` [B], `self._next`."""
        if any(row.sampled < row.limit for row in self._rows):
            z = self._last_logits(tokens[:, None], self._caches, self._rows)
            self._accept(tokens, z)
            self._next = self._sample(z, self._rows)

    def _prefill(self) -> None:
        """Runs up to PREFILL_TOKENS prompt tokens through the model, first come, first served."""
        left = PREFILL_TOKENS
        while left and self._waiting and len(self._rows) < self._max_rows:
            row = self._waiting[0]
            if not row.caches:
                self._start(row)
            chunk, row.context = row.context[:left], row.context[left:]
            left -= len(chunk)
            z = self._last_logits(mx.array([chunk]), row.caches, [row])
            if row.context:
                mx.eval([cache.state for cache in row.caches])
                continue
            self._waiting.popleft()
            self._prefixes.keep(row.prompt, self._kind(row), row.caches)
            self._join(row, self._sample(z, [row]))

    def _start(self, row: Row) -> None:
        """Gives a row its caches: those of an earlier prompt that starts like it, or new ones."""
        row.caches, row.reused = self._prefixes.find(row.prompt, self._kind(row))
        row.caches = row.caches or self._new_caches()
        row.context = row.prompt[row.reused :]

    def _new_caches(self) -> list[Any]:
        return self._forward.make_caches(self._params, self._model)

    def _kind(self, row: Row) -> bool:
        """Rows of different kinds have different keys for the same tokens: longrope rotates those of long rows by other
        frequencies."""
        scaling = self._model.rope_scaling
        original = scaling.original_max_seq_len
        return scaling.type == "longrope" and original is not None and row.length > original

    def _accept(self, tokens: mx.array, z: mx.array) -> None:
        """Adds the last tokens [B] to their rows' constraints, while the logits `z` of the next are being computed."""
        if not any(row.constraint for row in self._rows):
            return
        mx.async_eval(z)  # type: ignore[no-untyped-call]
        for row, token in zip(self._rows, np.array(tokens).tolist(), strict=True):
            if row.constraint is not None and token not in row.stop:
                row.constraint.accept(token)

    def _last_logits(self, tokens: mx.array, caches: list[Any], rows: list[Row], count: int = 1) -> mx.array:
        """Returns float32 logits [B * count, V] of the tokens after each of the last `count` of tokens [B, L]."""
        lengths = [row.length for row in rows]
        hidden = self._forward.hidden_states(
            self._params, tokens, self._model, dtype=self._dtype, caches=caches, lengths=lengths, wait=unordered
        )
        z = logits(hidden[:, -count:].reshape(-1, hidden.shape[-1]), self._params, self._model)
        return z[:, : self._model.vocab_size]  # an embedding may have rows without a token

    def _sample(self, z: mx.array, rows: list[Row]) -> mx.array:
        """Draws the rows' next ids [B] from logits [B, V], and starts to compute them."""
        model_logits = z
        if any(row.penalties for row in rows):
            z = mx.concatenate([row.penalties.apply(z[b : b + 1]) for b, row in enumerate(rows)])
        allowed = [row.allowed() for row in rows]
        if any(mask is not None for mask in allowed):
            z = mx.concatenate(
                [
                    z[b : b + 1] if mask is None else mx.where(mask, z[b : b + 1], -mx.inf)
                    for b, mask in enumerate(allowed)
                ]
            )
        ids = sample(z, [row.settings for row in rows], [row.sampled for row in rows])
        for b, row in enumerate(rows):
            row.sampled += 1
            row.penalties.add(ids[b : b + 1])
            if row.top_logprobs is not None:
                row.scores.append(TokenScores.of(model_logits[b], ids[b], row.top_logprobs))
        mx.async_eval(ids, [list(row.scores) for row in rows])  # type: ignore[no-untyped-call]
        return ids

    def _join(self, row: Row, first: mx.array) -> None:
        """Adds a row with a prefilled prompt to the running rows."""
        if not self._rows:
            self._caches = row.caches
        elif len(self._rows) == 1:
            pairs = zip(self._caches, row.caches, strict=True)
            self._caches = [cache.merge([cache, row_cache]) for cache, row_cache in pairs]
        else:
            for cache, row_cache in zip(self._caches, row.caches, strict=True):
                cache.extend(row_cache.merge([row_cache]))
        row.caches = []
        self._rows.append(row)
        self._next = mx.concatenate([self._next, first])

    def _keep(self, indices: list[int]) -> None:
        """Drops all other rows."""
        if len(indices) == len(self._rows):
            return
        if len(self._rows) > 1 and len(indices) == 1:
            self._caches = [cache.extract(indices[0]) for cache in self._caches]
        elif indices:
            for cache in self._caches:
                cache.filter(indices)
        else:
            self._caches = []
        self._rows = [self._rows[i] for i in indices]
        self._next = self._next[mx.array(indices, mx.uint32)]
