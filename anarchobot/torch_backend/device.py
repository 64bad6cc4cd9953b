"""Selects the PyTorch device, measures its memory use and detects out-of-memory errors."""

import re
import resource
import sys
from functools import lru_cache

import torch

from anarchobot.config.errors import UserError

# MPS; the CPU; MPS for a single array that is too large; CUDA matrix products.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "invalid buffer size", "cublas_status_alloc_failed")


def choose_device(device: str) -> torch.device:
    """`auto` is MPS (Apple silicon), else CUDA, else the CPU; `gpu` is one of the first two.

    Raises UserError if a GPU is requested and there is none.
    """
    if device != "cpu":
        if torch.backends.mps.is_available():
            return torch.device("mps")
        if torch.cuda.is_available():
            return torch.device("cuda")
    if device == "gpu":
        raise UserError("train.device: gpu, but PyTorch finds no GPU: set train.device to auto")
    return torch.device("cpu")


def default_precision(device: torch.device) -> str:
    """The dtype of matrix products if train.precision is not set. On MPS, bfloat16 from M3 on: M1 and M2 emulate it,
    which makes it slower than float16."""
    if device.type == "mps":
        chip = re.search(r"Apple M(\d+)", torch.backends.mps.get_name())
        return "bfloat16" if chip and int(chip[1]) >= 3 else "float16"
    return "bfloat16" if device.type == "cuda" else "float32"


@lru_cache
def reduced_float32(device: torch.device) -> bool:
    """Whether PyTorch rounds the operands of float32 matrix products on this device, for example to TF32 after
    `torch.set_float32_matmul_precision("high")`, which is not the default. Measured once in a process, as in
    numerics/device.py."""
    value = 1 + 2**-23
    sizes = (64, 512)
    products = (torch.full((n, n), value, device=device) @ torch.eye(n, device=device) for n in sizes)
    return any(bool((product != value).any()) for product in products)


def is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA raises a special class, other devices a RuntimeError with a message."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(phrase in words for phrase in _OUT_OF_MEMORY)


def release_memory(device: torch.device) -> None:
    """Returns PyTorch's cached memory to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory since the process started, in bytes: tensors on CUDA; on MPS, the driver's allocations,
    which only grow; on a CPU, the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_used(device: torch.device) -> tuple[int, int] | None:
    """Returns the bytes of tensors and the bytes cached; None on a CPU."""
    if device.type == "cuda":
        active = int(torch.cuda.memory_allocated(device))
        return active, int(torch.cuda.memory_reserved(device)) - active
    if device.type == "mps":
        active = int(torch.mps.current_allocated_memory())
        return active, int(torch.mps.driver_allocated_memory()) - active
    return None
