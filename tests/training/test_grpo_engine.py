"""GRPO's training step: loss and gradients against PyTorch's model and autograd, metrics and checkpoints."""

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import Config
from anarchobot.model.parameters import init_parameters
from anarchobot.training.grpo_engine import CompletionBatch, GRPOEngine

VOCAB, LENGTH = 31, 12
GRPO = {"rewards": ["number", "regex"], "regex": "x", "num_iterations": 2, "beta": 0.4, "epsilon_high": 0.3}


def config(grpo: dict[str, Any] | None = None, lora: dict[str, Any] | None = None, **train: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"vocab_size": VOCAB, "n_layers": 2, "d_model": 16, "n_heads": 2, "dropout": 0.0},
            "data": {"seq_len": LENGTH},
            "train": {
                "device": "cpu", "micro_batch_size": 2, "lr": 0.01, "min_lr": 0.0, "cpu_threads": 1,
                "optimizer": "adamw", "max_grad_norm": None, "weight_decay": 0.0, **train,
            },
            "grpo": {**GRPO, **(grpo or {})},
            "lora": lora or {},
        }
    )  # fmt: skip


def completions(micro_batches: int = 2, rows: int = 2) -> CompletionBatch:
    rng = np.random.default_rng(1)
    shape = (micro_batches, rows)
    inputs = rng.integers(0, VOCAB, (*shape, LENGTH)).astype(np.int32)
    targets = np.roll(inputs, -1, axis=2)
    for i in np.ndindex(shape):
        targets[i][: rng.integers(1, 5)] = -100  # the prompt
        targets[i][rng.integers(7, LENGTH + 1) :] = -100  # padding
    values = rng.integers(0, 2, (*shape, 2)).astype(np.float32)
    old, reference = (
        np.where(targets >= 0, rng.normal(-3.4, 0.3, targets.shape), 0).astype(np.float32) for _ in range(2)
    )
    return CompletionBatch(
        inputs,
        targets,
        old_log_probs=old,
        ref_log_probs=reference,
        advantages=rng.normal(0, 1, shape).astype(np.float32),
        rewards=values.sum(axis=-1),
        values=values,
        group_std=np.tile(np.array([0.0, 0.5], np.float32), micro_batches * rows // 2).reshape(shape),
        truncated=(np.arange(micro_batches * rows).reshape(shape) == 1).astype(np.float32),
    )


@pytest.mark.parametrize("grpo", [{}, {"num_iterations": 1, "loss_type": "grpo"}, {"mask_truncated_completions": True}])
def test_loss_and_gradients_match_pytorch(grpo: dict[str, Any]) -> None:
    """After one AdamW step, the first moment is a tenth of the gradient. With one step per completion, the old
    log-probabilities are the current ones, without a gradient."""
    torch = pytest.importorskip("torch")
    from anarchobot.torch_backend.loss import logits
    from anarchobot.torch_backend.model import head_name, hidden_states

    chosen, batch = config(grpo), completions()
    weights = init_parameters(chosen.model, 3)
    engine = GRPOEngine(chosen, weights)
    result = engine.train_step(batch, 1, 0.0, 0.9, math.inf)
    gradients = {n.removeprefix("optimizer/adamw.first/"): a * 10 for n, a in engine.state().items() if "first/" in n}

    params = {n: torch.tensor(a).requires_grad_() for n, a in weights.items()}
    tokens, targets, old, reference = (
        torch.tensor(x.reshape(-1, LENGTH))
        for x in (
            batch.inputs.astype(np.int64),
            batch.targets.astype(np.int64),
            batch.old_log_probs,
            batch.ref_log_probs,
        )
    )
    hidden = hidden_states(params, tokens, chosen.model)
    z = logits(hidden.flatten(0, 1), params[head_name(chosen.model)], chosen.model).view(*tokens.shape, -1)
    log_probs = z.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    mask, advantages = (targets >= 0).float(), torch.tensor(batch.advantages.reshape(-1, 1))
    if grpo.get("mask_truncated_completions"):
        mask[1] = 0
    ratio = (log_probs - (log_probs.detach() if grpo.get("num_iterations") == 1 else old)).exp()
    kl = (reference - log_probs).exp() - (reference - log_probs) - 1
    losses = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages) + 0.4 * ratio * kl
    if grpo.get("loss_type") == "grpo":
        loss = ((losses * mask).sum(1) / mask.sum(1)).mean()
    else:
        loss = (losses * mask).sum() / mask.sum()
    loss.backward()

    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, p in params.items():
        largest = float(p.grad.abs().max())
        np.testing.assert_allclose(gradients[name], p.grad.numpy(), atol=1e-4 * largest, err_msg=name)
    scored = (targets >= 0).float()
    assert result.extra["kl"] == pytest.approx(((kl * scored).sum() / scored.sum()).item(), rel=1e-4)
    assert result.extra["entropy"] == pytest.approx((-(log_probs * scored).sum() / scored.sum()).item(), rel=1e-5)
    clipped = ((ratio > 1.3) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert result.extra["clip_ratio"] == pytest.approx(((clipped * scored).sum() / scored.sum()).item())
    assert (result.extra["clip_ratio"] > 0) == (grpo.get("num_iterations") != 1)


def test_metrics_of_a_batch() -> None:
    batch = completions()
    found = batch.metrics(["number", "regex"])
    assert found["reward"] == pytest.approx(float(batch.values.sum(axis=-1).mean()))
    assert found["reward_regex"] == pytest.approx(float(batch.values[..., 1].mean()))
    assert found["reward_std"] == pytest.approx(float(batch.rewards.std()))
    assert found["frac_reward_zero_std"] == 0.5 and found["truncated"] == 0.25
    assert found["completion_length"] == pytest.approx(float((batch.targets >= 0).sum(axis=-1).mean()))


@pytest.mark.parametrize(
    "settings", [{"cpu_threads": 2}, {"gradient_checkpointing": True}, {"compile": True}, {"technique": "autodiff"}],
    ids=str,
)  # fmt: skip
def test_threads_checkpointing_and_compilation_give_the_same_result(settings: dict[str, Any]) -> None:
    batch, engines = completions(), [GRPOEngine(config(**more)) for more in ({}, settings)]
    results = [[e.train_step(batch, step, 0.01, 0.9, math.inf) for step in range(1, 4)] for e in engines]
    for a, b in zip(*results, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4) and b.grad_norm == pytest.approx(a.grad_norm, rel=1e-3)
        assert b.extra == pytest.approx(a.extra, rel=1e-3)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_the_division_into_micro_batches_does_not_matter(loss: str) -> None:
    """As when memory runs out and micro-batches are halved."""
    whole = completions(1, 4)
    a, b = (
        GRPOEngine(config({"loss_type": loss})).train_step(x, 1, 0.01, 0.9, math.inf)
        for x in (whole, whole.flat().micro_batches(4, 1))
    )
    assert b.loss == pytest.approx(a.loss, rel=1e-5) and b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["all weights", "adapters"])
