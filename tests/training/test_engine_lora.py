"""Training with adapters: they learn, frozen weights stay and cost nothing, and all else works as in full training."""

import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config
from anarchobot.model.llama.forward import hidden_states
from anarchobot.model.lora import adapter_shapes, trained_count
from anarchobot.model.loss import logits
from anarchobot.model.parameters import init_parameters, parameter_shapes
from anarchobot.runs import checkpoint
from anarchobot.training.mlx_engine import MLXEngine
from tests.training.test_mlx_engine import random_batch

LORA = {"r": 8, "alpha": 16.0}


def config(lora: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **train: Any) -> Config:
    shape = {"vocab_size": 61, "n_layers": 2, "d_model": 64, "n_heads": 4, "dropout": 0.0, **(model or {})}
    values = {
        "model": shape,
        "train": {"device": "cpu", "lr": 0.01, "min_lr": 0.0, **train},
        "lora": LORA if lora is None else lora,
    }
    return Config.model_validate(values)


def base(settings: Config) -> dict[str, np.ndarray]:
    """Weights as large as those of a trained model: with a frozen head at its initial values, little can be learned."""
    return {n: p if p.ndim == 1 else 8 * p for n, p in init_parameters(settings.model, 0).items()}


def train_steps(engine: MLXEngine, steps: int = 3, first: int = 1) -> list[float]:
    return [engine.train_step(random_batch(2, 2, seed=s), s, 0.01, 0.9).loss for s in range(first, first + steps)]


@pytest.mark.parametrize("more", [{}, {"dora": True}, {"quantize": 4}, {"dropout": 0.05}], ids=str)
def test_adapters_overfit_one_batch_and_the_base_is_unchanged(more: dict[str, Any]) -> None:
    settings = config({**LORA, "r": 16, **more})
    engine = MLXEngine(settings, base(settings))
    before = {name: np.array(p) for name, p in engine.frozen.items()}
    batch = random_batch(1, 2)
    losses = [engine.train_step(batch, step, 0.01, 0.9).loss for step in range(1, 80)]
    assert losses[0] > 4 and losses[-1] < 0.3
    assert set(before) == set(engine.frozen)
    assert all(np.array_equal(before[name], p) for name, p in engine.frozen.items())


def test_only_adapters_have_state_and_are_saved(tmp_path: Path) -> None:
    """In the state and in the checkpoint. Adapters use AdamW whatever train.optimizer is."""
    settings = config({**LORA, "target_modules": ["q_proj"], "dora": True})
    engine = MLXEngine(settings)
    train_steps(engine, 1)
    state = engine.state()
    names = {f"model.layers.{i}.self_attn.q_proj.{part}" for i in (0, 1) for part in ("lora_a", "lora_b", "m")}
    kinds = {name.split("/")[1] for name in state if name.startswith("optimizer/")}
    assert kinds == {"adamw.first", "adamw.second"}
    wanted = {f"params/{n}" for n in names} | {f"optimizer/adamw.{k}/{n}" for n in names for k in ("first", "second")}
    assert {name for name in state if "/" in name} == wanted
    assert sum(a.size for name, a in state.items() if name.startswith("params/")) == trained_count(
        settings.model, settings.lora
    )
    folder = checkpoint.save(tmp_path / "run", 1, state, {"config": settings.model_dump()})
    with np.load(folder / "model.npz") as saved:
        assert set(saved.files) == names
    again = MLXEngine(settings)
    again.load_state(checkpoint.load_arrays(checkpoint.find(folder), settings.model, optimizer=True))
    assert all(np.array_equal(a, again.state()[name]) for name, a in state.items())


