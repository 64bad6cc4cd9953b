"""Sampling: the distribution, and what a draw depends on."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.sampling import Penalties, filter_logits, sample

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
    {"method": "combined", "top_k": 3, "top_p": 0.6, "min_p": 0.01, "temperature": 1.0},  # of three tokens, two pass
    {"method": "combined", "top_k": 5, "top_p": 0.98, "min_p": 0.2, "temperature": 1.0},
    {"method": "combined", "top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0},
]


def probabilities(settings: GenerationConfig, logits: np.ndarray = LOGITS) -> np.ndarray:
    """Token probabilities in float64, by the methods' definitions."""
    z = logits / settings.temperature
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    rank = np.argsort(np.argsort(-p, kind="stable"))
    method, combined = settings.method, settings.method == "combined"
    if method == "greedy":
        p = np.where(rank < 1, p, 0)
    if method == "top_k" or (combined and settings.top_k):
        p = np.where(rank < settings.top_k, p, 0)
    if method == "nucleus" or combined:  # the smallest set of likeliest tokens with total probability top_p
        p /= p.sum()
        p = np.where(rank < np.searchsorted(np.cumsum(-np.sort(-p)), settings.top_p - 1e-12) + 1, p, 0)
    if method == "min_p" or combined:
        p = np.where(p >= settings.min_p * p.max(), p, 0)
    return p / p.sum()


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
    got = np.array(mx.softmax(filter_logits(mx.array(logits, mx.float32), [chosen] * 20), axis=-1))
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
    rows = filter_logits(z, chosen)
    for b, setting in enumerate(chosen):
        assert mx.array_equal(rows[b], filter_logits(z[b : b + 1], [setting])[0]), setting


def test_combined_filters_equal_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers").generation.logits_process
    rng = np.random.default_rng(1)
    z = (rng.standard_normal((40, 300)) * np.linspace(0.3, 4, 40)[:, None]).astype(np.float32)
    for top_k, top_p, min_p in ((50, 0.9, 0.02), (5, 0.7, 0.3), (200, 0.99, 0.001)):
        settings = GenerationConfig(method="combined", temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
        expected = torch.tensor(z) / 0.7
        for warper in (
            warpers.TopKLogitsWarper(top_k), warpers.TopPLogitsWarper(top_p), warpers.MinPLogitsWarper(min_p)
        ):  # fmt: skip
            expected = warper(None, expected)
        got = filter_logits(mx.array(z), [settings] * 40)
        assert np.array_equal(np.isfinite(np.array(got)), np.isfinite(expected.numpy()))
        assert 1 < np.isfinite(expected.numpy()).sum(axis=1).mean() < top_k


PENALTIES: list[dict[str, float]] = [
    {"repetition_penalty": 1.7}, {"presence_penalty": 0.7}, {"presence_penalty": -2.0}, {"frequency_penalty": 0.4},
    {"repetition_penalty": 0.5, "presence_penalty": 1.5, "frequency_penalty": -0.3},
]  # fmt: skip


def penalized_by_mlx_lm(
    z: np.ndarray, prompt: list[int], answer: list[int], repetition_penalty: float = 1.0, **penalties: float
) -> np.ndarray:
    """The logits [V] by mlx-lm's processors: presence and frequency without a window, and of the answer only."""
    from mlx_lm.sample_utils import make_logits_processors

    contexts = {"presence_context_size": 1000, "frequency_context_size": 1000}
    values = mx.array(z[None], mx.float32)
    for processor in make_logits_processors(repetition_penalty=repetition_penalty):
        values = processor(mx.array(prompt + answer), values)
    for processor in make_logits_processors(**penalties, **contexts):  # type: ignore[arg-type]
        values = processor(mx.array(answer, mx.int32), values)
    return np.array(values)[0]


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_penalties_equal_mlx_lms(penalties: dict[str, float]) -> None:
    """While an answer of 50 tokens is generated, of a vocabulary of 40."""
    rng = np.random.default_rng(0)
    prompt, answer = rng.integers(0, 40, 30).tolist(), rng.integers(0, 40, 50).tolist()
    tracked = Penalties(GenerationConfig(**penalties), prompt, 40)
    for n, token in enumerate(answer):
        z = rng.standard_normal(40)
        got = np.array(tracked.apply(mx.array(z[None], mx.float32)))[0]
        np.testing.assert_allclose(got, penalized_by_mlx_lm(z, prompt, answer[:n], **penalties), rtol=1e-5, atol=1e-6)
        tracked.add(mx.array([token]))


def test_penalties_by_hand() -> None:
    """The repetition penalty divides if positive, multiplies if negative, once per token, for the last 20 only."""
    z = mx.array([[2.0, -1.0, 3.0, 4.0]])

    def penalized(context: list[int], answer: list[int], **penalties: float) -> list[list[float]]:
        tracked = Penalties(GenerationConfig(**penalties), context, 4)
        for token in answer:
            tracked.add(mx.array([token]))
        return tracked.apply(z).tolist()

    assert penalized([0, 1, 1], [], repetition_penalty=2.0) == [[1.0, -2.0, 3.0, 4.0]]
    assert penalized([3, 0], [0] * 19, repetition_penalty=2.0) == [[1.0, -1.0, 3.0, 4.0]]
    assert penalized([2], [0, 1, 0], presence_penalty=0.5) == [[1.5, -1.5, 3.0, 4.0]]
    assert penalized([2], [0, 1, 0], frequency_penalty=0.5) == [[1.0, -1.5, 3.0, 4.0]]
    assert penalized([0], [0, 1, 0]) == z.tolist() == [[2.0, -1.0, 3.0, 4.0]]
