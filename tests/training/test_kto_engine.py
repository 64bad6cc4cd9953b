"""KTO's training step: loss and gradients against PyTorch's model and autograd, the KL estimate and the metrics."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from anarchobot.config.schema import Config
from anarchobot.data.conversations.labeled_answers import LabeledBatch
from anarchobot.model.parameters import init_parameters
from anarchobot.training.kto_engine import KTOEngine
from tests.training.test_preference_engine import LENGTH, config, pairs

WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}


def labeled(micro_batches: int = 2, rows: int = 2, none: int = 0, kl: float = 2.0) -> LabeledBatch:
    """`kl` is about that of the initial weights, from which the reference is not far."""
    batch = pairs(micro_batches, rows, none)
    labels = np.arange(micro_batches * rows).reshape(micro_batches, rows) % 3 == 0
    log_probs = KTOEngine(kto_config()).log_probs(batch)
    noise = np.random.default_rng(2).normal(0, 1, log_probs.shape).astype(np.float32)
    reference = log_probs + noise - np.array([0, kl], np.float32)
    return LabeledBatch(**{**vars(batch), "ref_log_probs": reference}, labels=labels)


def kto_config(**train: Any) -> Config:
    plain = config(**train)
    settings = plain.preference.model_copy(update={"loss": "kto", "label_smoothing": 0.0, **WEIGHTS})
    return plain.model_copy(update={"preference": settings})


@pytest.mark.parametrize("kl", [2.0, -2.0])
def test_loss_and_gradients_match_pytorch(kl: float) -> None:
    """After one AdamW step, the first moment is a tenth of the gradient. A negative estimate of the KL is 0."""
    torch = pytest.importorskip("torch")
    from anarchobot.torch_backend.loss import logits
    from anarchobot.torch_backend.model import head_name, hidden_states

    chosen, batch = kto_config(), labeled(kl=kl)
    weights = init_parameters(chosen.model, chosen.train.seed)
    engine = KTOEngine(chosen, weights)
    result = engine.train_step(batch, 1, 0.0, 0.9, math.inf)
    gradients = {n.removeprefix("optimizer/adamw.first/"): a * 10 for n, a in engine.state().items() if "first" in n}

    params = {n: torch.tensor(a).requires_grad_() for n, a in weights.items()}
    tokens, targets = (torch.tensor(x.reshape(-1, LENGTH).astype(np.int64)) for x in (batch.inputs, batch.targets))
    hidden = hidden_states(params, tokens, chosen.model)
    z = logits(hidden.flatten(0, 1), params[head_name(chosen.model)], chosen.model).view(*tokens.shape, -1)
    by_token = z.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    gained = by_token.sum(1).view(-1, 2) - torch.tensor(batch.ref_log_probs.reshape(-1, 2))
    point = gained[:, 1].mean().detach().clamp(min=0)
    desirable = torch.tensor(batch.labels.reshape(-1))
    good, bad = 1 - torch.sigmoid(0.3 * (gained[:, 0] - point)), 1 - torch.sigmoid(0.3 * (point - gained[:, 0]))
    losses = torch.where(desirable, 1.5 * good, 0.5 * bad)
    losses.mean().backward()

    assert (point.item() > 1) == (kl > 0) and result.extra["kl"] == pytest.approx(point.item(), rel=1e-4)
    assert result.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    for name, p in params.items():
        largest = float(p.grad.abs().max())
        np.testing.assert_allclose(gradients[name], p.grad.numpy(), atol=1e-4 * largest, err_msg=name)
    rewards = 0.3 * gained[:, 0].detach()
    assert result.extra["desirable_reward"] == pytest.approx(rewards[desirable].mean().item(), rel=1e-4)
    assert result.extra["undesirable_reward"] == pytest.approx(rewards[~desirable].mean().item(), rel=1e-4)
    margin = rewards[desirable].mean() - rewards[~desirable].mean()
    assert result.extra["reward_margin"] == pytest.approx(margin.item(), rel=1e-4)
    right = ((gained[:, 0] > point) == desirable).float().mean()
    assert result.extra["reward_accuracy"] == pytest.approx(right.item())


@pytest.mark.parametrize(
    "settings", [{"cpu_threads": 2}, {"gradient_checkpointing": True}, {"compile": True}, {"ema_decay": 0.9}], ids=str
)
def test_threads_checkpointing_compilation_and_averaging_give_the_same_result(settings: dict[str, Any]) -> None:
    """The KL divergence changes from step to step, also in a compiled step, and is that of the trained weights."""
    batch, engines = labeled(), [KTOEngine(kto_config(**more)) for more in ({}, settings)]
    results = [[e.train_step(batch, step, 0.01, 0.9, math.inf) for step in range(1, 4)] for e in engines]
    assert len({r.extra["kl"] for r in results[0]}) == 3
    for a, b in zip(*results, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4) and b.grad_norm == pytest.approx(a.grad_norm, rel=1e-3)
        assert b.extra == pytest.approx(a.extra, rel=1e-3)


def test_micro_batches_share_the_estimate_of_the_step() -> None:
    """As when memory runs out and micro-batches are halved; the last row is padding."""
    whole = labeled(1, 4, none=1)
    halves = replace(whole, **{name: x.reshape(2, 2, *x.shape[2:]) for name, x in vars(whole).items() if x is not None})
    a, b = (KTOEngine(kto_config()).train_step(x, 1, 0.01, 0.9, math.inf) for x in (whole, halves))
    assert a.extra["kl"] > 1
    assert b.loss == pytest.approx(a.loss, rel=1e-6) and b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)
    assert b.extra == pytest.approx(a.extra, rel=1e-5)


def test_validation_counts_answers_and_leaves_out_what_it_has_no_answers_for() -> None:
    engine, batch = KTOEngine(kto_config()), labeled(1, 4, none=1)
    total, count = engine.eval_step(batch)
    found = engine.eval_metrics()
    trained = KTOEngine(kto_config()).train_step(batch, 1, 0.0, 0.9, math.inf)
    assert count == 3 and total / count == pytest.approx(trained.loss, rel=1e-5)
    assert found == pytest.approx({f"val_{name}": x for name, x in trained.extra.items()}, rel=1e-5)
    engine.eval_step(batch.rows(0, 3))
    assert engine.eval_metrics() == pytest.approx(found, rel=1e-5)
    engine.eval_step(replace(batch, labels=np.ones_like(batch.labels)))
    assert set(engine.eval_metrics()) == {
        "val_reward_accuracy", "val_kl", "val_desirable_reward", "val_desirable_log_prob"
    }  # fmt: skip
