"""Preference training: loss and gradients against PyTorch's model and autograd, and the metrics."""

import math
from typing import Any

import numpy as np
import pytest

from anarchobot.config.schema import Config
from anarchobot.data.conversations.preference_pairs import PairBatch
from anarchobot.model.parameters import init_parameters
from anarchobot.training.preference_engine import PreferenceEngine

VOCAB, LENGTH = 31, 12


def config(loss: str = "sigmoid", **train: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"vocab_size": VOCAB, "n_layers": 2, "d_model": 16, "n_heads": 2, "dropout": 0.0},
            "data": {"seq_len": LENGTH},
            "train": {
                "device": "cpu", "micro_batch_size": 2, "lr": 0.01, "min_lr": 0.0, "cpu_threads": 1,
                "optimizer": "adamw", "max_grad_norm": None, "weight_decay": 0.0, **train,
            },
            "preference": {
                "loss": loss, "beta": 0.3, "label_smoothing": 0.1 if loss in ("sigmoid", "simpo") else 0.0,
                "simpo_gamma": 0.7, "cpo_alpha": 0.4,
            },
        }
    )  # fmt: skip


def pairs(micro_batches: int = 2, rows: int = 2, none: int = 0) -> PairBatch:
    rng = np.random.default_rng(1)
    inputs = rng.integers(0, VOCAB, (micro_batches, rows, 2, LENGTH)).astype(np.int32)
    targets = np.roll(inputs, -1, axis=3)
    for i in np.ndindex(targets.shape[:3]):
        targets[i][: rng.integers(1, 5)] = -100  # the prompt
        targets[i][rng.integers(7, LENGTH + 1) :] = -100  # padding
    numbers = np.arange(micro_batches * rows).reshape(micro_batches, rows)
    if none:
        targets[:, -none:], numbers[:, -none:] = -100, -1
    reference = rng.normal(-30, 2, (micro_batches, rows, 2)).astype(np.float32)
    return PairBatch(inputs, targets, indices=numbers, ref_log_probs=reference)


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo", "simpo", "cpo", "orpo"])
def test_loss_and_gradients_match_pytorch(loss: str) -> None:
    """After one AdamW step, the first moment is a tenth of the gradient, which can so be read from the state."""
    torch = pytest.importorskip("torch")
    from anarchobot.torch_backend.loss import logits
    from anarchobot.torch_backend.model import head_name, hidden_states

    chosen, batch = config(loss), pairs()
    weights = init_parameters(chosen.model, 3)
    engine = PreferenceEngine(chosen, weights)
    result = engine.train_step(batch, 1, 0.0, 0.9, math.inf)
    gradients = {n.removeprefix("optimizer/adamw.first/"): a * 10 for n, a in engine.state().items() if "first" in n}

    params = {n: torch.tensor(a).requires_grad_() for n, a in weights.items()}
    tokens, targets = (torch.tensor(x.reshape(-1, LENGTH).astype(np.int64)) for x in (batch.inputs, batch.targets))
    hidden = hidden_states(params, tokens, chosen.model)
    z = logits(hidden.flatten(0, 1), params[head_name(chosen.model)], chosen.model).view(*tokens.shape, -1)
    by_token = z.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    log_probs, lengths = by_token.sum(1).view(-1, 2), (targets >= 0).sum(1).view(-1, 2)
    gained = log_probs - torch.tensor(batch.ref_log_probs.reshape(-1, 2))
    sigmoid = torch.nn.functional.logsigmoid
    if loss == "sigmoid":
        h = 0.3 * (gained[:, 0] - gained[:, 1])
        losses = -0.9 * sigmoid(h) - 0.1 * sigmoid(-h)
    elif loss == "sigmoid_norm":
        losses = -sigmoid(0.3 * ((gained / lengths)[:, 0] - (gained / lengths)[:, 1]))
    elif loss == "simpo":
        h = 0.3 * ((log_probs / lengths)[:, 0] - (log_probs / lengths)[:, 1]) - 0.7
        losses = -0.9 * sigmoid(h) - 0.1 * sigmoid(-h)
    elif loss == "cpo":
        losses = -sigmoid(0.3 * (log_probs[:, 0] - log_probs[:, 1])) - 0.4 * (log_probs / lengths)[:, 0]
    elif loss == "ipo":
        losses = ((gained / lengths)[:, 0] - (gained / lengths)[:, 1] - 1 / 0.6) ** 2
    else:
        p = (log_probs / lengths).exp()
        odds = p / (1 - p)
        losses = -p[:, 0].log() - 0.3 * sigmoid((odds[:, 0] / odds[:, 1]).log())
    losses.mean().backward()

    assert result.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    for name, p in params.items():
        largest = float(p.grad.abs().max())
        np.testing.assert_allclose(gradients[name], p.grad.numpy(), atol=1e-4 * largest, err_msg=name)
    np.testing.assert_allclose(engine.log_probs(batch).reshape(-1, 2), log_probs.detach().numpy(), rtol=1e-5)
    assert result.extra["chosen_log_prob"] == pytest.approx(log_probs[:, 0].mean().item(), rel=1e-5)


