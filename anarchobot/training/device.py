"""What MLX computes on, and how it says that memory was not enough."""

import re

import mlx.core as mx

from anarchobot.config.errors import UserError

CPU_CACHE_BYTES = 2**30  # of freed memory that MLX keeps; its own 32 MB on a CPU make a step a quarter slower
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
_OUT_OF_MEMORY = re.compile(r"\[malloc|out of memory|unable to allocate", re.IGNORECASE)


def choose_device(device: str) -> mx.Device:
    """Sets and returns MLX's default device: `auto` takes Metal or CUDA when there is one.

    Raises UserError when a GPU is asked for and there is none.
    """
    gpu = mx.is_available(mx.gpu)
    if device == "gpu" and not gpu:
        raise UserError("train.device: gpu, but MLX sees none here: set train.device: auto")
    chosen = mx.Device(mx.gpu if gpu and device != "cpu" else mx.cpu)
    mx.set_default_device(chosen)
    if chosen == mx.Device(mx.cpu):
        mx.set_cache_limit(CPU_CACHE_BYTES)
    return chosen


def as_memory_error(error: RuntimeError) -> Exception:
    """MemoryError, if that is what MLX's error is; what can be freed for another try is freed then."""
    if not _OUT_OF_MEMORY.search(str(error)):
        return error
    mx.clear_cache()
    return MemoryError(str(error))
