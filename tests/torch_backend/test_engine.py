"""The PyTorch training step: results, precision, failures, state and compilation."""

import math
from typing import Any

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.data.windows import Batch
from anarchobot.tasks.engines import open_engine
from anarchobot.training.engine import LossScale
from anarchobot.training.mlx_engine import MLXEngine
from tests.torch_backend.settings import batch, config, train

torch = pytest.importorskip("torch")

from anarchobot.torch_backend import engine, loss, model  # noqa: E402
from anarchobot.torch_backend.device import default_precision  # noqa: E402
from anarchobot.torch_backend.engine import TorchEngine  # noqa: E402
from tests.torch_backend.test_model import TensorRecorder  # noqa: E402

NO_LIMIT = math.inf  # as a norm limit
State = dict[str, np.ndarray]


def assert_same(got: State, wanted: State, but: tuple[str, ...] = ()) -> None:
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        if name not in but:
            np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("optimizer", ["muon_adamw", "adamw"])
def test_learns_to_count(optimizer: str) -> None:
    losses = train(TorchEngine(config(optimizer=optimizer)), range(1, 101))
    assert losses[0] == pytest.approx(math.log(61), rel=0.05)
    assert np.mean(losses[-10:]) < 1.5


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    """Also with unevenly spread ignored targets, where a mean of means would weight tokens differently."""
    whole = batch(1, 4, documents=True)
    whole.targets[0, 1, 3:] = -1
    parts = Batch(*(x.reshape(4, 1, 16) for x in (whole.inputs, whole.targets, whole.segments)))
    one, four = TorchEngine(config()), TorchEngine(config())
    a, b = one.train_step(whole, 1, 0.01, 0.9, NO_LIMIT), four.train_step(parts, 1, 0.01, 0.9, NO_LIMIT)
    assert a.tokens == b.tokens == 64 - 3 - 13
    assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-5)
    for name, p in one.state().items():
        np.testing.assert_allclose(p, four.state()[name], atol=5e-5, err_msg=name)


def test_loss_is_the_mean_before_the_update_and_equals_the_eval_loss() -> None:
    trained, rows = TorchEngine(config()), batch(2, 3)
    total, tokens = trained.eval_step(rows)
    assert tokens == 96
    assert trained.train_step(rows, 1, 0.01, 0.9, NO_LIMIT).loss == pytest.approx(total / tokens, rel=1e-5)


def test_document_mask_trains_like_separate_rows() -> None:
    rows = batch(1, 2, 8)
    segments = np.repeat([[[0, 1]]], 8, axis=2).astype(np.int32)
    joined = Batch(rows.inputs.reshape(1, 1, 16), rows.targets.reshape(1, 1, 16), segments)
    a, b = TorchEngine(config()), TorchEngine(config())
    first, second = a.train_step(rows, 1, 0.01, 0.9, NO_LIMIT), b.train_step(joined, 1, 0.01, 0.9, NO_LIMIT)
    assert (first.loss, first.grad_norm) == pytest.approx((second.loss, second.grad_norm), rel=1e-5)


def test_gradients_are_clipped_to_the_global_norm() -> None:
    """Read from the second moment, g squared. The norm before clipping is reported."""
    made = [TorchEngine(config(optimizer="adamw", max_grad_norm=limit)) for limit in (0.01, None)]
    norms = [one.train_step(batch(1, 2), 1, 0.0, 0.9, NO_LIMIT).grad_norm for one in made]
    assert norms[0] == norms[1] > 0.01

    def norm_from_moments(one: TorchEngine) -> float:
        second = [v for name, v in one.state().items() if name.startswith("optimizer/adamw.second/")]
        return math.sqrt(sum(float(v.sum()) for v in second) / (1 - 0.95))

    assert [norm_from_moments(one) for one in made] == pytest.approx([0.01, norms[1]], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"optimizer": "adamw", "precision": "bfloat16"},
        {"precision": "float16", "ema_decay": 0.9},
    ],
    ids=str,
)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(settings: dict[str, Any]) -> None:
    """With dropout and accumulation; random numbers drawn in between, as for a sample, have no effect."""
    chosen = config({"dropout": 0.3}, **settings)
    straight, resumed = TorchEngine(chosen), TorchEngine(chosen)
    losses = train(straight, range(1, 4))
    middle = straight.state()
    losses += train(straight, range(4, 7))
    resumed.load_state(middle)
    torch.manual_seed(99)
    assert train(resumed, range(4, 7)) == losses[3:]
    assert_same(resumed.state(), straight.state())