def test_log_probs_of_current_and_initial_weights(lora: dict[str, Any] | None) -> None:
    batch = completions()
    engine = GRPOEngine(config(lora=lora, cpu_threads=2), init_parameters(config().model, 3))
    before = engine.with_log_probs(batch)
    np.testing.assert_array_equal(before.old_log_probs, before.ref_log_probs)
    assert ((before.old_log_probs < 0) == (batch.targets >= 0)).all()
    for step in range(1, 4):
        engine.train_step(before, step, 0.05, 0.9, math.inf)
    after = engine.with_log_probs(batch)
    np.testing.assert_array_equal(after.ref_log_probs, before.ref_log_probs)
    assert np.abs(after.old_log_probs - before.old_log_probs).max() > 0.1
    unused = GRPOEngine(config({"beta": 0.0, "num_iterations": 1})).with_log_probs(batch)
    assert unused.old_log_probs is batch.old_log_probs and unused.ref_log_probs is batch.ref_log_probs


def test_completions_that_are_used_again_are_part_of_a_checkpoint() -> None:
    engine, batch = GRPOEngine(config()), completions().flat()
    engine.completions = 12, batch
    state = engine.state()
    other = GRPOEngine(config())
    other.load_state(state)
    assert other.completions is not None and other.completions[0] == 12
    for name, array in vars(batch).items():
        np.testing.assert_array_equal(getattr(other.completions[1], name), array)
    engine.completions = None
    other.load_state(engine.state())
    assert other.completions is None
    once = GRPOEngine(config({"num_iterations": 1}))
    once.completions = 12, batch
    assert not any("completions" in name for name in once.state())


def test_sampling_weights_are_in_the_dtype_of_the_step() -> None:
    for lora in (None, {"r": 4}):
        engine = GRPOEngine(config(lora=lora, precision="bfloat16"))
        cast = engine.sampling_weights(engine.weights)
        assert {name: p.dtype for name, p in cast.items()} == {
            name: mx.float32 if "lora_" in name else mx.bfloat16 for name in engine.weights
        }


def test_validation_loss_is_the_negative_mean_reward() -> None:
    batch = replace(completions(1, 4), rewards=np.array([[1.0, 0.5, 0.0, 0.25]], np.float32))
    assert GRPOEngine(config()).eval_step(batch) == (-1.75, 4)