@pytest.mark.parametrize("more", [{}, {"dropout": 0.2, "quantize": 8}], ids=str)
def test_state_restores_everything_bit_for_bit(more: dict[str, Any]) -> None:
    settings = config({**LORA, **more}, precision="float16", ema_decay=0.9)
    straight, resumed = MLXEngine(settings), MLXEngine(settings)
    train_steps(straight, 3)
    resumed.load_state(straight.state())
    assert train_steps(straight, 3, 4) == train_steps(resumed, 3, 4)
    end = straight.state()
    for name, value in resumed.state().items():
        np.testing.assert_array_equal(value, end[name], err_msg=name)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"r": 4}, r"q_proj.lora_a: the checkpoint has \[64, 8\], this run needs \[64, 4\]"),
        (
            {**LORA, "target_modules": ["v_proj"]},
            r"q_proj.lora_a: the checkpoint has \[64, 8\], this run needs missing",
        ),
        ({**LORA, "dora": True}, r"q_proj.m: the checkpoint has missing, this run needs \[64\]"),
        ({}, r"embed_tokens.weight: the checkpoint has missing, this run needs \[61, 64\]"),
    ],
)
def test_state_of_other_adapters_is_rejected(other: dict[str, Any], message: str) -> None:
    state = MLXEngine(config()).state()
    with pytest.raises(UserError, match=f"{message}: .*set train.optimizer, train.normuon and lora"):
        MLXEngine(config(other)).load_state(state)


@pytest.mark.parametrize("how", [{"gradient_checkpointing": True}, {"compile": True}, {"cpu_threads": 2}], ids=str)
def test_checkpointing_compilation_and_threads_give_the_same_adapters(how: dict[str, Any]) -> None:
    lora = {**LORA, "dora": True}
    plain, other = (
        MLXEngine(config(lora, micro_batch_size=2)),
        MLXEngine(config(lora, **{"micro_batch_size": 2, **how})),
    )
    assert train_steps(plain) == pytest.approx(train_steps(other), rel=1e-5)
    for name, p in plain.params.items():
        np.testing.assert_allclose(p, other.params[name], atol=2e-4, err_msg=name)


def test_nothing_is_recompiled_after_the_first_step() -> None:
    engine = MLXEngine(config({**LORA, "dropout": 0.1, "quantize": 4}, {"n_layers": 1}, compile=True))
    counts = []
    for step in range(1, 5):
        engine.train_step(random_batch(3, 2, seed=step), step, 0.01 / step, 0.9)
        engine.eval_step(random_batch(1, 2, seed=step))
        counts.append(engine.traces)
    assert counts == [4] * 4


@pytest.mark.parametrize(("precision", "bits"), [("bfloat16", None), ("float16", None), ("bfloat16", 8)])
def test_half_precision_trains_like_float32(precision: str, bits: int | None) -> None:
    """The base model takes two bytes per weight or is quantized; adapters and their moments take four."""
    weights, settings = base(config()), config({**LORA, "quantize": bits}, precision=precision)
    half, full = MLXEngine(settings, weights), MLXEngine(config(), weights)
    losses = [
        (half.train_step(b, s, 0.01, 0.9).loss, full.train_step(b, s, 0.01, 0.9).loss)
        for s in range(1, 41)
        for b in [random_batch(1, 4, seed=s % 2)]
    ]
    assert losses[-1][1] < 3.0 and losses[-1][0] == pytest.approx(losses[-1][1], abs=0.1)
    assert {str(p.dtype) for p in half.params.values()} == {"mlx.core.float32"}
    stored = "_proj.scales" if bits else "_proj.weight"
    assert {p.dtype for name, p in half.frozen.items() if name.endswith(stored)} == {getattr(mx, precision)}
    hidden = hidden_states(half.weights, mx.arange(9)[None], settings.model, dtype=half.dtype)
    assert hidden.dtype == half.dtype  # nothing was promoted to float32
    assert {str(a.dtype) for n, a in half.state().items() if "/" in n} == {"float32"}


def test_weights_include_the_adapters_and_frozen_is_the_base_model() -> None:
    settings = config({**LORA, "dora": True})
    base = init_parameters(settings.model, 5)
    engine = MLXEngine(settings, base)
    ids = mx.arange(16)[None]

    def z(params: dict[str, mx.array]) -> np.ndarray:
        return np.array(logits(hidden_states(params, ids, settings.model), params, settings.model))

    untouched = z({name: mx.array(p) for name, p in base.items()})
    np.testing.assert_allclose(z(engine.weights), untouched, atol=1e-5)
    train_steps(engine)
    assert np.abs(z(engine.weights) - untouched).max() > 0.05
    np.testing.assert_allclose(z(engine.frozen), untouched, atol=1e-5)  # the reference model of DPO


