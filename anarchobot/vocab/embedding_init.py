"""The rows of a new vocabulary, in embedding and head, from those of the old one."""

from collections.abc import Mapping

import numpy as np

from anarchobot.vocab.token_alignment import RANDOM, Plan
from anarchobot.vocab.vector_alignment import Floats

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rebuilt(weights: Mapping[str, Floats], plan: Plan, seed: int) -> dict[str, Floats]:
    """All of a model's weights, float32, those of embedding and head made new; a tied model has no head of its own."""
    return {
        name: new_rows(weights[name], plan, seed) if name in (EMBEDDING, HEAD) else weights[name] for name in weights
    }


def new_rows(old: Floats, plan: Plan, seed: int) -> Floats:
    """[V_target, D] from [V_source, D]. A row of one source token is that token's, bit for bit; a mean of several is
    made as long as they are in the mean; of none, it is the mean of all, or a draw with their mean and deviation, and
    as long as they are."""
    lengths = np.linalg.norm(old, axis=1)
    middle, spread = old.mean(axis=0), old.std(axis=0)
    draws = np.random.default_rng(seed)
    new = np.empty((len(plan.routes), old.shape[1]), np.float32)
    for i, (ids, weights) in enumerate(zip(plan.ids, plan.weights, strict=True)):
        used = weights > 0
        if np.count_nonzero(used) == 1:
            new[i] = old[ids[used][0]]
        elif used.any():
            new[i] = _as_long(weights[used] @ old[ids[used]], float(weights[used] @ lengths[ids[used]]))
        elif plan.routes[i] == RANDOM:
            new[i] = _as_long(draws.normal(middle, spread).astype(np.float32), float(lengths.mean()))
        else:
            new[i] = _as_long(middle, float(lengths.mean()))
    return new


def zero_rows(rows: Floats) -> int:
    """How many are all zeros: a token that could not be told from another."""
    return int(np.count_nonzero(~rows.any(axis=1)))


def _as_long(row: Floats, length: float) -> Floats:
    own = float(np.linalg.norm(row))
    return (row * (length / own)).astype(np.float32) if own > 0 else row
