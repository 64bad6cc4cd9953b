"""Errors of a device, with the messages of MLX's sources, and the limits of MLX's memory on Metal."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import Config, ModelConfig
from anarchobot.inference import model
from anarchobot.numerics.device import gpu_path
from anarchobot.system import micro_batch
from anarchobot.system.gpu_watchdog import VARIABLE, GPUTimeoutError
from anarchobot.system.memory import checkpoint_bytes, estimate
from anarchobot.training.device import MEMORY_MARGIN, ResourceLimitError, as_device_error, limit_memory
from anarchobot.training.mlx_engine import MLXEngine
from tests.training.fake_engine import MODEL, Windows

METAL = "[METAL] Command buffer execution failed: "
OUT_OF_MEMORY = [
    "[malloc] Unable to allocate 100 bytes.",
    "cudaMallocAsync(&buf, size) failed: out of memory",
    f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
    "[metal::malloc] Attempting to allocate 17179869184 bytes which is greater than the maximum allowed buffer size of "
    "9534832640 bytes.",
]
TIMEOUTS = [
    f"{METAL}Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).",
    f"{METAL}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).",
    f"{METAL}Innocent Victim of GPU Error/Recovery (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim).",
    f"{METAL}Ignored (for causing prior/excessive GPU errors) "
    "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored).",
]
TOO_MANY_BUFFERS = "[metal::malloc] Resource limit (499000) exceeded."


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_running_out_of_memory_is_a_memory_error(message: str) -> None:
    raised = as_device_error(RuntimeError(message))
    assert isinstance(raised, MemoryError) and str(raised) == message


@pytest.mark.parametrize("message", TIMEOUTS)
def test_a_stop_by_the_watchdog_names_the_remedies(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for the variable, where it is set."""
    for value, named in ((None, True), ("0", True), ("1", False)):
        with monkeypatch.context() as patch:
            patch.delenv(VARIABLE, raising=False)
            if value is not None:
                patch.setenv(VARIABLE, value)
            raised = as_device_error(RuntimeError(message))
        assert isinstance(raised, GPUTimeoutError) and message in str(raised)
        assert "let the display sleep" in str(raised) and "MLX_MAX_OPS_PER_BUFFER=10" in str(raised)
        assert (f"set {VARIABLE}=1" in str(raised)) == named


def test_too_many_buffers_are_neither() -> None:
    """A smaller micro-batch would not help."""
    raised = as_device_error(RuntimeError(TOO_MANY_BUFFERS))
    assert isinstance(raised, ResourceLimitError) and not isinstance(raised, GPUTimeoutError)
    assert str(raised).startswith("more than 499000 arrays exist on the GPU") and "--resume-from auto" in str(raised)


def test_other_errors_stay_as_they_are() -> None:
    error = RuntimeError("[matmul] Last dimension of first input must match")
    assert as_device_error(error) is error


def test_a_stop_by_the_watchdog_leaves_the_engine_as_it_was() -> None:
    engine = MLXEngine(Config.model_validate({"model": MODEL, "train": {"device": "cpu", "cpu_threads": 1}}))
    before = engine.state()

    def stopped(*args: Any) -> Any:
        raise RuntimeError(TIMEOUTS[0])

    engine._micro_step = stopped
    engine._loss = stopped
    batch = Windows().at(1, 2, 2)
    with pytest.raises(GPUTimeoutError):
        engine.train_step(batch, 1, 0.01, 0.9)
    with pytest.raises(GPUTimeoutError):
        engine.eval_step(batch)
    for name, value in engine.state().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


# ---- Memory limits ----

GIB = 2**30
LIMITS = ("set_memory_limit", "set_cache_limit", "set_wired_limit")


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A Mac with 18 GiB, of which the GPU may use 12. Returns the limits that are set."""
    limits: dict[str, int] = {}
    info = {"max_recommended_working_set_size": 12 * GIB, "memory_size": 18 * GIB}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(micro_batch, "system_memory", lambda: SimpleNamespace(total=18 * GIB))
    for name in LIMITS:
        monkeypatch.setattr(mx, name, lambda limit, name=name: limits.__setitem__(name, limit))
    return limits


def training(**train: Any) -> Config:
    shape = {"vocab_size": 32000, "n_layers": 12, "d_model": 768, "n_heads": 12}
    return Config.model_validate({"model": shape, "data": {"seq_len": 2048}, "train": train})


def test_memory_limits_follow_the_estimate(metal: dict[str, int]) -> None:
    """It has room for a copy of the checkpoint. dpo counts pairs."""
    for pairs in (False, True):
        config = training(micro_batch_size=1, gradient_checkpointing=True)
        with gpu_path():
            limit_memory(config, pairs=pairs)
        peak = estimate(config, device="gpu", pairs=pairs).peak
        assert metal == dict.fromkeys(LIMITS, round(MEMORY_MARGIN * peak) + sum(checkpoint_bytes(config)))


def test_memory_limits_are_at_most_the_budget(metal: dict[str, int]) -> None:
    """The working set of the GPU is smaller than three quarters of the machine's memory."""
    for budget, limit in ((None, 12 * GIB), (2.5, 2_500_000_000), (16, 12 * GIB)):
        with gpu_path():
            limit_memory(training(micro_batch_size=64, memory_budget_gb=budget))
        assert metal == dict.fromkeys(LIMITS, limit)


def test_limits_stay_as_they_are_on_a_cpu_and_without_metal(
    metal: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(training())
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    with gpu_path():  # CUDA
        limit_memory(training())
    assert metal == {}


def test_loading_a_model_wires_what_macos_recommends(metal: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained = SimpleNamespace(
        warnings=[], config=training(), weights={}, model=ModelConfig(), tokenizer=None, adapter=None
    )
    monkeypatch.setattr(model, "load_with_adapter", lambda path, base_model: pretrained)
    model.load_model("run")
    assert metal == {"set_wired_limit": 12 * GIB}
