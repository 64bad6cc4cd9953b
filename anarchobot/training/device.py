"""Selects the MLX device and recognizes the errors of a GPU."""

import re

import mlx.core as mx

from anarchobot.config.errors import UserError
from anarchobot.numerics.device import on_cpu
from anarchobot.system.gpu_watchdog import as_gpu_timeout
from anarchobot.system.technique import DeviceKind

CPU_CACHE_BYTES = 2**30  # MLX's cache of freed memory; its default on a CPU, 32 MB, makes a step a quarter slower
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
# MLX on a CPU, CUDA and Metal: a command buffer that fails, and one buffer larger than the device allows.
_OUT_OF_MEMORY = re.compile(
    r"\[malloc|out of memory|unable to allocate|insufficient memory|maximum allowed buffer size", re.IGNORECASE
)
_TOO_MANY_BUFFERS = re.compile(r"Resource limit \((\d+)\) exceeded")


def choose_device(device: str) -> mx.Device:
    """Sets and returns MLX's default device: `auto` is Metal or CUDA if available.

    Raises UserError if a GPU is requested and there is none.
    """
    gpu = mx.is_available(mx.gpu)
    if device == "gpu" and not gpu:
        raise UserError("train.device: gpu, but MLX finds no GPU: set train.device to auto")
    chosen = mx.Device(mx.gpu if gpu and device != "cpu" else mx.cpu)
    mx.set_default_device(chosen)
    if chosen == mx.Device(mx.cpu):
        mx.set_cache_limit(CPU_CACHE_BYTES)
    return chosen


def device_kind() -> DeviceKind:
    """The kind of MLX's default device; with `gpu_path` (numerics/device.py) on a CPU, Metal."""
    return "cpu" if on_cpu() else "cuda" if mx.cuda.is_available() else "metal"


class ResourceLimitError(UserError):
    """More buffers exist than Metal allows. A smaller micro-batch has as many."""

    exit_code = 1


def as_device_error(error: RuntimeError) -> Exception:
    """Converts errors of MLX's devices and frees MLX's cache: out of memory to MemoryError, a command buffer that macOS
    stopped to GPUTimeoutError, too many buffers to ResourceLimitError. Returns other errors unchanged."""
    buffers = _TOO_MANY_BUFFERS.search(str(error))
    if buffers:
        converted: Exception | None = ResourceLimitError(
            f"more than {buffers[1]} arrays exist on the GPU ({error}): resume the run with --resume-from auto, which "
            "frees them; if the error comes back, report it"
        )
    else:
        converted = MemoryError(str(error)) if _OUT_OF_MEMORY.search(str(error)) else as_gpu_timeout(error)
    if converted is None:
        return error
    mx.clear_cache()
    return converted
