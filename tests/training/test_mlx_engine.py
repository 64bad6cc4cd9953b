"""The MLX training step: results, techniques that must not change them, precision, failures and state."""

import gc
import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config, GuardConfig
from anarchobot.data.windows import IGNORE, Batch
from anarchobot.numerics.cores import workers_for
from anarchobot.training.guard import Guard
from anarchobot.training.mlx_engine import MLXEngine


def config(model: dict[str, Any] | None = None, **train: Any) -> Config:
    shape = {"vocab_size": 61, "n_layers": 2, "d_model": 32, "n_heads": 4, "dropout": 0.0, **(model or {})}
    return Config.model_validate({"model": shape, "train": {"device": "cpu", "lr": 0.01, "min_lr": 0.0, **train}})


def random_batch(micro_batches: int, rows: int, length: int = 16, seed: int = 0) -> Batch:
    ids = np.random.default_rng(seed).integers(0, 61, (micro_batches, rows, length + 1)).astype(np.int32)
    return Batch(ids[..., :-1].copy(), ids[..., 1:].copy())


def parameters(engine: MLXEngine) -> dict[str, np.ndarray]:
    return {name: np.array(p) for name, p in engine.params.items()}


@pytest.mark.parametrize("optimizer", ["muon_adamw", "adamw"])
def test_overfits_one_batch(optimizer: str) -> None:
    engine = MLXEngine(config(optimizer=optimizer))
    batch = random_batch(1, 4)
    first = engine.train_step(batch, 1, 0.01, 0.9).loss
    for step in range(2, 120):
        last = engine.train_step(batch, step, 0.01, 0.9).loss
    assert first == pytest.approx(math.log(61), rel=0.05)
    assert last < 0.02


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    """Also with unevenly spread ignored targets, where a mean of means would weight tokens differently."""
    whole = random_batch(1, 4)
    whole.targets[0, 0, :] = IGNORE
    whole.targets[0, 1, 3:] = IGNORE
    parts = Batch(whole.inputs.reshape(4, 1, 16), whole.targets.reshape(4, 1, 16))
    one, four = MLXEngine(config()), MLXEngine(config())
    a, b = one.train_step(whole, 1, 0.01, 0.9), four.train_step(parts, 1, 0.01, 0.9)
    assert a.tokens == b.tokens == 64 - 16 - 13
    assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-5)
    for name, p in parameters(one).items():
        np.testing.assert_allclose(p, parameters(four)[name], atol=2e-5, err_msg=name)


def test_loss_is_the_mean_before_the_update_and_equals_the_eval_loss() -> None:
    engine, batch = MLXEngine(config()), random_batch(2, 3)
    total, tokens = engine.eval_step(batch)
    assert tokens == 96
    assert engine.train_step(batch, 1, 0.01, 0.9).loss == pytest.approx(total / tokens, rel=1e-5)


def test_gradients_are_clipped_to_the_global_norm() -> None:
    """AdamW's first step does not depend on the gradient's scale, so the test reads the second moment, g squared."""
    limit = 0.01
    clipped = MLXEngine(config(optimizer="adamw", max_grad_norm=limit))
    free = MLXEngine(config(optimizer="adamw", max_grad_norm=None))
    norms = [engine.train_step(random_batch(1, 2), 1, 0.0, 0.9).grad_norm for engine in (clipped, free)]
    assert norms[0] == norms[1] > limit  # the norm before clipping is reported

    def norm_from_moments(engine: MLXEngine) -> float:
        second = [v for name, v in engine.state().items() if name.startswith("optimizer/adamw.second/")]
        return math.sqrt(sum(float(v.sum()) for v in second) / (1 - 0.95))

    assert norm_from_moments(clipped) == pytest.approx(limit, rel=1e-4)
    assert norm_from_moments(free) == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("how", [{"gradient_checkpointing": True}, {"compile": True}], ids=str)
