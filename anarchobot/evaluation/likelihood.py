"""How likely a model finds texts: log-probabilities of continuations, computed many at a time.

Shapes: B rows, L sequence, N positions, D d_model, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from anarchobot.inference.model import Model
from anarchobot.model.llama.forward import hidden_states, logits

BATCH_TOKENS = 8192  # that go through the model together
HEAD_POSITIONS = 1024  # whose logits exist at a time
LENGTHS = 64  # rows are filled up to a multiple of this: few shapes

Ids = Sequence[int]


class Likelihood(NamedTuple):
    """`log_prob` in nats, of the whole continuation; `is_greedy`: each of its tokens was the likeliest."""

    log_prob: float
    is_greedy: bool


def likelihoods(
    model: Model, requests: Sequence[tuple[Ids, Ids]], progress: Callable[[int], None] = lambda done: None
) -> list[Likelihood]:
    """One for each (context, continuation) of token ids, neither of them empty; a context that is too long for the
    model's max_seq_len loses its beginning. `progress` gets the number of requests done.

    Raises ValueError for a continuation longer than max_seq_len.
    """
    most = model.shape.max_seq_len
    if (too_long := max((len(continuation) for _, continuation in requests), default=0)) > most:
        raise ValueError(f"a continuation of {too_long} tokens, and max_seq_len is {most}")
    rows = [np.array([*context, *continuation], np.int32)[-(most + 1) :] for context, continuation in requests]
    found: list[Likelihood] = [Likelihood(0.0, True)] * len(rows)
    waiting = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # rows of a length together, the longest first
    while waiting:
        length = _filled(len(rows[waiting[0]]) - 1)
        taken, waiting = waiting[: max(1, BATCH_TOKENS // length)], waiting[max(1, BATCH_TOKENS // length) :]
        counts = [len(requests[i][1]) for i in taken]
        for i, likelihood in zip(taken, _of_rows(model, [rows[i] for i in taken], counts, length), strict=True):
            found[i] = likelihood
        progress(len(rows) - len(waiting))
    return found


def rolling(ids: Ids, begin: int, max_seq_len: int) -> Iterator[tuple[Ids, Ids]]:
    """A long text as (context, continuation) pairs in which each of its tokens is scored once, the first behind
    `begin`: windows of max_seq_len, the last one moved back so that it is full (as lm-evaluation-harness does)."""
    whole = [begin, *ids]
    for start in range(1, len(whole), max_seq_len):
        stop = min(start + max_seq_len, len(whole))
        yield whole[max(0, stop - 1 - max_seq_len) : start], whole[start:stop]


def _filled(length: int) -> int:
    return -(-length // LENGTHS) * LENGTHS


def _of_rows(model: Model, rows: Sequence[np.ndarray], counts: Sequence[int], length: int) -> Iterator[Likelihood]:
    """For rows of at most length + 1 ids, of each the last `counts`. What fills up a row comes behind it, where no
    token that counts can see it."""
    inputs = np.zeros((len(rows), length), np.int32)
    for b, row in enumerate(rows):
        inputs[b, : len(row) - 1] = row[:-1]
    dtype = model.params["model.norm.weight"].dtype
    hidden = hidden_states(model.params, mx.array(inputs), model.shape, dtype=dtype)  # [B, L, D]
    ends = [b * length + len(row) - 1 for b, row in enumerate(rows)]
    places = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    targets = np.concatenate([row[len(row) - count :] for row, count in zip(rows, counts, strict=True)])
    scored = hidden.reshape(-1, hidden.shape[-1])[mx.array(places)]  # [N, D]: the head is for these alone
    log_probs, greedy = [], []
    for at in range(0, len(targets), HEAD_POSITIONS):
        z = logits(scored[at : at + HEAD_POSITIONS], model.params, model.shape)  # [n, V]
        wanted = mx.array(targets[at : at + HEAD_POSITIONS])
        of_target = mx.take_along_axis(z, wanted[:, None], axis=-1)[:, 0]
        one, likeliest = of_target - mx.logsumexp(z, axis=-1), mx.argmax(z, axis=-1) == wanted
        mx.eval(one, likeliest)
        log_probs.append(np.array(one, np.float64))
        greedy.append(np.array(likeliest))
    borders = np.cumsum(counts)[:-1]
    for one_row, is_likeliest in zip(
        np.split(np.concatenate(log_probs), borders), np.split(np.concatenate(greedy), borders), strict=True
    ):
        yield Likelihood(float(one_row.sum()), bool(is_likeliest.all()))
