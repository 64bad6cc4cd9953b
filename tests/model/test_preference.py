"""Preference losses against float64 formulas, hand-computed values and trl's trainer on the same log-probabilities."""

import math
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import PreferenceConfig
from anarchobot.model.preference import Preferences, losses_and_grads, rewards

LOG_PROBS = np.array([[-20.0, -31.0], [-75.0, -60.5], [-3.2, -90.0], [-1.0, -1.5]])
REFERENCE = np.array([[-22.0, -30.0], [-70.0, -61.0], [-40.0, -80.0], [-1.0, -1.5]])
LENGTHS = np.array([[10, 12], [40, 25], [2, 50], [1, 1]])
CASES = [
    {"loss": "sigmoid", "beta": 0.1},
    {"loss": "sigmoid", "beta": 0.5, "label_smoothing": 0.2},
    {"loss": "sigmoid_norm", "beta": 5.0},
    {"loss": "ipo", "beta": 0.1},
    {"loss": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
    {"loss": "simpo", "beta": 2.5, "simpo_gamma": 0.25, "label_smoothing": 0.1},
    {"loss": "cpo", "beta": 0.1, "cpo_alpha": 1.0},
    {"loss": "cpo", "beta": 0.2, "cpo_alpha": 0.25, "label_smoothing": 0.1},
    {"loss": "orpo", "beta": 0.1},
    {"loss": "orpo", "beta": 1.0},
]


def settings(**values: Any) -> PreferenceConfig:
    return PreferenceConfig.model_validate(values)


def pairs(log_probs: Any = LOG_PROBS, reference: Any = REFERENCE) -> Preferences:
    return Preferences(*(mx.array(np.asarray(x, np.float32)) for x in (log_probs, LENGTHS, reference)))


def in_float64(log_probs: np.ndarray, chosen: PreferenceConfig) -> np.ndarray:
    """The formulas of the papers, in probabilities where the papers use them."""
    beta, smoothing = chosen.beta, chosen.label_smoothing
    if chosen.loss == "orpo":
        p = np.exp(log_probs / LENGTHS)
        odds = p / (1 - p)
        ratio = odds[:, 0] / odds[:, 1]
        return -np.log(p[:, 0]) - beta * np.log(ratio / (1 + ratio))
    log_ratios = log_probs - REFERENCE
    if chosen.loss == "ipo":
        mean = log_ratios / LENGTHS
        return (mean[:, 0] - mean[:, 1] - 0.5 / beta) ** 2
    h = {
        "sigmoid": beta * (log_ratios[:, 0] - log_ratios[:, 1]),
        "sigmoid_norm": beta / LENGTHS[:, 0] * log_ratios[:, 0] - beta / LENGTHS[:, 1] * log_ratios[:, 1],
        "simpo": beta / LENGTHS[:, 0] * log_probs[:, 0] - beta / LENGTHS[:, 1] * log_probs[:, 1] - chosen.simpo_gamma,
        "cpo": beta * log_probs[:, 0] - beta * log_probs[:, 1],
    }[chosen.loss]
    better, worse = 1 / (1 + np.exp(-h)), 1 / (1 + np.exp(h))
    losses = -(1 - smoothing) * np.log(better) - smoothing * np.log(worse)
    return losses - chosen.cpo_alpha * log_probs[:, 0] / LENGTHS[:, 0] if chosen.loss == "cpo" else losses


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_grads_match_the_formulas(case: dict[str, Any]) -> None:
    chosen = settings(**case)
    losses, grads = losses_and_grads(pairs(), chosen)
    np.testing.assert_allclose(np.array(losses), in_float64(LOG_PROBS, chosen), rtol=1e-5)
    for i in range(2):  # central differences
        step = np.zeros_like(LOG_PROBS)
        step[:, i] = 1e-5
        above, below = (in_float64(LOG_PROBS + s, chosen) for s in (step, -step))
        np.testing.assert_allclose(np.array(grads)[:, i], (above - below) / 2e-5, rtol=1e-4, atol=1e-6)


def test_initial_dpo_loss_is_log_2_and_its_slope_half_beta() -> None:
    losses, grads = losses_and_grads(pairs(reference=LOG_PROBS), settings())
    assert np.array(losses).tolist() == pytest.approx([math.log(2)] * 4)
    np.testing.assert_allclose(np.array(grads), [[-0.05, 0.05]] * 4, rtol=1e-6)
    assert np.array(rewards(pairs(reference=LOG_PROBS), settings())).tolist() == [[0.0, 0.0]] * 4


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ({"loss": "sigmoid"}, [0.2, -0.1]),
        ({"loss": "sigmoid_norm"}, [0.02, -0.1 / 12]),
        ({"loss": "ipo"}, [0.02, -0.1 / 12]),
        ({"loss": "simpo", "beta": 2.0}, [-4.0, -31 / 6]),  # without the margin
        ({"loss": "cpo"}, [-2.0, -3.1]),
        ({"loss": "orpo"}, [-0.2, -31 / 120]),
    ],
    ids=str,
)
def test_rewards(case: dict[str, Any], wanted: list[float]) -> None:
    np.testing.assert_allclose(np.array(rewards(pairs(), settings(**case)))[0], wanted, rtol=1e-5)


@pytest.mark.parametrize("loss", dict.fromkeys(c["loss"] for c in CASES))
def test_far_apart_log_probabilities_stay_finite(loss: str) -> None:
    losses, grads = losses_and_grads(pairs([[-1e4, -1.0]] * 4), settings(loss=loss, beta=0.5))
    assert np.isfinite(np.array(losses)).all() and np.isfinite(np.array(grads)).all()


