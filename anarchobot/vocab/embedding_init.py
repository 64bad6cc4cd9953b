"""Initializes the embedding and output head of a new vocabulary from the rows of the old one."""

from collections.abc import Collection, Mapping

import numpy as np

from anarchobot.vocab.token_alignment import RANDOM, AlignmentPlan
from anarchobot.vocab.vector_alignment import Floats


def initialize_embeddings(
    weights: Mapping[str, Floats], by_token: Collection[str], vocab_size: int, plan: AlignmentPlan, seed: int
) -> dict[str, Floats]:
    """Returns all weights of the model in float32. Those in `by_token`, the embedding and the output head, have new
    rows, made from the first `vocab_size`: a model may have rows that no token uses."""
    return {
        name: initialize_rows(weights[name][:vocab_size], plan, seed) if name in by_token else weights[name]
        for name in weights
    }


def initialize_rows(old: Floats, plan: AlignmentPlan, seed: int) -> Floats:
    """Returns [V_target, D] from [V_source, D], or a bias [V_target] from [V_source].

    The row of a token with one source token of weight 1 is copied exactly. A row without source tokens is the mean of
    all rows, or for the route `random` a normal sample with their mean and standard deviation.
    """
    mean, std = old.mean(axis=0), old.std(axis=0)
    rng = np.random.default_rng(seed)
    new = np.empty((len(plan.routes), *old.shape[1:]), np.float32)
    for i, route in enumerate(plan.routes):
        ids, weights = plan.combination(i)
        if len(ids):
            new[i] = weights @ old[ids]
        else:
            new[i] = rng.normal(mean, std) if route == RANDOM else mean
    return new


def count_zero_rows(rows: Floats) -> int:
    """Counts the rows that are all zeros, whose tokens the model cannot distinguish."""
    return int(np.count_nonzero(~rows.any(axis=1)))
