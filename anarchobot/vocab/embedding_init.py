"""Initializes the embedding and output head of a new vocabulary from the rows of the old one."""

from collections.abc import Mapping

import numpy as np

from anarchobot.optim.param_groups import EMBEDDINGS
from anarchobot.vocab.token_alignment import RANDOM, AlignmentPlan
from anarchobot.vocab.vector_alignment import Floats


def initialize_embeddings(weights: Mapping[str, Floats], plan: AlignmentPlan, seed: int) -> dict[str, Floats]:
    """Returns all weights of the model in float32, with a new embedding and output head. A tied model has no head."""
    return {
        name: initialize_rows(weights[name], plan, seed) if name in EMBEDDINGS else weights[name] for name in weights
    }


def initialize_rows(old: Floats, plan: AlignmentPlan, seed: int) -> Floats:
    """Returns [V_target, D] from [V_source, D].

    The row of a token with one source token is copied exactly. A weighted mean of several is scaled to the weighted
    mean of their norms. A row without source tokens is the mean of all rows, or for the route `random` a normal sample
    with their mean and standard deviation, scaled to their mean norm.
    """
    norms = np.linalg.norm(old, axis=1)
    mean, std = old.mean(axis=0), old.std(axis=0)
    rng = np.random.default_rng(seed)
    new = np.empty((len(plan.routes), old.shape[1]), np.float32)
    for i, (ids, weights) in enumerate(zip(plan.ids, plan.weights, strict=True)):
        used = weights > 0
        if np.count_nonzero(used) == 1:
            new[i] = old[ids[used][0]]
        elif used.any():
            new[i] = _rescale(weights[used] @ old[ids[used]], float(weights[used] @ norms[ids[used]]))
        elif plan.routes[i] == RANDOM:
            new[i] = _rescale(rng.normal(mean, std).astype(np.float32), float(norms.mean()))
        else:
            new[i] = _rescale(mean, float(norms.mean()))
    return new


def count_zero_rows(rows: Floats) -> int:
    """Counts the rows that are all zeros, whose tokens the model cannot distinguish."""
    return int(np.count_nonzero(~rows.any(axis=1)))


def _rescale(row: Floats, norm: float) -> Floats:
    old_norm = float(np.linalg.norm(row))
    return (row * (norm / old_norm)).astype(np.float32) if old_norm > 0 else row
