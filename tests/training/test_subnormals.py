"""Subnormal numbers: many CPUs take 100 times as long for them, so no part of a step may produce them."""

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from anarchobot.config.schema import Config, TrainConfig
from anarchobot.data.conversations.preference_pairs import PairBatch
from anarchobot.data.windows import Batch
from anarchobot.model.llama import attention
from anarchobot.model.parameters import init_parameters
from anarchobot.numerics import elementary
from anarchobot.numerics.eval_order import eval_now
from anarchobot.optim.adamw import adamw
from anarchobot.training.mlx_engine import MLXEngine
from anarchobot.training.preference_engine import PreferenceEngine

SMALLEST_NORMAL = np.finfo(np.float32).tiny
LENGTH = 64


def count(array: npt.NDArray[Any] | mx.array) -> int:
    size = np.abs(np.asarray(array))
    return int(np.count_nonzero((size > 0) & (size < SMALLEST_NORMAL)))


def config(**sections: Any) -> Config:
    model = {"vocab_size": 300, "n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "dropout": 0.0}
    train = {"device": "cpu", "precision": "float32", "micro_batch_size": 2, "grad_accum_steps": 1, "cpu_threads": 1}
    return Config.model_validate({"model": model, "data": {"seq_len": LENGTH}, "train": train, **sections})


def sequences(rng: np.random.Generator) -> Batch:
    """Two rows of several documents each."""
    ids = rng.integers(0, 300, (1, 2, LENGTH + 1)).astype(np.int32)
    segments = np.sort(rng.integers(0, 4, (1, 2, LENGTH)), axis=-1).astype(np.int32)
    return Batch(ids[..., :-1].copy(), ids[..., 1:].copy(), segments)


def pairs(rng: np.random.Generator) -> PairBatch:
    ids = rng.integers(0, 300, (1, 2, 2, LENGTH + 1)).astype(np.int32)
    reference = np.full((1, 2, 2), -300.0, np.float32)
    return PairBatch(ids[..., :-1].copy(), ids[..., 1:].copy(), indices=np.arange(2)[None], ref_log_probs=reference)


@pytest.mark.parametrize("task", ["pretrain", "lora", "dpo"])
def test_a_step_leaves_no_subnormal_numbers(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do products of attention's and the loss' exponentials, most of which are masked, with small numbers."""
    found, calls = 0, 0

    def checked(x: mx.array) -> mx.array:
        nonlocal found, calls
        result = exp(x)
        found, calls = found + count(result) + count(result * 1e-6), calls + 1
        return result

    exp = elementary.exp
    for module in (attention, elementary):  # of attention, and of the loss
        monkeypatch.setattr(module, "exp", checked)
    settings, rng = config(**({"lora": {"r": 8}} if task == "lora" else {})), np.random.default_rng(0)
    engine = PreferenceEngine(settings, init_parameters(settings.model, 0)) if task == "dpo" else MLXEngine(settings)
    for step in range(1, 4):
        engine.train_step(pairs(rng) if task == "dpo" else sequences(rng), step, 0.01, 0.9)
    assert calls > 0 and found == 0
    assert {name: count(array) for name, array in engine.state().items() if count(array)} == {}


def test_moments_of_tokens_that_are_no_longer_seen_become_zero() -> None:
    start = np.array([1e-28, -1e-28, 1e-38, 1.0], np.float32)
    first, second = {"w": mx.array(start)}, {"w": mx.array(np.abs(start))}
    for step in range(1, 200):
        zeros = {"w": mx.zeros(4)}
        _, first, second = adamw(
            {"w": mx.zeros(4)}, zeros, first, second, mx.array(0.1), mx.array(float(step)), TrainConfig(), eval_now
        )
        mx.eval(first, second)
        assert count(first["w"]) == count(second["w"]) == 0
    np.testing.assert_allclose(np.array(first["w"]), [0, 0, 0, 0.9**199], rtol=1e-4)
    np.testing.assert_allclose(np.array(second["w"]), [0, 0, 0, 0.95**199], rtol=1e-4)
