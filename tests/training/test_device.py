"""How MLX's backends report errors of a device: their messages, copied from its sources."""

from typing import Any

import numpy as np
import pytest

from anarchobot.config.schema import Config
from anarchobot.system.gpu_watchdog import VARIABLE, GPUTimeoutError
from anarchobot.training.device import ResourceLimitError, as_device_error
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
