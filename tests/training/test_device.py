"""How MLX's backends report that they are out of memory: their messages, copied from its sources."""

import pytest

from anarchobot.training.device import as_memory_error

METAL = "[METAL] Command buffer execution failed: "
OUT_OF_MEMORY = [
    "[malloc] Unable to allocate 100 bytes.",
    "cudaMallocAsync(&buf, size) failed: out of memory",
    f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
    "[metal::malloc] Attempting to allocate 17179869184 bytes which is greater than the maximum allowed buffer size of "
    "9534832640 bytes.",
]
OTHERS = [
    "[metal::malloc] Resource limit (499000) exceeded.",  # too many buffers: a smaller micro-batch has as many
    f"{METAL}Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).",
    f"{METAL}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).",
    "[matmul] Last dimension of first input must match",
]


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_running_out_of_memory_is_a_memory_error(message: str) -> None:
    raised = as_memory_error(RuntimeError(message))
    assert isinstance(raised, MemoryError) and str(raised) == message


@pytest.mark.parametrize("message", OTHERS)
def test_other_errors_stay_as_they_are(message: str) -> None:
    error = RuntimeError(message)
    assert as_memory_error(error) is error
