"""Sampling: the distribution, and what a draw depends on."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.sampling import apply_repetition_penalty, filter_logits, sample

LOGITS = np.array([2.0, 1.5, 1.0, 0.0, -1.0, -4.0])
SETTINGS: list[dict[str, Any]] = [
    {"method": "greedy"},
    {"method": "random", "temperature": 1.0},
    {"method": "random", "temperature": 0.5},
    {"method": "top_k", "top_k": 2, "temperature": 1.0},
    {"method": "top_k", "top_k": 50, "temperature": 2.0},  # more than the vocabulary: all tokens
    {"method": "nucleus", "top_p": 0.8, "temperature": 1.0},
    {"method": "nucleus", "top_p": 0.8, "temperature": 2.0},  # temperature is applied first: more tokens pass
    {"method": "nucleus", "top_p": 1.0, "temperature": 1.0},
    {"method": "min_p", "min_p": 0.3, "temperature": 1.0},  # e^-1 passes, e^-2 does not
    {"method": "min_p", "min_p": 0.3, "temperature": 2.0},  # e^-1 (the former e^-2) passes too
    {"method": "min_p", "min_p": 1.0, "temperature": 1.0},
]


def probabilities(settings: GenerationConfig, logits: np.ndarray = LOGITS) -> np.ndarray:
    """Token probabilities in float64, by the methods' definitions."""
    z = logits / settings.temperature
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    order = np.argsort(-p, kind="stable")
    rank = np.argsort(order)
    if settings.method == "greedy":
        keep = p == p.max()
    elif settings.method == "top_k":
        keep = rank < settings.top_k
    elif settings.method == "nucleus":  # the smallest set of likeliest tokens with total probability top_p
        keep = rank < np.searchsorted(np.cumsum(p[order]), settings.top_p) + 1
    elif settings.method == "min_p":
        keep = p >= settings.min_p * p.max()
    else:
        keep = np.ones(len(p), bool)
    return np.where(keep, p, 0) / p[keep].sum()


def chi_square(draws: np.ndarray, p: np.ndarray) -> float:
    counts = np.bincount(draws, minlength=len(p))
    assert counts[p == 0].sum() == 0
    expected = len(draws) * p[p > 0]
    return float(((counts[p > 0] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_exact_probabilities(settings: dict[str, Any]) -> None:
    """20,000 positions of one text, and the first position of 20,000 seeds."""
    chosen, n = GenerationConfig(**settings), 20000
    z = mx.array(np.tile(LOGITS, (n, 1)), mx.float32)
    along = sample(z, [chosen] * n, range(n))
    across = sample(z, [chosen.model_copy(update={"seed": seed}) for seed in range(n)], [0] * n)
    for draws in (along, across):  # five degrees of freedom: exceeded by chance 1 time in 7,000
        assert chi_square(np.array(draws), probabilities(chosen)) < 25


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
def test_filters_equal_numpy(settings: dict[str, Any]) -> None:
    """On a vocabulary of 1,000, with peaked and flat distributions."""
    chosen, rng = GenerationConfig(**settings), np.random.default_rng(0)
    logits = rng.standard_normal((20, 1000)) * np.linspace(0.1, 4, 20)[:, None]
    got = np.array(mx.softmax(filter_logits(mx.array(logits, mx.float32), chosen), axis=-1))
    expected = np.array([probabilities(chosen, row) for row in logits.astype(np.float32).astype(np.float64)])
    # A token at the threshold may fall on either side due to float32 rounding.
    edges = ((got > 0) != (expected > 0)).sum(axis=1)
    assert edges.max() <= 1 and edges.sum() <= 2
    np.testing.assert_allclose(got[edges == 0], expected[edges == 0], rtol=2e-4, atol=1e-9)


def test_consecutive_draws_are_independent() -> None:
    """Pairs of consecutive draws: 36 cells, 25 degrees of freedom beyond the two margins."""
    chosen, n = GenerationConfig(method="random", temperature=1.0), 20001
    draws = np.array(sample(mx.array(np.tile(LOGITS, (n, 1)), mx.float32), [chosen] * n, range(n)))
    p = probabilities(chosen)
    assert chi_square(draws[:-1] * 6 + draws[1:], np.outer(p, p).ravel()) < 75  # 35 degrees of freedom: 1 in 10,000


def test_a_draw_depends_only_on_its_row() -> None:
    """Rows with all methods in one batch, each compared with the row alone."""
    rng = np.random.default_rng(0)
    z = mx.array(rng.standard_normal((len(SETTINGS), 50)), mx.float32)
    chosen = [GenerationConfig(**settings, seed=i % 3) for i, settings in enumerate(SETTINGS)]
    positions = [7 * i for i in range(len(chosen))]
    together = sample(z, chosen, positions).tolist()
    assert together == [int(sample(z[i : i + 1], [chosen[i]], [positions[i]]).item()) for i in range(len(chosen))]
    same = sample(mx.concatenate([z, z]), [chosen[1]] * 22, [*positions, *positions]).tolist()
    assert same[:11] == same[11:] == [int(sample(z[i : i + 1], [chosen[1]], [positions[i]]).item()) for i in range(11)]


def test_repetition_penalty_by_hand() -> None:
    """Divides if positive, multiplies if negative, once per token, for the last 20 tokens only."""
    z = mx.array([[2.0, -1.0, 3.0, 4.0]])
    assert apply_repetition_penalty(z, mx.array([0, 1, 1]), 2.0).tolist() == [[1.0, -2.0, 3.0, 4.0]]
    assert apply_repetition_penalty(z, mx.array([3, *[0] * 20]), 2.0).tolist() == [[1.0, -1.0, 3.0, 4.0]]
    assert apply_repetition_penalty(z, mx.array([0]), 1.0).tolist() == z.tolist() == [[2.0, -1.0, 3.0, 4.0]]
