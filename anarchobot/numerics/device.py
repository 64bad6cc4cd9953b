"""Which device's code path to take. A CPU and a GPU need different operations for the same result."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

_gpu_path = False


def on_cpu() -> bool:
    """Whether MLX's default device is the CPU."""
    return not _gpu_path and mx.default_device().type == mx.DeviceType.cpu


@contextmanager
def gpu_path() -> Iterator[None]:
    """A context manager in which `on_cpu` is False, in all threads: the CPU then runs the code of a GPU."""
    global _gpu_path
    before, _gpu_path = _gpu_path, True
    try:
        yield
    finally:
        _gpu_path = before
