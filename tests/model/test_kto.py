"""The loss of KTO against float64 formulas and trl's trainer on the same log-probabilities."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import PreferenceConfig
from anarchobot.model.kto import LabeledAnswers, kto

LOG_PROBS, REFERENCE = np.array([-20.0, -75.0, -3.2, -1.0, -31.0]), np.array([-22.0, -70.0, -40.0, -1.0, -29.5])
DESIRABLE = np.array([True, False, True, False, False])
# Log-probabilities of answers to other prompts, whose mean difference is the KL divergence: 1.4, and -0.6, which is 0.
OTHERS, REFERENCE_OTHERS = np.array([-50.0, -61.0, -12.0, -33.0, -8.0]), np.array([-53.0, -60.0, -14.0, -36.0, -8.0])
CASES: list[tuple[float, dict[str, float]]] = [
    (0.0, {"beta": 0.1}),
    (0.0, {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.5}),
    (-2.0, {"beta": 0.1}),  # added to OTHERS
]


def kl(shift: float) -> float:
    return max(0.0, float((OTHERS + shift - REFERENCE_OTHERS).mean()))


def in_float64(log_probs: np.ndarray, shift: float, chosen: PreferenceConfig) -> np.ndarray:
    """The value function of the paper: lambda - v, with v = lambda sigmoid(beta (r - z)) or the reverse."""
    r, z = log_probs - REFERENCE, kl(shift)
    good = chosen.desirable_weight * (1 - 1 / (1 + np.exp(-chosen.beta * (r - z))))
    bad = chosen.undesirable_weight * (1 - 1 / (1 + np.exp(-chosen.beta * (z - r))))
    return np.where(DESIRABLE, good, bad)


def ours(shift: float, chosen: PreferenceConfig) -> tuple[np.ndarray, np.ndarray]:
    answers = LabeledAnswers(
        *(mx.array(x.astype(np.float32)) for x in (LOG_PROBS, REFERENCE, DESIRABLE)), mx.array(kl(shift))
    )
    result = kto(answers, chosen)
    np.testing.assert_allclose(np.array(result.rewards), chosen.beta * (LOG_PROBS - REFERENCE), rtol=1e-5)
    return np.array(result.losses), np.array(result.grads)


@pytest.mark.parametrize(("shift", "case"), CASES)
def test_losses_and_grads_match_the_formula(shift: float, case: dict[str, float]) -> None:
    chosen = PreferenceConfig.model_validate(case)
    losses, grads = ours(shift, chosen)
    np.testing.assert_allclose(losses, in_float64(LOG_PROBS, shift, chosen), rtol=1e-5)
    above, below = (in_float64(LOG_PROBS + step, shift, chosen) for step in (1e-5, -1e-5))
    np.testing.assert_allclose(grads, (above - below) / 2e-5, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("shift", "case"), CASES)
def test_losses_and_grads_match_trl(shift: float, case: dict[str, float]) -> None:
    """Runs trl's code on a fake model that returns these log-probabilities, of one token each."""
    torch, trl = pytest.importorskip("torch"), pytest.importorskip("trl")
    chosen, log_probs = PreferenceConfig.model_validate(case), torch.tensor(LOG_PROBS, requires_grad=True)
    zeros = torch.zeros(5, 1)
    out = SimpleNamespace(log_probs=log_probs[:, None], entropy=zeros, mean_logits=zeros)
    trainer = MagicMock(
        aux_loss_enabled=False, calculate_KL=True, precompute_ref_logps=True, loss_type="kto", beta=chosen.beta,
        desirable_weight=chosen.desirable_weight, undesirable_weight=chosen.undesirable_weight,
    )  # fmt: skip
    trainer.accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer._compute_kl_logps = lambda *_: torch.tensor(OTHERS + shift)
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(5, 2, dtype=torch.int64), "completion_mask": torch.tensor([[0, 1]] * 5),
        "attention_mask": torch.ones(5, 2), "label": torch.tensor(DESIRABLE), "ref_logps": torch.tensor(REFERENCE),
        "ref_KL_logps": torch.tensor(REFERENCE_OTHERS),
    }  # fmt: skip
    loss = trl.KTOTrainer._compute_loss(trainer, lambda **_: out, inputs, False)
    loss.backward()
    losses, grads = ours(shift, chosen)
    assert float(losses.mean()) == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(grads / 5, log_probs.grad.numpy(), rtol=1e-4, atol=1e-8)


def test_far_apart_log_probabilities_stay_finite() -> None:
    result = kto(
        LabeledAnswers(*(mx.array(x) for x in ([-1e4, -1e4], [-1.0, -1.0], [1.0, 0.0])), mx.array(0.0)),
        PreferenceConfig(),
    )
    assert np.array(result.losses).tolist() == [1.0, 0.0] and np.isfinite(np.array(result.grads)).all()
