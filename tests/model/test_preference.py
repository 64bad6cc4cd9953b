"""Preference losses against float64 formulas, hand-computed values and trl's trainer on the same log-probabilities."""

import math
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.model.preference import Kind, Preferences, losses_and_grads, preference_losses, rewards

LOG_PROBS = np.array([[-20.0, -31.0], [-75.0, -60.5], [-3.2, -90.0], [-1.0, -1.5]])
REFERENCE = np.array([[-22.0, -30.0], [-70.0, -61.0], [-40.0, -80.0], [-1.0, -1.5]])
LENGTHS = np.array([[10, 12], [40, 25], [2, 50], [1, 1]])
CASES: list[tuple[Kind, float, float]] = [
    ("sigmoid", 0.1, 0.0), ("sigmoid", 0.5, 0.2), ("ipo", 0.1, 0.0), ("orpo", 0.1, 0.0), ("orpo", 1.0, 0.0)
]  # fmt: skip


def pairs(log_probs: Any = LOG_PROBS, reference: Any = REFERENCE) -> Preferences:
    return Preferences(*(mx.array(np.asarray(x, np.float32)) for x in (log_probs, LENGTHS, reference)))


def in_float64(log_probs: np.ndarray, kind: str, beta: float, smoothing: float) -> np.ndarray:
    """The formulas of the papers, in probabilities where the papers use them."""
    if kind == "orpo":
        p = np.exp(log_probs / LENGTHS)
        odds = p / (1 - p)
        ratio = odds[:, 0] / odds[:, 1]
        return -np.log(p[:, 0]) - beta * np.log(ratio / (1 + ratio))
    log_ratios = log_probs - REFERENCE
    if kind == "ipo":
        mean = log_ratios / LENGTHS
        return (mean[:, 0] - mean[:, 1] - 0.5 / beta) ** 2
    h = beta * (log_ratios[:, 0] - log_ratios[:, 1])
    better, worse = 1 / (1 + np.exp(-h)), 1 / (1 + np.exp(h))
    return -(1 - smoothing) * np.log(better) - smoothing * np.log(worse)


@pytest.mark.parametrize(("kind", "beta", "smoothing"), CASES)
def test_losses_and_grads_match_the_formulas(kind: Kind, beta: float, smoothing: float) -> None:
    losses, grads = losses_and_grads(pairs(), kind, beta, smoothing)
    np.testing.assert_allclose(np.array(losses), in_float64(LOG_PROBS, kind, beta, smoothing), rtol=1e-5)
    for i in range(2):  # central differences
        step = np.zeros_like(LOG_PROBS)
        step[:, i] = 1e-5
        above, below = (in_float64(LOG_PROBS + s, kind, beta, smoothing) for s in (step, -step))
        np.testing.assert_allclose(np.array(grads)[:, i], (above - below) / 2e-5, rtol=1e-4, atol=1e-6)


def test_initial_dpo_loss_is_log_2_and_its_slope_half_beta() -> None:
    losses, grads = losses_and_grads(pairs(reference=LOG_PROBS), "sigmoid", 0.1)
    assert np.array(losses).tolist() == pytest.approx([math.log(2)] * 4)
    np.testing.assert_allclose(np.array(grads), [[-0.05, 0.05]] * 4, rtol=1e-6)
    assert np.array(rewards(pairs(reference=LOG_PROBS), "sigmoid", 0.1)).tolist() == [[0.0, 0.0]] * 4


def test_rewards() -> None:
    np.testing.assert_allclose(np.array(rewards(pairs(), "sigmoid", 0.1))[0], [0.2, -0.1], rtol=1e-5)
    np.testing.assert_allclose(np.array(rewards(pairs(), "orpo", 0.1))[0], [-0.2, -31 / 120], rtol=1e-5)


def test_far_apart_log_probabilities_stay_finite() -> None:
    for kind in ("sigmoid", "ipo", "orpo"):
        far = pairs([[-1e4, -1.0]] * 4)
        assert np.isfinite(np.array(preference_losses(far, kind, 0.5))).all()


@pytest.mark.parametrize("near_zero", [-1e-3, -1e-5, -1e-7, -1e-8, 0.0])
def test_orpo_odds_near_probability_1(near_zero: float) -> None:
    """log o(x) = x - log(-expm1(x)), with slope 1 / (1 - exp(x)) = -1 / expm1(x); both are infinite at 0."""
    beta = 0.1
    for log_probs in ([near_zero, -2.0], [-2.0, near_zero]):
        given = Preferences(*(mx.array([x], mx.float32) for x in (log_probs, [1, 1], [0, 0])))
        losses, grads = losses_and_grads(given, "orpo", beta)
        assert np.isfinite(np.array(grads)).all() and math.isfinite(losses.item())
        if not near_zero:
            continue
        chosen, rejected = np.array(log_probs, np.float32).astype(np.float64)
        h = (chosen - math.log(-math.expm1(chosen))) - (rejected - math.log(-math.expm1(rejected)))
        slope = beta / (1 + math.exp(h))  # derivative of -beta log sigmoid(h) with respect to -h
        assert losses.item() == pytest.approx(-chosen + beta * math.log1p(math.exp(-h)), rel=1e-5)
        wanted = [-1 + slope / math.expm1(chosen), -slope / math.expm1(rejected)]
        np.testing.assert_allclose(np.array(grads)[0], wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_loss_matches_trl(kind: Kind) -> None:
    """Runs trl's code on a fake model that returns these log-probabilities."""
    torch, trl = pytest.importorskip("torch"), pytest.importorskip("trl")
    width = int(LENGTHS.max()) + 1
    mask = np.concatenate([np.arange(width) > width - 1 - LENGTHS[:, i, None] for i in range(2)]).astype(np.int64)
    by_token = np.concatenate([LOG_PROBS[:, i] / LENGTHS[:, i] for i in range(2)])[:, None] * mask[:, 1:]
    out = SimpleNamespace(
        log_probs=torch.tensor(by_token), entropy=torch.zeros(8, width - 1), mean_logits=torch.zeros(8, width - 1),
        is_top1=torch.zeros(8, width - 1, dtype=torch.bool),
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(8, width, dtype=torch.int64), "attention_mask": torch.ones(8, width),
        "completion_mask": torch.tensor(mask), "ref_chosen_logps": torch.tensor(REFERENCE[:, 0]),
        "ref_rejected_logps": torch.tensor(REFERENCE[:, 1]),
    }  # fmt: skip
    trainer = MagicMock(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind],
        loss_weights=[1.0], beta=0.1, use_weighting=False, aux_loss_enabled=False, label_smoothing=0.0,
    )  # fmt: skip
    trainer.accelerator.gather_for_metrics = lambda x: x
    theirs = trl.DPOTrainer._compute_loss(trainer, lambda **_: out, inputs, False)
    assert float(preference_losses(pairs(), kind, 0.1).mean()) == pytest.approx(float(theirs), rel=1e-5)