@pytest.mark.usefixtures("without_garbage")
def test_weights_are_loaded_one_at_a_time() -> None:
    """So that a model as large as memory can be loaded and quantized."""
    settings = config()
    values = init_parameters(settings.model, 3)
    asked: list[str] = []

    class Lazy(Mapping[str, np.ndarray]):
        def __getitem__(self, name: str) -> np.ndarray:
            asked.append(name)
            return values[name]

        def __iter__(self) -> Iterator[str]:
            return iter(values)

        def __len__(self) -> int:
            return len(values)

    MLXEngine(settings, Lazy())
    assert asked == list(parameter_shapes(settings.model))
    full = MLXEngine(config({}), values)
    assert full.frozen == {} and all(np.array_equal(p, values[name]) for name, p in full.params.items())


def peak(lora: dict[str, Any], **train: Any) -> int:
    """Peak bytes of the second step: weights, gradients, moments and activations."""
    gc.collect()
    others = mx.get_active_memory()  # held by earlier tests
    shape = {"n_layers": 4, "d_model": 128, "vocab_size": 2000}
    engine = MLXEngine(config(lora, shape, optimizer="adamw", cpu_threads=1, **train))
    batch = random_batch(1, 1, 32)
    engine.train_step(batch, 1, 0.01, 0.9)
    mx.reset_peak_memory()
    engine.train_step(batch, 2, 0.01, 0.9)
    return mx.get_peak_memory() - others


def test_adapters_use_much_less_memory_than_full_training() -> None:
    """Gradients and two moments of all weights take three times their size. A CPU dequantizes one matrix at a time."""
    size = 4 * (4 * (4 * 128**2 + 3 * 128 * 512) + 2000 * 128)
    full, lora = peak({}), peak(LORA)
    assert full - lora > 2.5 * size  # one peaks with gradients, the other with activations
    assert lora - peak({**LORA, "quantize": 4}) > 0.3 * size
    assert peak({**LORA, "num_layers": 1}) < 0.85 * lora


@pytest.mark.parametrize(("bits", "share"), [(4, 0.16), (8, 0.29)])
def test_size_of_quantized_weights(bits: int, share: float) -> None:
    """Each group of 64 also has a float32 scale and bias; norms and adapter scales are negligible."""
    frozen = [MLXEngine(config({**LORA, "quantize": q})).frozen for q in (bits, None)]
    packed, whole = (sum(p.nbytes for p in arrays.values()) for arrays in frozen)
    assert packed == pytest.approx((bits / 32 + 2 / 64) * whole, rel=0.02) and packed < share * whole


def test_lora_dropout_affects_training_but_not_validation() -> None:
    """It has no effect in the first step, where B = 0; later steps each drop different elements."""
    settings = config({**LORA, "dropout": 0.5})
    first, more = base(settings), random_batch(1, 2)
    plain, dropping, again = MLXEngine(config(), first), MLXEngine(settings, first), MLXEngine(settings, first)
    a, b, c = (train_steps(engine) for engine in (plain, dropping, again))
    assert b == c and a[0] == b[0] and a[1] != b[1]
    assert dropping.eval_step(more) == again.eval_step(more)


def test_initial_adapters_depend_on_the_seed() -> None:
    """They depend on seed and name, not on the base model."""
    one, two = MLXEngine(config(seed=1)), MLXEngine(config(seed=2), init_parameters(config().model, 1))
    assert set(one.params) == set(adapter_shapes(config().model, config().lora))
    name = "model.layers.0.mlp.up_proj"
    assert not np.array_equal(one.params[f"{name}.lora_a"], two.params[f"{name}.lora_a"])
    assert np.array_equal(one.frozen[f"{name}.weight"], two.frozen[f"{name}.weight"])
