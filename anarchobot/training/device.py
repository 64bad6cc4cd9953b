"""Selects the MLX device, limits its memory and recognizes the errors of a GPU."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config
from anarchobot.numerics.device import on_cpu
from anarchobot.system.gpu_watchdog import as_gpu_timeout
from anarchobot.system.memory import checkpoint_bytes, estimate
from anarchobot.system.micro_batch import memory_budget
from anarchobot.system.technique import DeviceKind

CPU_CACHE_BYTES = 2**30  # MLX's cache of freed memory; its default on a CPU, 32 MB, makes a step a quarter slower
MEMORY_MARGIN = 1.25  # of Metal's memory limit over the estimated peak
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


def limit_memory(config: Config, *, pairs: bool = False) -> None:
    """Limits MLX's memory on Metal for a training run; does nothing on other devices. `pairs` as in `estimate`.

    MLX encodes up to ten command buffers ahead of the GPU, which hold their arrays, and caches freed arrays: by default
    up to 95% of the machine's memory. Before it exceeds the memory limit, it frees cached arrays; above the limit, it
    waits for the GPU. The limit is the estimated peak with a margin, so that a low estimate does not make MLX wait for
    each kernel, and the copy that exists while a checkpoint is written; at most the budget.
    """
    if on_cpu() or not mx.metal.is_available():
        return
    working_set = int(mx.device_info()["max_recommended_working_set_size"])
    budget = min(memory_budget(config), working_set)
    needed = round(MEMORY_MARGIN * estimate(config, device="gpu", pairs=pairs).peak) + sum(checkpoint_bytes(config))
    limit = min(needed, budget)
    mx.set_memory_limit(limit)
    mx.set_cache_limit(limit)
    wire_memory(limit)


@contextmanager
def without_memory_limit(config: Config) -> Iterator[None]:
    """A context manager for work before training that `limit_memory` does not know of: on Metal, the limit is the
    budget."""
    if on_cpu() or not mx.metal.is_available():
        yield
        return
    budget = min(memory_budget(config), int(mx.device_info()["max_recommended_working_set_size"]))
    limit = mx.set_memory_limit(budget)
    try:
        yield
    finally:
        mx.set_memory_limit(limit)


def wire_memory(limit: int | None = None) -> None:
    """Keeps up to `limit` bytes of MLX's arrays on Metal in physical memory (default: as many as macOS recommends), so
    that the system does not compress or swap them. Has an effect from macOS 15 on."""
    if mx.metal.is_available():
        working_set = int(mx.device_info()["max_recommended_working_set_size"])
        mx.set_wired_limit(working_set if limit is None else limit)


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
