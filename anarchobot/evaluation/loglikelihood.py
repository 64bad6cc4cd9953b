"""Log-likelihoods of continuations, batched.

Shapes: B rows, L sequence, N scored positions, D d_model, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from anarchobot.inference.model import Model
from anarchobot.model.architecture import forward_pass
from anarchobot.model.frozen import compute_dtype
from anarchobot.model.loss import logits

BATCH_TOKENS = 8192  # per forward pass
HEAD_POSITIONS = 1024  # positions whose logits are in memory at once
LENGTH_MULTIPLE = 64  # rows are padded to a multiple of this, to limit the number of shapes

Ids = Sequence[int]


class LogLikelihood(NamedTuple):
    log_prob: float  # nats, summed over the continuation
    is_greedy: bool  # every token of the continuation was the argmax


def loglikelihoods(
    model: Model, requests: Sequence[tuple[Ids, Ids]], progress: Callable[[float], None] = lambda fraction: None
) -> list[LogLikelihood]:
    """Returns one score per (context, continuation) of token ids; the context may not be empty. `progress` is called
    with the fraction of the work that is done.

    A context that does not fit into max_seq_len loses its beginning. A longer continuation is scored in windows after
    the last token of its context.
    """
    limit = model.config.max_seq_len
    windows = [
        [(context, ids)] if 0 < len(ids) <= limit else list(rolling_windows(ids, context[-1], limit))
        for context, ids in requests
    ]
    scores = iter(_score(model, [window for each in windows for window in each], progress))
    grouped = [[next(scores) for _ in each] for each in windows]
    return [LogLikelihood(sum(s.log_prob for s in group), all(s.is_greedy for s in group)) for group in grouped]


def rolling_windows(ids: Ids, prefix: int, max_seq_len: int) -> Iterator[tuple[Ids, Ids]]:
    """Splits a long text into (context, continuation) pairs that score each token once; the first follows `prefix`.

    Windows have max_seq_len tokens. The last window overlaps its predecessor so that it is full, as in
    lm-evaluation-harness.
    """
    all_ids = [prefix, *ids]
    for start in range(1, len(all_ids), max_seq_len):
        stop = min(start + max_seq_len, len(all_ids))
        yield all_ids[max(0, stop - 1 - max_seq_len) : start], all_ids[start:stop]


def _score(model: Model, windows: Sequence[tuple[Ids, Ids]], progress: Callable[[float], None]) -> list[LogLikelihood]:
    limit = model.config.max_seq_len
    rows = [np.array([*context, *continuation], np.int32)[-(limit + 1) :] for context, continuation in windows]
    scores: list[LogLikelihood] = [LogLikelihood(0.0, True)] * len(rows)
    pending = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # longest first, similar lengths together
    while pending:
        length = -(-(len(rows[pending[0]]) - 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        batch_size = max(1, BATCH_TOKENS // length)
        batch, pending = pending[:batch_size], pending[batch_size:]
        counts = [len(windows[i][1]) for i in batch]
        for i, score in zip(batch, _score_rows(model, [rows[i] for i in batch], counts, length), strict=True):
            scores[i] = score
        progress(1 - len(pending) / len(rows))
    return scores


def _score_rows(
    model: Model, rows: Sequence[np.ndarray], counts: Sequence[int], length: int
) -> Iterator[LogLikelihood]:
    """Scores the last `counts` ids of each row; rows have at most length + 1 ids. Padding goes at the end, where causal
    attention keeps it from affecting scored tokens."""
    inputs = np.zeros((len(rows), length), np.int32)
    for b, row in enumerate(rows):
        inputs[b, : len(row) - 1] = row[:-1]
    dtype = compute_dtype(model.params)
    forward = forward_pass(model.config)
    hidden = forward.hidden_states(model.params, mx.array(inputs), model.config, dtype=dtype)  # [B, L, D]
    ends = [b * length + len(row) - 1 for b, row in enumerate(rows)]
    positions = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    targets = np.concatenate([row[len(row) - count :] for row, count in zip(rows, counts, strict=True)])
    scored = hidden.reshape(-1, hidden.shape[-1])[mx.array(positions)]  # [N, D]: logits only where needed
    log_probs, greedy = [], []
    for start in range(0, len(targets), HEAD_POSITIONS):
        z = logits(scored[start : start + HEAD_POSITIONS], model.params, model.config)  # [n, V]
        target = mx.array(targets[start : start + HEAD_POSITIONS])
        target_logits = mx.take_along_axis(z, target[:, None], axis=-1)[:, 0]
        log_prob, is_argmax = target_logits - mx.logsumexp(z, axis=-1), mx.argmax(z, axis=-1) == target
        mx.eval(log_prob, is_argmax)
        log_probs.append(np.array(log_prob, np.float64))
        greedy.append(np.array(is_argmax))
    borders = np.cumsum(counts)[:-1]
    for row_log_probs, row_greedy in zip(
        np.split(np.concatenate(log_probs), borders), np.split(np.concatenate(greedy), borders), strict=True
    ):
        yield LogLikelihood(float(row_log_probs.sum()), bool(row_greedy.all()))