def test_checkpointing_and_compilation_give_the_same_weights(how: dict[str, bool]) -> None:
    plain, other = MLXEngine(config({"dropout": 0.2})), MLXEngine(config({"dropout": 0.2}, **how))
    for step in range(1, 4):
        batch = random_batch(2, 2, seed=step)
        a, b = plain.train_step(batch, step, 0.01, 0.9), other.train_step(batch, step, 0.01, 0.9)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
    for name, p in parameters(plain).items():
        np.testing.assert_allclose(p, parameters(other)[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("how", [{}, {"gradient_checkpointing": True}], ids=str)
def test_document_mask_trains_like_separate_rows(how: dict[str, bool]) -> None:
    """The same tokens, in one row with a document mask and in separate rows, give the same gradients."""
    rows = random_batch(1, 2, 8)
    joined = Batch(
        rows.inputs.reshape(1, 1, 16), rows.targets.reshape(1, 1, 16), np.repeat([[[0, 1]]], 8, axis=2).astype(np.int32)
    )
    a, b = MLXEngine(config(**how)), MLXEngine(config(**how))
    first, second = a.train_step(rows, 1, 0.01, 0.9), b.train_step(joined, 1, 0.01, 0.9)
    assert (first.loss, first.grad_norm) == pytest.approx((second.loss, second.grad_norm), rel=1e-5)
    assert a.eval_step(rows)[0] == pytest.approx(b.eval_step(joined)[0], rel=1e-4)


@pytest.mark.usefixtures("without_garbage")
def test_gradient_checkpointing_uses_less_memory() -> None:
    def peak(**how: Any) -> int:
        gc.collect()
        others = mx.get_active_memory()  # held by earlier tests
        engine = MLXEngine(config({"n_layers": 8, "d_model": 64}, **how))
        batch = random_batch(1, 8, 128)
        engine.train_step(batch, 1, 0.01, 0.9)
        mx.reset_peak_memory()
        for step in range(2, 10):  # the maximum of several steps: how far MLX allocates ahead depends on timing
            engine.train_step(batch, step, 0.01, 0.9)
        return mx.get_peak_memory() - others

    assert peak(gradient_checkpointing=True) < 0.75 * peak()


def test_chunk_and_block_sizes_take_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records the chunks of the head and the blocks of queries."""
    from anarchobot.model import loss
    from anarchobot.model.llama.attention import BlockedAttention

    chunks: list[int] = []
    whole = loss._chunk_loss

    def record(z: mx.array, *others: Any) -> Any:
        chunks.append(z.shape[0])
        return whole(z, *others)

    monkeypatch.setattr(loss, "_chunk_loss", record)
    blocks: list[tuple[int, int]] = []
    scores = BlockedAttention._scores
    monkeypatch.setattr(
        BlockedAttention,
        "_scores",
        lambda self, r, k, start, end: blocks.append((start, end)) or scores(self, r, k, start, end),
    )
    MLXEngine(config(loss_chunk=24, attention_block=7)).train_step(random_batch(1, 4), 1, 0.01, 0.9)
    assert chunks == [24, 24, 16]
    assert set(blocks) == {(0, 7), (7, 14), (14, 16)}


@pytest.mark.parametrize("optimizer", ["muon_adamw", "adamw"])
def test_threads_split_the_rows_and_give_the_same_result(optimizer: str) -> None:
    """Up to rounding, without dropout. The rows of a validation batch are split too."""

    def run(threads: int) -> tuple[MLXEngine, list[float]]:
        engine = MLXEngine(config(cpu_threads=threads, micro_batch_size=4, optimizer=optimizer))
        assert engine.workers.count == threads
        losses = [engine.train_step(random_batch(2, 4, seed=s), s, 0.01, 0.9).loss for s in range(1, 4)]
        return engine, [*losses, *engine.eval_step(random_batch(1, 3)), *engine.eval_step(random_batch(1, 1))]

    (one, losses), (two, others) = run(1), run(2)
    assert others == pytest.approx(losses, rel=1e-5)
    for name, p in parameters(one).items():
        np.testing.assert_allclose(p, parameters(two)[name], atol=1e-4, err_msg=name)
    again, same = run(2)
    assert same == others  # regardless of how threads are scheduled
    assert all(np.array_equal(p, parameters(again)[name]) for name, p in parameters(two).items())


def test_errors_in_threads_are_raised() -> None:
    engine = MLXEngine(config(cpu_threads=2, micro_batch_size=4))
    with pytest.raises(ValueError, match="broken"):
        engine.workers.map(lambda worker: (_ for _ in ()).throw(ValueError("broken")) if worker else None)
    assert engine.train_step(random_batch(1, 4), 1, 0.01, 0.9).finite


@pytest.mark.parametrize(
    ("rows", "wanted", "threads"), [(8, 2, 2), (8, 3, 2), (9, 3, 3), (1, 4, 1), (7, 2, 1), (12, 8, 6)]
)
def test_number_of_threads_divides_the_rows(rows: int, wanted: int, threads: int) -> None:
    assert workers_for(rows, wanted) == threads


def test_nothing_is_recompiled_after_the_first_step() -> None:
    """Two traces of a micro-batch (with and without existing sums), one of the update and one of evaluation."""
    engine = MLXEngine(config(compile=True))
    counts = []
    for step in range(1, 6):
        engine.train_step(random_batch(3, 2, seed=step), step, 0.01 / step, 0.9 + step / 100)
        engine.eval_step(random_batch(1, 2, seed=step))
        counts.append(engine.traces)
    assert counts == [4] * 5


def test_ema_weights_are_evaluated_saved_and_resumed() -> None:
    """Against an average computed by hand."""
    engine, plain = MLXEngine(config(ema_decay=0.5)), MLXEngine(config())
    average = parameters(plain)
    for step in range(1, 5):
        batch = random_batch(1, 2, seed=step)
        engine.train_step(batch, step, 0.01, 0.9)
        plain.train_step(batch, step, 0.01, 0.9)
        decay = min(0.5, (1 + step) / (10 + step))
        average = {n: decay * a + (1 - decay) * parameters(plain)[n] for n, a in average.items()}
    for name, p in engine.weights.items():
        np.testing.assert_allclose(np.array(p), average[name], atol=1e-6)
    state = engine.state()
    resumed = MLXEngine(config(ema_decay=0.5))
    resumed.load_state(state)
    held_out, batch = random_batch(1, 2, seed=9), random_batch(1, 2, seed=10)
    assert resumed.eval_step(held_out) == engine.eval_step(held_out) != plain.eval_step(held_out)
    for one in (engine, resumed):
        one.train_step(batch, 5, 0.01, 0.9)
    assert all(np.array_equal(a, resumed.state()[name]) for name, a in engine.state().items())
    usual = MLXEngine(config())  # without EMA, training continues from the saved weights
    usual.load_state(state)
    assert usual.eval_step(held_out) == pytest.approx(resumed_loss(state, held_out))


def resumed_loss(state: dict[str, np.ndarray], batch: Batch) -> tuple[float, int]:
    engine = MLXEngine(config(ema_decay=0.5))
    engine.load_state(state)
    return engine.eval_step(batch)


def test_dropout_depends_on_step_and_seed_and_is_off_in_evaluation() -> None:
    batch = random_batch(1, 4)

    def loss(step: int, seed: int = 0) -> float:
        engine = MLXEngine(config({"dropout": 0.5}, seed=seed))
        engine.load_state(MLXEngine(config({"dropout": 0.5})).state())  # the same weights for every seed
        return engine.train_step(batch, step, 0.01, 0.9).loss

    assert loss(1) == loss(1)
    assert len({loss(1), loss(2), loss(1, seed=1)}) == 3
    engine = MLXEngine(config({"dropout": 0.5}))
    assert engine.eval_step(batch) == engine.eval_step(batch)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_like_float32(precision: str) -> None:
    """Master weights stay float32; losses differ no more than the shorter mantissa explains."""
    half, full = MLXEngine(config(precision=precision)), MLXEngine(config(precision="float32"))
    for step in range(1, 41):
        batch = random_batch(1, 4, seed=step % 2)
        a, b = half.train_step(batch, step, 0.003, 0.9), full.train_step(batch, step, 0.003, 0.9)
    assert b.loss < 3.0
    assert a.loss == pytest.approx(b.loss, abs=0.1)
    assert {p.dtype for p in half.params.values()} == {mx.float32}
    assert {str(a.dtype) for n, a in half.state().items() if "/" in n} == {"float32"}


def test_non_finite_gradient_changes_no_weight_and_halves_the_loss_scale() -> None:
    engine = MLXEngine(config(precision="float16"))
    engine.train_step(random_batch(1, 2), 1, 0.01, 0.9)
    broken = engine.state()
    name = "params/model.layers.0.mlp.up_proj.weight"
    broken[name] = np.full_like(broken[name], np.inf)
    engine.load_state(broken)
    result = engine.train_step(random_batch(1, 2), 2, 0.01, 0.9)
    assert not result.finite
    after = engine.state()
    for key, value in broken.items():
        if key != "loss_scale" and key != "loss_scale_streak":
            np.testing.assert_array_equal(after[key], value, err_msg=key)
    assert after["loss_scale"] == broken["loss_scale"] / 2
    assert after["loss_scale_streak"] == 0


def test_out_of_memory_raises_memory_error_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates the error that MLX raises on a GPU; on a CPU, the process would be killed."""
    engine = MLXEngine(config(micro_batch_size=2))
    engine.train_step(random_batch(1, 2), 1, 0.01, 0.9)
    before = engine.state()
    real, calls = engine._micro_step, []

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        return real(*args)

    engine._micro_step = fails
    with pytest.raises(MemoryError, match="Unable to allocate"):
        engine.train_step(random_batch(4, 2), 2, 0.01, 0.9)
    for name, value in engine.state().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    # Fewer rows than threads: the same batch, split differently.
    engine._micro_step = real
    batch = random_batch(2, 2)
    halved = Batch(batch.inputs.reshape(4, 1, -1), batch.targets.reshape(4, 1, -1))
    other = MLXEngine(config(micro_batch_size=2))
    other.load_state({name: np.array(value) for name, value in before.items()})
    whole, cut = engine.train_step(batch, 2, 0.01, 0.9), other.train_step(halved, 2, 0.01, 0.9)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
    assert cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)


def test_norm_above_the_limit_changes_nothing() -> None:
    engine = MLXEngine(config())
    before = {name: np.array(value) for name, value in engine.state().items()}
    norm = engine.train_step(random_batch(1, 2), 1, 0.01, 0.9, norm_limit=1e-9).grad_norm
    assert norm > 1e-9
    for name, value in engine.state().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert engine.train_step(random_batch(1, 2), 1, 0.01, 0.9, norm_limit=norm).applied


def test_bias_correction_counts_updates_not_steps() -> None:
    """After a skipped step, training continues as if that step had not been. Independent of any engine: AdamW's first
    update has the size of the learning rate; corrected as the second, it would have 0.74 of that size."""
    settings = config(optimizer="adamw", weight_decay=0.0)
    skipping, plain = MLXEngine(settings), MLXEngine(settings)
    before = parameters(plain)
    assert not skipping.train_step(random_batch(1, 2, seed=9), 1, 0.01, 0.9, norm_limit=1e-9).applied
    for step in (2, 3):
        for engine in (skipping, plain):
            assert engine.train_step(random_batch(1, 2, seed=step), step, 0.01, 0.9).applied
        if step == 2:
            size = max(np.abs(p - before[name]).max() for name, p in parameters(skipping).items())
            assert size == pytest.approx(0.01, rel=1e-3)
    assert skipping.state()["updates"] == 2
    for name, p in parameters(plain).items():
        np.testing.assert_array_equal(parameters(skipping)[name], p, err_msg=name)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_non_finite_loss_under_a_finite_norm_is_a_bad_step(precision: str, loss: float) -> None:
    """The weights stay the same, and the guard counts the step and does not learn from its norm."""

    class NonFiniteLoss(MLXEngine):
        def _accumulate_gradients(self, *args: Any) -> Any:
            metrics, grads = super()._accumulate_gradients(*args)
            return [loss, *metrics[1:]], grads

    engine = NonFiniteLoss(config(precision=precision, ema_decay=0.9))
    before = {name: np.array(value) for name, value in engine.state().items()}
    norms: list[float] = []
    guard = Guard(GuardConfig(rollback_after=2), norms)
    for step in (1, 2):
        result = engine.train_step(random_batch(1, 2), step, 0.01, 0.9)
        assert math.isfinite(result.grad_norm) and not result.finite and not result.applied
        assert result.overflow == (precision == "float16")
        guard.observe(result.grad_norm, finite=result.finite, overflow=False)
        assert guard.last_step_was_bad and guard.should_roll_back == (step == 2)
    assert norms == []
    for name, value in engine.state().items():
        expected = before[name] / 4 if name == "loss_scale" else before[name]
        np.testing.assert_array_equal(value, expected, err_msg=name)


def test_state_is_not_changed_by_later_steps() -> None:
    """A thread writes it to disk while training continues."""
    engine = MLXEngine(config())
    given = engine.state()
    copies = {name: value.copy() for name, value in given.items()}
    for step in range(1, 4):
        engine.train_step(random_batch(1, 2, seed=step), step, 0.01, 0.9)
    for name, value in given.items():
        np.testing.assert_array_equal(value, copies[name], err_msg=name)


def test_loss_scale_doubles_after_2000_finite_steps_up_to_its_limit() -> None:
    from anarchobot.training.engine import LossScale

    scale = LossScale(2.0**22)
    for _ in range(3 * 2000):
        scale.update(finite=True)
    assert scale.scale == LossScale.MAX == 2.0**24
    for _ in range(30):
        scale.update(finite=False)
    assert scale.scale == 1.0


def test_state_restores_everything_bit_for_bit() -> None:
    """k steps, loading the state into a new engine, and n - k steps equal n steps, array by array."""
    settings = config({"dropout": 0.3}, precision="float16")
    straight = MLXEngine(settings)
    for step in range(1, 7):
        straight.train_step(random_batch(2, 2, seed=step), step, 0.01, 0.9)
        if step == 3:
            middle = straight.state()
    resumed = MLXEngine(settings)
    resumed.load_state(middle)
    for step in range(4, 7):
        resumed.train_step(random_batch(2, 2, seed=step), step, 0.01, 0.9)
    end = straight.state()
    assert set(end) == set(resumed.state())
    for name, value in resumed.state().items():
        np.testing.assert_array_equal(value, end[name], err_msg=name)


def test_state_of_another_optimizer_is_rejected() -> None:
    with pytest.raises(
        UserError,
        match=r"optimizer/muon.momentum/.* the checkpoint has missing, this run needs \[.*set train.optimizer",
    ):
        MLXEngine(config()).load_state(MLXEngine(config(optimizer="adamw")).state())


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="this machine has a GPU")
def test_missing_gpu_is_an_error() -> None:
    with pytest.raises(UserError, match=r"train.device: gpu, but MLX finds no GPU"):
        MLXEngine(config(device="gpu"))