def test_state_is_not_changed_by_later_steps() -> None:
    trained = TorchEngine(config(ema_decay=0.9))
    before = trained.state()
    kept = {name: a.copy() for name, a in before.items()}
    train(trained, range(1, 3))
    assert_same(before, kept)
    trained.load_state(kept)
    assert_same(trained.state(), before)


@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer": "adamw"}, {"normuon": False}, {"ema_decay": 0.9}, {"precision": "float16"}],
    ids=str,
)
def test_initial_state_equals_that_of_the_mlx_engine(settings: dict[str, Any]) -> None:
    chosen = config({"qk_norm": True, "tie_embeddings": False}, **settings)
    ours, theirs = TorchEngine(chosen).state(), MLXEngine(chosen).state()
    assert list(ours) == list(theirs)
    assert {n: (a.shape, a.dtype) for n, a in ours.items()} == {n: (a.shape, a.dtype) for n, a in theirs.items()}
    assert_same(ours, theirs)


def test_state_of_another_optimizer_or_model_is_rejected_and_not_loaded() -> None:
    trained = TorchEngine(config())
    before = trained.state()
    with pytest.raises(
        UserError,
        match=r"optimizer/muon.momentum/.* the checkpoint has missing, this run needs \[.*set train.optimizer",
    ):
        trained.load_state(TorchEngine(config(optimizer="adamw")).state())
    with pytest.raises(
        UserError, match=r"params/model.embed_tokens.weight: the checkpoint has \[.*, 16\], this run needs"
    ):
        trained.load_state(TorchEngine(config({"d_model": 16})).state())
    assert_same(trained.state(), before)


def test_non_finite_step_changes_only_the_loss_scale() -> None:
    for precision, scale in (("float16", 2.0**16), ("float16", 1.0), ("float32", 1.0)):
        trained = TorchEngine(config(precision=precision))
        train(trained, range(1, 3))
        broken = trained.state()
        broken["params/model.layers.0.mlp.up_proj.weight"][0, 0] = np.inf
        if precision == "float16":
            broken["loss_scale"] = np.array(scale)
        trained.load_state(broken)
        result = trained.train_step(batch(1, 2), 3, 0.01, 0.9, NO_LIMIT)
        assert not result.finite and not result.applied
        assert result.overflow == (scale > 1)  # a scale of 1 cannot be the cause
        after = trained.state()
        assert_same(after, broken, but=("loss_scale", "loss_scale_streak"))
        if precision == "float16":
            assert after["loss_scale"] == max(1.0, scale / 2) and after["loss_scale_streak"] == 0


def test_excessive_loss_scale_is_halved_until_steps_succeed() -> None:
    trained = TorchEngine(config(precision="float16"))
    trained._loss_scale = LossScale(2.0**24)
    results = [trained.train_step(batch(1, 2, seed=s), s, 0.01, 0.9, NO_LIMIT) for s in range(1, 12)]
    skipped = [r.overflow for r in results]
    assert skipped[0] and skipped == sorted(skipped, reverse=True) and results[-1].applied
    assert trained.state()["loss_scale"] == 2.0 ** (24 - sum(skipped))
    assert trained.state()["updates"] == 11 - sum(skipped)


def test_norm_above_the_limit_changes_nothing() -> None:
    trained = TorchEngine(config(ema_decay=0.5))
    train(trained, range(1, 3))
    before = trained.state()
    norm = trained.train_step(batch(1, 2), 3, 0.01, 0.9, 1e-6).grad_norm
    result = trained.train_step(batch(1, 2), 3, 0.01, 0.9, 0.999 * norm)
    assert (result.applied, result.finite, result.overflow, result.grad_norm) == (False, True, False, norm)
    assert_same(trained.state(), before)
    assert trained.train_step(batch(1, 2), 3, 0.01, 0.9, norm).applied


