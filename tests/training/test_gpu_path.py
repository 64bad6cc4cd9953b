"""MLXEngine with the code of a GPU, run on the CPU: compiled steps, and how often they wait for the GPU."""

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import Config
from anarchobot.data.windows import Batch
from anarchobot.numerics.device import gpu_path
from anarchobot.training.mlx_engine import MLXEngine

MICRO_BATCHES = 3


def config(**train: Any) -> Config:
    model = {"vocab_size": 50, "n_layers": 2, "d_model": 128, "n_heads": 2, "dropout": 0.0, "max_seq_len": 64}
    train = {"precision": "float32", "micro_batch_size": 2, "grad_accum_steps": MICRO_BATCHES, **train}
    return Config.model_validate({"model": model, "data": {"seq_len": 32}, "train": train})


def batch() -> Batch:
    ids = np.random.default_rng(0).integers(0, 50, (MICRO_BATCHES, 2, 33)).astype(np.int32)
    return Batch(ids[..., :-1].copy(), ids[..., 1:].copy())


@pytest.mark.parametrize("optimizer", ["muon_adamw", "adamw"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_equal_those_of_the_cpu_path(checkpointing: bool, optimizer: str) -> None:
    settings = config(gradient_checkpointing=checkpointing, optimizer=optimizer, ema_decay=0.9)
    cpu = MLXEngine(settings)
    with gpu_path():
        gpu = MLXEngine(settings)
        assert gpu.compiled and gpu.options.technique == "fused"
    for step in range(1, 4):
        expected = cpu.train_step(batch(), step, 0.01, 0.9)
        with gpu_path():
            actual = gpu.train_step(batch(), step, 0.01, 0.9)
            loss, _ = gpu.eval_step(batch())
        assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
        assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert loss == pytest.approx(cpu.eval_step(batch())[0], rel=1e-5)
    assert gpu.traces == 4  # the first micro-batch, those that add to sums, the update, validation


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_step_waits_for_the_gpu_twice(ema_decay: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For loss and norm together, and for the update; a third time for a running average. Micro-batches are only
    started."""
    calls: Counter[str] = Counter()
    for name in ("eval", "async_eval"):
        counted(monkeypatch, name, calls)
    with gpu_path():
        engine = MLXEngine(config(ema_decay=ema_decay))
        engine.train_step(batch(), 1, 0.01, 0.9)
        calls.clear()
        engine.train_step(batch(), 2, 0.01, 0.9)
        assert calls == {"async_eval": MICRO_BATCHES, "eval": 2 if ema_decay is None else 3}
        calls.clear()
        engine.eval_step(batch())
        assert calls == {"async_eval": MICRO_BATCHES}


def counted(monkeypatch: pytest.MonkeyPatch, name: str, calls: Counter[str]) -> None:
    function = getattr(mx, name)

    def call(*arrays: Any) -> Any:
        calls[name] += 1
        return function(*arrays)

    monkeypatch.setattr(mx, name, call)
