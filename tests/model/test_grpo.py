"""The loss of GRPO and its gradients against trl's trainer, and against float64 formulas."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import GRPOConfig
from anarchobot.model.grpo import CompletionTokens, group_advantages, grpo, token_weights

A, B, L = 2, 3, 5  # micro-batches, completions in each, tokens
LENGTHS = np.array([[5, 2, 4], [1, 3, 0]])  # 0: a masked completion
MASK = np.arange(L) < LENGTHS[..., None]
_rng = np.random.default_rng(3)
OLD = _rng.normal(-2, 0.7, (A, B, L))
LOG_PROBS = OLD + _rng.normal(0, 0.25, (A, B, L))  # about a third of the ratios are clipped
REFERENCE = OLD + _rng.normal(0, 0.5, (A, B, L))
ADVANTAGES = np.array([[1.2, -0.7, 0.4], [-1.5, 0.9, 0.3]])
CASES: list[dict[str, Any]] = [
    {"loss_type": loss, **more}
    for loss in ("grpo", "bnpo", "dr_grpo", "dapo")
    for more in (
        {},
        {"epsilon": 0.1, "epsilon_high": 0.28, "beta": 0.3},
        {"beta": 0.5, "use_bias_correction_kl": False, "max_completion_length": 7},
    )
]


def ours(log_probs: np.ndarray, settings: GRPOConfig) -> tuple[float, np.ndarray]:
    """The loss of the step and its gradient [A, B, L]."""
    arrays = [mx.array(x.astype(np.float32).reshape(-1, L)) for x in (log_probs, OLD, REFERENCE)]
    result = grpo(CompletionTokens(*arrays, mx.array(ADVANTAGES.reshape(-1, 1).astype(np.float32))), settings)
    weights = token_weights(LENGTHS, settings)[..., None] * MASK / LENGTHS.size
    losses, grads = (np.array(x).reshape(A, B, L) * weights for x in (result.losses, result.grads))
    return float(losses.sum()), grads


def values(case: dict[str, Any]) -> SimpleNamespace:
    """All settings of a case, read without GRPOConfig's attributes."""
    return SimpleNamespace(**{name: case.get(name, field.default) for name, field in GRPOConfig.model_fields.items()})