@pytest.mark.parametrize(
    "words", ["DefaultCPUAllocator", "MPS backend out of memory (9 GB)", "CUDA", "Invalid buffer size: 9 GB"]
)
def test_out_of_memory_in_the_second_micro_batch_changes_nothing(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU allocator's own error and those of MPS and CUDA. The following steps are unaffected."""
    trained, other = TorchEngine(config()), TorchEngine(config())
    before = trained.state()
    plain, calls = loss.add_gradients, []

    def allocate_too_much(*args: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) < 2:
            return plain(*args, **how)
        if words == "CUDA":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if words == "DefaultCPUAllocator":
            return torch.empty(2**55)
        raise RuntimeError(words)

    monkeypatch.setattr(engine, "add_gradients", allocate_too_much)
    with pytest.raises(MemoryError, match=words.partition(" (")[0]) as caught:
        trained.train_step(batch(2, 2), 1, 0.01, 0.9, NO_LIMIT)
    assert caught.value.__context__ is None  # its traceback would keep the activations alive
    assert all(p.grad is None for p in trained.params.values())
    assert_same(trained.state(), before)
    monkeypatch.setattr(engine, "add_gradients", plain)
    assert train(trained, range(1, 3)) == train(other, range(1, 3))


def test_other_runtime_errors_are_not_memory_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **how: Any) -> Any:
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(engine, "add_gradients", broken)
    with pytest.raises(RuntimeError, match="sizes"):
        TorchEngine(config()).train_step(batch(1, 1), 1, 0.01, 0.9, NO_LIMIT)


def test_ema_weights_are_evaluated_and_used() -> None:
    """Against an average computed by hand."""
    averaging, plain = TorchEngine(config(ema_decay=0.5)), TorchEngine(config())
    average = {n: p.detach().numpy().copy() for n, p in plain.params.items()}
    for step in range(1, 5):
        for one in (averaging, plain):
            train(one, range(step, step + 1))
        decay = min(0.5, (1 + step) / (10 + step))
        average = {n: decay * a + (1 - decay) * plain.params[n].detach().numpy() for n, a in average.items()}
    for name, p in averaging.weights.items():
        np.testing.assert_allclose(p.numpy(), average[name], atol=1e-6)
    usual = TorchEngine(config())  # without EMA, training continues from the saved weights
    usual.load_state(averaging.state())
    assert usual.eval_step(batch(1, 2)) == averaging.eval_step(batch(1, 2)) != plain.eval_step(batch(1, 2))


def test_dropout_depends_on_step_micro_batch_and_seed_and_is_off_in_evaluation() -> None:
    same_rows = batch(2, 1)
    for rows in (same_rows.inputs, same_rows.targets):
        rows[1] = rows[0]
    first = TorchEngine(config({"dropout": 0.5})).state()

    def loss(rows: Batch, step: int, seed: int = 0) -> float:
        trained = TorchEngine(config({"dropout": 0.5}, seed=seed))
        trained.load_state(first)
        assert trained.eval_step(rows) == trained.eval_step(rows)
        return trained.train_step(rows, step, 0.01, 0.9, NO_LIMIT).loss

    alone = Batch(same_rows.inputs[:1], same_rows.targets[:1])
    assert loss(alone, 1) == loss(alone, 1)
    assert len({loss(alone, 1), loss(same_rows, 1), loss(alone, 2), loss(alone, 1, seed=1)}) == 4


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_like_float32(precision: str) -> None:
    """Master weights and moments stay float32 at any precision, and nothing is float64."""
    half, full = TorchEngine(config(precision=precision)), TorchEngine(config())
    with TensorRecorder() as seen:
        losses = train(half, range(1, 4), lr=0.003)
        half.eval_step(batch(1, 2))
        half.load_state(half.state())
    losses += train(half, range(4, 41), lr=0.003)
    wanted = train(full, range(1, 41), lr=0.003)
    assert wanted[-1] < 3.2
    assert losses == pytest.approx(wanted, abs=0.1)
    assert {str(a.dtype) for n, a in half.state().items() if "/" in n} == {"float32"}
    assert half.dtype in seen.dtypes and torch.float64 not in seen.dtypes


def test_update_is_float32() -> None:
    trained = TorchEngine(config(precision="float16", ema_decay=0.9))
    _, grads = trained._accumulate_gradients(batch(1, 2), 1, 1.0)
    with TensorRecorder() as seen:
        trained._apply_update(grads, 1.0, 0.01, 0.9)
        trained._update_average(0.9)
    assert seen.dtypes - {torch.bool} == {torch.float32}


