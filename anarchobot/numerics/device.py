"""Which device's code path to take. A CPU and a GPU need different operations for the same result."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import mlx.core as mx

_gpu_path = _tf32 = False


def on_cpu() -> bool:
    """Whether MLX's default device is the CPU."""
    return not _gpu_path and mx.default_device().type == mx.DeviceType.cpu


def reduced_float32() -> bool:
    """Whether the default device rounds the operands of float32 matrix products, to 10 bits of mantissa for TF32. By
    default MLX does so on GPUs with matrix units for it: Apple's M5, NVIDIA's since Ampere. MLX_ENABLE_TF32=0 in the
    environment turns it off."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return _gpu_path and _tf32
    return _rounds_operands()


@cache
def _rounds_operands() -> bool:
    # Measured, because the conditions are internal to MLX. A float32 next to 1, times the identity matrix: exact unless
    # the operands are rounded. Two sizes, because small products may use another kernel.
    return any(
        bool(mx.any(mx.full((size, size), 1 + 2**-23) @ mx.eye(size) != 1 + 2**-23).item()) for size in (64, 512)
    )


@contextmanager
def gpu_path(*, tf32: bool = False) -> Iterator[None]:
    """A context manager in which `on_cpu` is False, in all threads: the CPU then runs the code of a GPU; with `tf32`,
    of a GPU for which `reduced_float32` is True. The CPU's own products remain exact."""
    global _gpu_path, _tf32
    before = _gpu_path, _tf32
    _gpu_path, _tf32 = True, tf32
    try:
        yield
    finally:
        _gpu_path, _tf32 = before