def in_float64(log_probs: np.ndarray, case: dict[str, Any]) -> float:
    """The formulas of the papers, completion by completion."""
    settings = values(case)
    high = settings.epsilon_high or settings.epsilon
    totals = np.zeros((A, B))
    for i in np.ndindex(A, B):
        for t in range(LENGTHS[i]):
            ratio = np.exp(log_probs[i][t] - OLD[i][t])
            bounded = min(max(ratio, 1 - settings.epsilon), 1 + high)
            kl = np.exp(REFERENCE[i][t] - log_probs[i][t]) - (REFERENCE[i][t] - log_probs[i][t]) - 1
            kl *= ratio if settings.use_bias_correction_kl else 1
            totals[i] += -min(ratio * ADVANTAGES[i], bounded * ADVANTAGES[i]) + settings.beta * kl
    if settings.loss_type == "grpo":
        return float((totals / np.maximum(LENGTHS, 1)).mean())
    if settings.loss_type == "bnpo":
        return float((totals.sum(axis=1) / LENGTHS.sum(axis=1)).mean())
    if settings.loss_type == "dr_grpo":
        return float(totals.sum() / (A * B * settings.max_completion_length))
    return float(totals.sum() / LENGTHS.sum())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_match_the_formulas(case: dict[str, Any]) -> None:
    loss, grads = ours(LOG_PROBS, GRPOConfig.model_validate(case))
    assert loss == pytest.approx(in_float64(LOG_PROBS, case), rel=1e-5, abs=1e-7)
    for i in np.ndindex(A, B, L):
        step = np.zeros_like(LOG_PROBS)
        step[i] = 1e-6
        slope = (in_float64(LOG_PROBS + step, case) - in_float64(LOG_PROBS - step, case)) / 2e-6
        assert grads[i] == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_match_trl(case: dict[str, Any]) -> None:
    """Runs trl's code, with its gradient from PyTorch's autograd, on a fake model that returns these log-probabilities.
    Each micro-batch is one of its accumulation steps."""
    torch, trl = pytest.importorskip("torch"), pytest.importorskip("trl")
    settings = values(case)
    trainer = MagicMock(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", use_vllm=False,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, current_gradient_accumulation_steps=A,
        beta=settings.beta, loss_type=settings.loss_type, epsilon_low=settings.epsilon,
        epsilon_high=settings.epsilon_high or settings.epsilon, max_completion_length=settings.max_completion_length,
        _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(
            delta=None, use_bias_correction_kl=settings.use_bias_correction_kl, steps_per_generation=A
        ),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
    )  # fmt: skip
    log_probs, total = torch.tensor(LOG_PROBS, requires_grad=True), torch.tensor(0.0)
    for i in range(A):
        trainer._get_per_token_logps_and_entropies = lambda *_, i=i, **__: (log_probs[i], torch.zeros(B, L), None)
        inputs = {
            "prompt_ids": torch.zeros(B, 1), "prompt_mask": torch.ones(B, 1), "completion_ids": torch.zeros(B, L),
            "completion_mask": torch.tensor(MASK[i]).long(), "advantages": torch.tensor(ADVANTAGES[i]),
            "old_per_token_logps": torch.tensor(OLD[i]), "ref_per_token_logps": torch.tensor(REFERENCE[i]),
            "num_items_in_batch": torch.tensor(LENGTHS.sum()),
        }  # fmt: skip
        total = total + trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    total.backward()
    loss, grads = ours(LOG_PROBS, GRPOConfig.model_validate(case))
    assert loss == pytest.approx(total.item(), rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(grads, log_probs.grad.numpy(), rtol=1e-4, atol=1e-8)


def test_clipping_stops_only_gradients_that_would_move_the_ratio_further() -> None:
    """A ratio of 1.5 is clipped if the advantage is positive, one of 0.5 if it is negative."""
    log_probs = mx.log(mx.array([[1.5, 0.5, 1.1], [1.5, 0.5, 1.1]]))
    zeros = mx.zeros((2, 3))
    result = grpo(CompletionTokens(log_probs, zeros, zeros, mx.array([[2.0], [-2.0]])), GRPOConfig())
    np.testing.assert_allclose(np.array(result.losses), [[-2.4, -1.0, -2.2], [3.0, 1.6, 2.2]], rtol=1e-6)
    np.testing.assert_allclose(np.array(result.grads), [[0, -1.0, -2.2], [3.0, 0, 2.2]], rtol=1e-6)
    assert np.array(result.clipped).tolist() == [[True, False, False], [False, True, False]]


def test_advantages() -> None:
    """A group with equal rewards has none. The deviations are those of torch.std: sqrt(1/3), and 0.5345 of all."""
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    by_group = group_advantages(rewards, GRPOConfig())
    np.testing.assert_allclose(by_group[0], np.array([0.5, -0.5, -0.5, 0.5]) / (np.sqrt(1 / 3) + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(by_group[2], np.array([-0.25, -0.25, -0.25, 0.75]) / (0.5 + 1e-4), rtol=1e-6)
    assert by_group[1].tolist() == [0.0] * 4
    unscaled = group_advantages(rewards, GRPOConfig(scale_rewards="none"))
    np.testing.assert_allclose(unscaled, rewards - np.array([[0.5], [1.0], [0.25]]))
    of_all = np.sqrt(((rewards - 7 / 12) ** 2).sum() / 11)
    np.testing.assert_allclose(
        group_advantages(rewards, GRPOConfig(scale_rewards="batch")), unscaled / (of_all + 1e-4), rtol=1e-6
    )
