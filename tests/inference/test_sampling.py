"""The distribution that is drawn from, and what a draw depends on."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.sampling import draw, filtered, penalised

LOGITS = np.array([2.0, 1.5, 1.0, 0.0, -1.0, -4.0])
SETTINGS: list[dict[str, Any]] = [
    {"method": "greedy"},
    {"method": "random", "temperature": 1.0},
    {"method": "random", "temperature": 0.5},
    {"method": "top_k", "top_k": 2, "temperature": 1.0},
    {"method": "top_k", "top_k": 50, "temperature": 2.0},  # more than there are: all
    {"method": "nucleus", "top_p": 0.8, "temperature": 1.0},
    {"method": "nucleus", "top_p": 0.8, "temperature": 2.0},  # the temperature comes first: more tokens pass
    {"method": "nucleus", "top_p": 1.0, "temperature": 1.0},
    {"method": "min_p", "min_p": 0.3, "temperature": 1.0},  # e^-1 passes, e^-2 does not
    {"method": "min_p", "min_p": 0.3, "temperature": 2.0},  # e^-1 and now that too
    {"method": "min_p", "min_p": 1.0, "temperature": 1.0},
]


def probabilities(settings: GenerationConfig, logits: np.ndarray = LOGITS) -> np.ndarray:
    """Of the tokens with these logits, by the methods' definitions, in float64."""
    z = logits / settings.temperature
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    order = np.argsort(-p, kind="stable")
    rank = np.argsort(order)
    if settings.method == "greedy":
        keep = p == p.max()
    elif settings.method == "top_k":
        keep = rank < settings.top_k
    elif settings.method == "nucleus":  # the fewest likeliest that hold top_p
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
    """20,000 places of one text, and the first place of 20,000 seeds."""
    chosen, n = GenerationConfig(**settings), 20000
    z = mx.array(np.tile(LOGITS, (n, 1)), mx.float32)
    along = draw(z, [chosen] * n, range(n))
    across = draw(z, [chosen.model_copy(update={"seed": seed}) for seed in range(n)], [0] * n)
    for draws in (along, across):  # five degrees of freedom: chance of more is 1 in 7,000
        assert chi_square(np.array(draws), probabilities(chosen)) < 25


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
def test_each_filter_is_numpys(settings: dict[str, Any]) -> None:
    """On a vocabulary of 1,000, peaked and flat."""
    chosen, rng = GenerationConfig(**settings), np.random.default_rng(0)
    logits = rng.standard_normal((20, 1000)) * np.linspace(0.1, 4, 20)[:, None]
    got = np.array(mx.softmax(filtered(mx.array(logits, mx.float32), chosen), axis=-1))
    wanted = np.array([probabilities(chosen, row) for row in logits.astype(np.float32).astype(np.float64)])
    # A token on the edge may fall on either side by float32's rounding.
    edges = ((got > 0) != (wanted > 0)).sum(axis=1)
    assert edges.max() <= 1 and edges.sum() <= 2
    np.testing.assert_allclose(got[edges == 0], wanted[edges == 0], rtol=2e-4, atol=1e-9)


def test_neighbours_in_a_text_are_drawn_independently() -> None:
    """Pairs of draws one after the other: 36 cells, 25 degrees of freedom beyond the two margins."""
    chosen, n = GenerationConfig(method="random", temperature=1.0), 20001
    draws = np.array(draw(mx.array(np.tile(LOGITS, (n, 1)), mx.float32), [chosen] * n, range(n)))
    p = probabilities(chosen)
    assert chi_square(draws[:-1] * 6 + draws[1:], np.outer(p, p).ravel()) < 75  # of 35: 1 in 10,000


def test_a_draw_depends_on_its_own_row_alone() -> None:
    """Rows of all methods together, each against the same row alone."""
    rng = np.random.default_rng(0)
    z = mx.array(rng.standard_normal((len(SETTINGS), 50)), mx.float32)
    chosen = [GenerationConfig(**settings, seed=i % 3) for i, settings in enumerate(SETTINGS)]
    places = [7 * i for i in range(len(chosen))]
    together = draw(z, chosen, places).tolist()
    assert together == [int(draw(z[i : i + 1], [chosen[i]], [places[i]]).item()) for i in range(len(chosen))]
    same = draw(mx.concatenate([z, z]), [chosen[1]] * 22, [*places, *places]).tolist()
    assert same[:11] == same[11:] == [int(draw(z[i : i + 1], [chosen[1]], [places[i]]).item()) for i in range(11)]


def test_the_penalty_by_hand() -> None:
    """Divided if positive, multiplied if negative, once however often it was said, and only the last 20."""
    z = mx.array([[2.0, -1.0, 3.0, 4.0]])
    assert penalised(z, mx.array([0, 1, 1]), 2.0).tolist() == [[1.0, -2.0, 3.0, 4.0]]
    assert penalised(z, mx.array([3, *[0] * 20]), 2.0).tolist() == [[1.0, -1.0, 3.0, 4.0]]
    assert penalised(z, mx.array([0]), 1.0).tolist() == z.tolist() == [[2.0, -1.0, 3.0, 4.0]]