def test_missing_compiler_falls_back_to_eager_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **how: Any) -> Any:
        def call(*args: Any) -> Any:
            raise RuntimeError("\n  No C++ compiler found\nTraceback")

        return call

    monkeypatch.setattr(model.torch, "compile", broken)
    trained, plain = TorchEngine(config(compile=True)), TorchEngine(config())
    assert not trained.compiled
    (note,) = trained.warnings
    assert "train.compile" in note and "(RuntimeError: No C++ compiler found)" in note
    assert train(trained, range(1, 3)) == train(plain, range(1, 3))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised inside the compiler
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.faults)])
def test_compiled_step_equals_the_eager_step(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward passes with dropout, checkpointing and query blocks compile without a graph break. The
    default suite runs the traced graph in eager mode; the long one generates code."""
    whole = torch.compile
    monkeypatch.setattr(model.torch, "compile", lambda f, **how: whole(f, **how, backend=backend, fullgraph=True))
    how = {"gradient_checkpointing": True, "attention_block": 8}
    shape = {"dropout": 0.2, "n_kv_heads": 2, "qk_norm": True}
    trained, plain = TorchEngine(config(shape, compile=True, **how)), TorchEngine(config(shape, **how))
    assert trained.warnings == []
    assert trained.compiled
    assert train(trained, range(1, 4)) == pytest.approx(train(plain, range(1, 4)), rel=1e-5)
    assert trained.eval_step(batch(1, 2)) == pytest.approx(plain.eval_step(batch(1, 2)), rel=1e-5)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="this machine has a GPU")
def test_missing_gpu_is_an_error() -> None:
    with pytest.raises(UserError, match=r"train.device: gpu, but PyTorch finds no GPU"):
        TorchEngine(config(device="gpu"))
    assert TorchEngine(config(device="auto")).device.type == "cpu"


@pytest.mark.parametrize(("mps", "cuda", "chosen"), [(True, True, "mps"), (False, True, "cuda"), (False, False, "cpu")])
def test_device_order_is_mps_cuda_cpu(mps: bool, cuda: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert engine.choose_device("auto").type == chosen
    assert engine.choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("chip", "precision"),
    [
        ("Apple M1", "float16"),
        ("Apple M2 Ultra", "float16"),
        ("Apple M3 Pro", "bfloat16"),
        ("Apple M5", "bfloat16"),
        ("Apple M10 Max", "bfloat16"),
        ("Apple Paravirtual device", "float16"),
    ],
)
def test_default_precision_on_mps_is_bfloat16_from_m3_on(
    chip: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: chip)
    assert default_precision(torch.device("mps")) == precision


def test_default_precision_of_other_devices() -> None:
    assert default_precision(torch.device("cuda")) == "bfloat16"
    assert default_precision(torch.device("cpu")) == TorchEngine(config()).precision == "float32"


def test_peak_memory_on_a_cpu_is_that_of_the_process() -> None:
    trained = TorchEngine(config())
    before = trained.peak_memory_gb()
    block = torch.ones(int((before + 0.1) * 1e9 / 4))
    assert 0.05 < before < trained.peak_memory_gb() <= before + 0.1 + before + 0.5
    del block


def test_memory_in_use_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = TorchEngine(config())
    assert trained.memory_gb() == {}
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 2 * 10**9)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5 * 10**9)
    monkeypatch.setattr(trained, "device", torch.device("mps"))
    assert trained.memory_gb() == {"active_memory_gb": 2.0, "cache_memory_gb": 3.0}


def test_other_architectures_are_refused() -> None:
    """This backend has the Llama family only."""
    chosen = config(backend="torch")
    other = chosen.model_copy(update={"model": chosen.model.model_copy(update={"architecture": "gemma"})})
    with pytest.raises(UserError, match=r"train\.backend: torch has no gemma: set train\.backend to mlx"):
        open_engine(other)
    with pytest.raises(UserError, match=r"torch has no model\.attention_softcap: set train\.backend to mlx"):
        open_engine(config({"attention_softcap": 50.0}, backend="torch"))
