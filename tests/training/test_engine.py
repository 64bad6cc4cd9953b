"""The step: what it computes, what it leaves alone, and that it is the same however it is done."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config
from anarchobot.data.batches import Batch
from anarchobot.data.windows import IGNORE
from anarchobot.training.engine import MLXEngine


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


def test_a_batch_in_pieces_is_the_batch_whole() -> None:
    """Also with unscored targets unevenly spread, where a mean of means would weigh tokens differently."""
    whole = random_batch(1, 4)
    whole.targets[0, 0, :] = IGNORE
    whole.targets[0, 1, 3:] = IGNORE
    pieces = Batch(whole.inputs.reshape(4, 1, 16), whole.targets.reshape(4, 1, 16))
    one, four = MLXEngine(config()), MLXEngine(config())
    a, b = one.train_step(whole, 1, 0.01, 0.9), four.train_step(pieces, 1, 0.01, 0.9)
    assert a.tokens == b.tokens == 64 - 16 - 13
    assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-5)
    for name, p in parameters(one).items():
        np.testing.assert_allclose(p, parameters(four)[name], atol=2e-5, err_msg=name)


def test_loss_is_the_mean_before_the_update_and_eval_agrees() -> None:
    engine, batch = MLXEngine(config()), random_batch(2, 3)
    total, tokens = engine.eval_step(batch)
    assert tokens == 96
    assert engine.train_step(batch, 1, 0.01, 0.9).loss == pytest.approx(total / tokens, rel=1e-5)


def test_gradients_are_clipped_to_the_global_norm() -> None:
    """Under AdamW alone a scaled gradient gives the same first step: so look at the second moment, g squared."""
    limit = 0.01
    clipped = MLXEngine(config(optimizer="adamw", max_grad_norm=limit))
    free = MLXEngine(config(optimizer="adamw", max_grad_norm=None))
    norms = [engine.train_step(random_batch(1, 2), 1, 0.0, 0.9).grad_norm for engine in (clipped, free)]
    assert norms[0] == norms[1] > limit  # what is reported is the norm before clipping

    def norm_from_moments(engine: MLXEngine) -> float:
        second = [v for name, v in engine.state().items() if name.startswith("optimizer/adamw.second/")]
        return math.sqrt(sum(float(v.sum()) for v in second) / (1 - 0.95))

    assert norm_from_moments(clipped) == pytest.approx(limit, rel=1e-4)
    assert norm_from_moments(free) == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("how", [{"gradient_checkpointing": True}, {"compile": True}], ids=str)
def test_the_other_ways_to_do_it_give_the_same_weights(how: dict[str, bool]) -> None:
    plain, other = MLXEngine(config({"dropout": 0.2})), MLXEngine(config({"dropout": 0.2}, **how))
    for step in range(1, 4):
        batch = random_batch(2, 2, seed=step)
        a, b = plain.train_step(batch, step, 0.01, 0.9), other.train_step(batch, step, 0.01, 0.9)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
    for name, p in parameters(plain).items():
        np.testing.assert_allclose(p, parameters(other)[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("how", [{}, {"gradient_checkpointing": True}], ids=str)
def test_two_masked_documents_in_a_row_train_as_two_rows(how: dict[str, bool]) -> None:
    """The same tokens, once side by side with a document mask, once in rows of their own: the same gradients."""
    rows = random_batch(1, 2, 8)
    joined = Batch(
        rows.inputs.reshape(1, 1, 16), rows.targets.reshape(1, 1, 16), np.repeat([[[0, 1]]], 8, axis=2).astype(np.int32)
    )
    a, b = MLXEngine(config(**how)), MLXEngine(config(**how))
    first, second = a.train_step(rows, 1, 0.01, 0.9), b.train_step(joined, 1, 0.01, 0.9)
    assert (first.loss, first.grad_norm) == pytest.approx((second.loss, second.grad_norm), rel=1e-5)
    assert a.eval_step(rows)[0] == pytest.approx(b.eval_step(joined)[0], rel=1e-4)


def test_gradient_checkpointing_takes_less_memory() -> None:
    def peak(**how: Any) -> int:
        engine = MLXEngine(config({"n_layers": 8, "d_model": 64}, **how))
        batch = random_batch(1, 8, 128)
        engine.train_step(batch, 1, 0.01, 0.9)
        mx.reset_peak_memory()
        engine.train_step(batch, 2, 0.01, 0.9)
        return mx.get_peak_memory()

    assert peak(gradient_checkpointing=True) < 0.75 * peak()


def test_dropout_depends_on_step_and_seed_and_is_off_in_evaluation() -> None:
    batch = random_batch(1, 4)

    def loss(step: int, seed: int = 0) -> float:
        engine = MLXEngine(config({"dropout": 0.5, "zero_init_proj": False}, seed=seed))
        engine.load_state(MLXEngine(config({"dropout": 0.5})).state())  # the same weights for every seed
        return engine.train_step(batch, step, 0.01, 0.9).loss

    assert loss(1) == loss(1)
    assert len({loss(1), loss(2), loss(1, seed=1)}) == 3
    engine = MLXEngine(config({"dropout": 0.5}))
    assert engine.eval_step(batch) == engine.eval_step(batch)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_as_float32_does(precision: str) -> None:
    """Master weights stay float32; the losses stay within what the shorter mantissa explains."""
    half, full = MLXEngine(config(precision=precision)), MLXEngine(config(precision="float32"))
    for step in range(1, 41):
        batch = random_batch(1, 4, seed=step % 2)
        a, b = half.train_step(batch, step, 0.003, 0.9), full.train_step(batch, step, 0.003, 0.9)
    assert b.loss < 3.0
    assert a.loss == pytest.approx(b.loss, abs=0.1)
    assert {p.dtype for p in half.params.values()} == {mx.float32}
    assert {str(a.dtype) for n, a in half.state().items() if "/" in n} == {"float32"}


def test_a_gradient_that_is_not_finite_changes_no_weight_and_halves_the_loss_scale() -> None:
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


def test_the_loss_scale_doubles_after_2000_good_steps_up_to_its_limit() -> None:
    from anarchobot.training.loss_scale import LARGEST, LossScale

    scale = LossScale(2.0**22)
    for _ in range(3 * 2000):
        scale.after(finite=True)
    assert scale.scale == LARGEST == 2.0**24
    for _ in range(30):
        scale.after(finite=False)
    assert scale.scale == 1.0


def test_state_restores_everything_bit_for_bit() -> None:
    """k steps, state into a new engine, n - k steps: every array equals that of n steps."""
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


def test_another_optimizers_state_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.optimizer: the checkpoint was made with another optimizer"):
        MLXEngine(config()).load_state(MLXEngine(config(optimizer="adamw")).state())


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="a GPU is here: asking for it is no mistake")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.device: gpu, but MLX sees none here"):
        MLXEngine(config(device="gpu"))