@pytest.mark.parametrize("near_zero", [-1e-3, -1e-5, -1e-7, -1e-8, 0.0])
def test_orpo_odds_near_probability_1(near_zero: float) -> None:
    """log o(x) = x - log(-expm1(x)), with slope 1 / (1 - exp(x)) = -1 / expm1(x); both are infinite at 0."""
    beta = 0.1
    for log_probs in ([near_zero, -2.0], [-2.0, near_zero]):
        given = Preferences(*(mx.array([x], mx.float32) for x in (log_probs, [1, 1], [0, 0])))
        losses, grads = losses_and_grads(given, settings(loss="orpo", beta=beta))
        assert np.isfinite(np.array(grads)).all() and math.isfinite(losses.item())
        if not near_zero:
            continue
        chosen, rejected = np.array(log_probs, np.float32).astype(np.float64)
        h = (chosen - math.log(-math.expm1(chosen))) - (rejected - math.log(-math.expm1(rejected)))
        slope = beta / (1 + math.exp(h))  # derivative of -beta log sigmoid(h) with respect to -h
        assert losses.item() == pytest.approx(-chosen + beta * math.log1p(math.exp(-h)), rel=1e-5)
        wanted = [-1 + slope / math.expm1(chosen), -slope / math.expm1(rejected)]
        np.testing.assert_allclose(np.array(grads)[0], wanted, rtol=1e-5)


IN_TRL = [c for c in CASES if c["loss"] in ("simpo", "cpo", "orpo") or "label_smoothing" not in c]


@pytest.mark.parametrize("case", IN_TRL, ids=str)
def test_losses_and_grads_match_trl(case: dict[str, Any]) -> None:
    """Runs trl's code on these log-probabilities, with its gradient from PyTorch's autograd."""
    torch = pytest.importorskip("torch")
    chosen, log_probs = settings(**case), torch.tensor(LOG_PROBS, requires_grad=True)
    loss = (trl_dpo_loss if chosen.needs_reference else trl_loss_without_reference)(torch, log_probs, chosen)
    loss.backward()
    losses, grads = losses_and_grads(pairs(), chosen)
    assert float(losses.mean()) == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(np.array(grads) / len(LOG_PROBS), log_probs.grad.numpy(), rtol=1e-4, atol=1e-7)


def trl_dpo_loss(torch: Any, log_probs: Any, chosen: PreferenceConfig) -> Any:
    """On a fake model that returns the log-probabilities, spread over the tokens."""
    trl = pytest.importorskip("trl")
    width = int(LENGTHS.max()) + 1
    mask = np.concatenate([np.arange(width) > width - 1 - LENGTHS[:, i, None] for i in range(2)]).astype(np.int64)
    by_token = torch.cat([log_probs[:, i] / torch.tensor(LENGTHS[:, i]) for i in range(2)])[:, None]
    out = SimpleNamespace(
        log_probs=by_token * torch.tensor(mask[:, 1:]), entropy=torch.zeros(8, width - 1),
        mean_logits=torch.zeros(8, width - 1), is_top1=torch.zeros(8, width - 1, dtype=torch.bool),
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(8, width, dtype=torch.int64), "attention_mask": torch.ones(8, width),
        "completion_mask": torch.tensor(mask), "ref_chosen_logps": torch.tensor(REFERENCE[:, 0]),
        "ref_rejected_logps": torch.tensor(REFERENCE[:, 1]),
    }  # fmt: skip
    trainer = MagicMock(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[chosen.loss],
        loss_weights=[1.0], beta=chosen.beta, use_weighting=False, aux_loss_enabled=False, label_smoothing=0.0,
    )  # fmt: skip
    trainer.accelerator.gather_for_metrics = lambda x: x
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: out, inputs, False)


def trl_loss_without_reference(torch: Any, log_probs: Any, chosen: PreferenceConfig) -> Any:
    """Of the pairs one by one, for which trl's mean likelihood over the tokens of a batch is that of a pair."""
    name = "orpo" if chosen.loss == "orpo" else "cpo"
    Trainer = getattr(pytest.importorskip(f"trl.experimental.{name}"), f"{name.upper()}Trainer")
    trainer = MagicMock(
        alpha=0.0, beta=chosen.beta, label_smoothing=chosen.label_smoothing, aux_loss_enabled=False,
        loss_type="simpo" if chosen.loss == "simpo" else "sigmoid", simpo_gamma=chosen.simpo_gamma,
        cpo_alpha=chosen.cpo_alpha if chosen.loss == "cpo" else 0.0,
    )  # fmt: skip
    trainer.accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer.cpo_loss = lambda *args: Trainer.cpo_loss(trainer, *args)
    trainer.odds_ratio_loss = lambda *args: Trainer.odds_ratio_loss(trainer, *args)
    per_token, zero = log_probs / torch.tensor(LENGTHS), torch.zeros(1)
    given = log_probs if chosen.loss == "cpo" else per_token
    losses = []
    for i in range(len(LOG_PROBS)):
        forward = given[i, :1], given[i, 1:], zero, zero, -per_token[i, 0]
        trainer.concatenated_forward = lambda *_, forward=forward: forward
        losses.append(Trainer.get_batch_loss_metrics(trainer, None, {})[0])
    return torch.stack(losses).mean()
