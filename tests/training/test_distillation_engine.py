"""Training with a teacher: loss and gradients against PyTorch's model and autograd, and the teacher's predictions."""

import math
from typing import Any

import numpy as np
import pytest

from anarchobot.config.schema import Config
from anarchobot.data.teacher_cache import TeacherBatch
from anarchobot.data.windows import Batch
from anarchobot.model.parameters import init_parameters
from anarchobot.numerics.device import gpu_path
from anarchobot.training.distillation_engine import DistillationEngine, Teacher

VOCAB, LENGTH, K = 31, 12, 5


def config(distillation: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **train: Any) -> Config:
    return Config.model_validate(
        {
            "model": {
                "vocab_size": VOCAB, "n_layers": 2, "d_model": 16, "n_heads": 2, "dropout": 0.0, **(model or {}),
            },
            "data": {"seq_len": LENGTH},
            "train": {
                "device": "cpu", "micro_batch_size": 2, "lr": 0.01, "min_lr": 0.0, "cpu_threads": 1,
                "optimizer": "adamw", "max_grad_norm": None, "weight_decay": 0.0, "teacher": "x", "loss_chunk": 10,
                **train,
            },
            "distillation": {"top_k": K, **(distillation or {})},
        }
    )  # fmt: skip


def plain(micro_batches: int = 2, rows: int = 2, segments: bool = True) -> Batch:
    rng = np.random.default_rng(1)
    inputs = rng.integers(0, VOCAB, (micro_batches, rows, LENGTH)).astype(np.int32)
    targets = np.where(rng.random(inputs.shape) < 0.3, -100, np.roll(inputs, -1, axis=2)).astype(np.int32)
    targets[..., -3:] = -100
    documents = np.repeat(np.arange(3), LENGTH // 3).astype(np.int32)
    return Batch(inputs, targets, np.broadcast_to(documents, inputs.shape).copy() if segments else None)


def taught(chosen: Config, batch: Batch) -> TeacherBatch:
    """With the predictions of a random model."""
    model = chosen.model.model_copy(update={"n_layers": 1})
    teacher = Teacher({n: 8 * a for n, a in init_parameters(model, 9).items()}, model, chosen, "float32")
    k = chosen.distillation.top_k
    ids = np.zeros((*batch.targets.shape, k), np.uint16)
    log_probs = np.zeros((*batch.targets.shape, k + 1), np.float16)
    for i, targets in enumerate(batch.targets):
        found = teacher.top_log_probs(batch.map(lambda x, i=i: x[i]))
        ids[i][targets >= 0], log_probs[i][targets >= 0] = found
    return TeacherBatch(batch.inputs, batch.targets, batch.segments, teacher_ids=ids, teacher_log_probs=log_probs)


CASES: list[dict[str, Any]] = [
    {"weight": 0.3},
    {"weight": 1.0, "temperature": 2.0},
    {"loss": "reverse_kl", "weight": 0.6, "temperature": 0.7},
    {"top_k": VOCAB, "weight": 0.5},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_loss_and_gradients_match_pytorch(settings: dict[str, Any], softcap: float | None) -> None:
    """After one AdamW step, the first moment is a tenth of the gradient, which can so be read from the state."""
    torch = pytest.importorskip("torch")
    from anarchobot.torch_backend.loss import logits
    from anarchobot.torch_backend.model import head_name, hidden_states

    chosen = config(settings, {"logit_softcap": softcap})
    batch = taught(chosen, plain(segments=False))
    weights = {name: 3 * a for name, a in init_parameters(chosen.model, 3).items()}
    engine = DistillationEngine(chosen, weights)
    result = engine.train_step(batch, 1, 0.0, 0.9, math.inf)
    gradients = {n.removeprefix("optimizer/adamw.first/"): a * 10 for n, a in engine.state().items() if "first" in n}

    params = {n: torch.tensor(a).requires_grad_() for n, a in weights.items()}
    tokens, targets = (torch.tensor(x.reshape(-1, LENGTH).astype(np.int64)) for x in (batch.inputs, batch.targets))
    hidden = hidden_states(params, tokens, chosen.model)
    z = logits(hidden.flatten(0, 1), params[head_name(chosen.model)], chosen.model)
    scored = targets.flatten() >= 0
    cross_entropy = torch.nn.functional.cross_entropy(z[scored], targets.flatten()[scored])

    distillation, k = chosen.distillation, chosen.distillation.top_k
    ids = torch.tensor(batch.teacher_ids.reshape(-1, k).astype(np.int64))[scored]
    q = torch.tensor(batch.teacher_log_probs.reshape(-1, k + 1).astype(np.float32))[scored].softmax(dim=1)
    p = (z[scored] / distillation.temperature).softmax(dim=1)
    of_ids = p.gather(1, ids)
    others = (p * torch.ones_like(p).scatter(1, ids, 0.0)).sum(1, keepdim=True)
    p = torch.cat([of_ids, others], dim=1)
    if k == VOCAB:  # there are no others
        p, q = p[:, :-1], q[:, :-1]
    p, q = (p, q) if distillation.loss == "forward_kl" else (q, p)
    kl = (torch.special.xlogy(q, q) - torch.special.xlogy(q, p)).sum(1).mean()
    loss = (1 - distillation.weight) * cross_entropy + distillation.weight * distillation.temperature**2 * kl
    loss.backward()

    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.extra == pytest.approx({"cross_entropy": cross_entropy.item(), "kl": kl.item()}, rel=1e-5)
    for name, p in params.items():
        largest = float(p.grad.abs().max())
        np.testing.assert_allclose(gradients[name], p.grad.numpy(), atol=1e-4 * largest, err_msg=name)


@pytest.mark.parametrize(
    "train",
    [{"cpu_threads": 2}, {"gradient_checkpointing": True}, {"compile": True}, {"technique": "autodiff"}, {"gpu": True}],
    ids=str,
)
def test_threads_checkpointing_compilation_and_other_paths_give_the_same_result(train: dict[str, Any]) -> None:
    batch = taught(config(), plain())

    def results(**train: Any) -> Any:
        engine = DistillationEngine(config(**train))
        return [engine.train_step(batch, step, 0.01, 0.9, math.inf) for step in range(1, 4)]

    expected = results()
    if train.pop("gpu", False):
        with gpu_path():
            found = results(precision="float32", compile=False)
    else:
        found = results(**train)
    for a, b in zip(expected, found, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4) and b.grad_norm == pytest.approx(a.grad_norm, rel=1e-3)
        assert b.extra == pytest.approx(a.extra, rel=1e-4)


def test_validation_is_the_cross_entropy_and_micro_batches_do_not_matter() -> None:
    """Of batches with and without a teacher; and one row for two workers."""
    engine, batch = DistillationEngine(config(cpu_threads=2)), taught(config(), plain(1, 4))
    assert engine.workers.count == 2
    total, count = engine.eval_step(plain(1, 4))
    step = engine.train_step(batch, 1, 0.0, 0.9, 0.0)
    assert step.extra["cross_entropy"] == pytest.approx(total / count, rel=1e-5)
    ones = batch.map(lambda x: x.reshape(4, 1, *x.shape[2:]))
    again = engine.train_step(ones, 1, 0.0, 0.9, 0.0)
    assert again.loss == pytest.approx(step.loss, rel=1e-5) and again.grad_norm == pytest.approx(
        step.grad_norm, rel=1e-4
    )


def test_the_teachers_predictions_are_those_of_its_logits() -> None:
    """With segments, padding, more rows in its embedding than tokens, two threads, and a temperature."""
    torch = pytest.importorskip("torch")
    from anarchobot.torch_backend.loss import logits
    from anarchobot.torch_backend.model import head_name, hidden_states

    chosen = config({"temperature": 1.5}, cpu_threads=2)
    model = chosen.model.model_copy(update={"vocab_size": VOCAB + 9, "n_layers": 1})
    weights = {n: 8 * a for n, a in init_parameters(model, 4).items()}
    batch = plain(1, 3).map(lambda x: x[0])
    ids, log_probs = Teacher(weights, model, chosen, "float32").top_log_probs(batch)

    params = {n: torch.tensor(a) for n, a in weights.items()}
    tokens = torch.tensor(batch.inputs.astype(np.int64))
    hidden = hidden_states(params, tokens, model, segments=torch.tensor(batch.segments))
    z = logits(hidden.flatten(0, 1), params[head_name(model)], model)[batch.targets.reshape(-1) >= 0, :VOCAB]
    p = (z / 1.5).double().softmax(dim=1).numpy()
    assert ids.shape == (np.count_nonzero(batch.targets >= 0), K) and log_probs.dtype == np.float16
    np.testing.assert_array_equal(np.sort(ids), np.sort(np.argsort(-p, axis=1)[:, :K]))
    np.testing.assert_allclose(log_probs[:, :-1], np.log(np.take_along_axis(p, ids.astype(np.int64), 1)), rtol=1e-3)
    np.testing.assert_allclose(np.exp(log_probs.astype(np.float64)).sum(axis=1), 1, atol=3e-3)


def test_out_of_memory_in_the_teacher_raises_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher(init_parameters(config().model, 0), config().model, config(), "float32")

    def fails(*args: Any) -> Any:
        raise RuntimeError("[malloc] Unable to allocate 8 bytes.")

    monkeypatch.setattr(teacher, "_part", fails)
    with pytest.raises(MemoryError):
        teacher.top_log_probs(plain(1, 2).map(lambda x: x[0]))