def test_metrics_are_means_over_pairs_without_padding() -> None:
    engine, batch = PreferenceEngine(config()), pairs(1, 4, none=1)
    found = engine.log_probs(batch)[0, :3]
    margins = 0.3 * ((found - batch.ref_log_probs[0, :3])[:, 0] - (found - batch.ref_log_probs[0, :3])[:, 1])
    total, count = engine.eval_step(batch)
    assert count == 3 and math.isfinite(total)
    judged = engine.eval_metrics()
    assert judged["val_reward_margin"] == pytest.approx(float(margins.mean()), rel=1e-4)
    assert judged["val_reward_accuracy"] == pytest.approx(float((margins > 0).mean()))
    assert engine.eval_metrics()["val_reward_margin"] == 0.0
    assert all(
        math.isfinite(PreferenceEngine(config(loss)).eval_step(batch)[0]) for loss in ("ipo", "simpo", "cpo", "orpo")
    )


@pytest.mark.parametrize("settings", [{"cpu_threads": 2}, {"gradient_checkpointing": True}, {"compile": True}], ids=str)
def test_threads_checkpointing_and_compilation_give_the_same_result(settings: dict[str, Any]) -> None:
    plain, other = (PreferenceEngine(config(**more)) for more in ({}, settings))
    results = [[e.train_step(pairs(), step, 0.01, 0.9, math.inf) for step in range(1, 4)] for e in (plain, other)]
    for a, b in zip(*results, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4) and b.grad_norm == pytest.approx(a.grad_norm, rel=1e-3)
    assert other.traces <= 3 or not other.compiled  # without existing sums, with them, the update


@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_fewer_pairs_than_workers(loss: str) -> None:
    """As when a micro-batch was halved after running out of memory."""
    one, two = (PreferenceEngine(config(loss, cpu_threads=n)) for n in (1, 2))
    assert two.workers.count == 2
    for batch in (pairs(4, 1), pairs(1, 1)):
        a, b = (engine.train_step(batch, 1, 0.0, 0.9, math.inf) for engine in (one, two))
        assert b.loss == pytest.approx(a.loss, rel=1e-6) and b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)
        assert b.extra == pytest.approx(a.extra, rel=1e-5)
        np.testing.assert_allclose(two.log_probs(batch), one.log_probs(batch), rtol=1e-6)


def test_retried_validation_batch_counts_once() -> None:
    """Seven pairs one by one, then in parts of two or three, one of them repeated; the last row is padding."""
    batch, engine = pairs(1, 7, none=1), PreferenceEngine(config())
    for stop in (1, 2, 3, 4, 5, 6, 7):
        engine.eval_step(batch.rows(stop - 1, stop))
    wanted = engine.eval_metrics()
    for start in (0, 3, 0, 2, 4, 6):
        engine.eval_step(batch.rows(start, min(7, start + (3 if start == 3 else 2))))
    assert engine.eval_metrics() == pytest.approx(wanted, rel=1e-5)


def test_out_of_memory_in_log_probabilities_raises_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = PreferenceEngine(config())

    def fails(*args: Any) -> Any:
        raise RuntimeError("[malloc] Unable to allocate 8 bytes.")

    monkeypatch.setattr(engine, "_token_log_probs", fails)
    with pytest.raises(MemoryError):
        engine.log_probs(pairs())


def test_micro_batches_of_pairs_give_the_gradient_of_the_whole_batch() -> None:
    whole, parts = pairs(1, 4), pairs(1, 4)
    halves = PairBatch(
        parts.inputs.reshape(2, 2, 2, LENGTH), parts.targets.reshape(2, 2, 2, LENGTH),
        indices=parts.indices.reshape(2, 2), ref_log_probs=parts.ref_log_probs.reshape(2, 2, 2),
    )  # fmt: skip
    a, b = (PreferenceEngine(config()).train_step(x, 1, 0.01, 0.9, math.inf) for x in (whole, halves))
    assert b.loss == pytest.approx(a.loss, rel=1e-6) and b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)


def test_rows_are_padded_to_a_few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pairs of about 130 tokens with data.seq_len 256. A compiled step is traced once for each length."""
    rng = np.random.default_rng(0)
    prompts, answers, positions = rng.integers(20, 61, (32, 1, 1)), rng.integers(10, 171, (32, 1, 2)), np.arange(256)
    ends = prompts + answers
    scored = (positions >= prompts[..., None]) & (positions < ends[..., None])
    batch = PairBatch(
        np.zeros(scored.shape, np.int32), np.where(scored, 1, -100).astype(np.int32),
        indices=np.arange(32)[:, None], ref_log_probs=np.zeros((32, 1, 2), np.float32),
    )  # fmt: skip
    long = config(compile=True, micro_batch_size=1)
    engine = PreferenceEngine(
        long.model_copy(
            update={
                "data": long.data.model_copy(update={"seq_len": 256}),
                "model": long.model.model_copy(update={"n_layers": 1}),
            }
        )
    )
    step, lengths = engine._micro_step, list[int]()

    def record(params: Any, frozen: Any, inputs: Any, *rest: Any) -> Any:
        lengths.append(inputs.shape[1])
        return step(params, frozen, inputs, *rest)

    monkeypatch.setattr(engine, "_micro_step", record)
    engine.train_step(batch, 1, 0.0, 0.9, math.inf)
    assert lengths == [32 * -(-int(end.max()) // 32) for end in ends]
    assert (2 * sum(lengths), int(ends.sum()), batch.inputs.size) == (11_008, 8_506, 16_384)
    assert set(lengths) == {64, 128, 160, 192, 224}
    assert engine.traces == 1 + 5 + 1  # without existing sums, with them, the update
