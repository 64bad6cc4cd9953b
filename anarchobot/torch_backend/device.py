"""The device: which one, how much of its memory is used, and how it says that there is no more."""

import resource
import sys

import torch

from anarchobot.config.errors import UserError

# MPS; the CPU; MPS for one array too large; CUDA's matrix products.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "invalid buffer size", "cublas_status_alloc_failed")


def choose_device(device: str) -> torch.device:
    """`auto` takes MPS (Apple Silicon), else CUDA, else the CPU; `gpu` one of the first two.

    Raises UserError when a GPU is asked for and there is none.
    """
    if device != "cpu":
        if torch.backends.mps.is_available():
            return torch.device("mps")
        if torch.cuda.is_available():
            return torch.device("cuda")
    if device == "gpu":
        raise UserError("train.device: gpu, but PyTorch sees none here: set train.device: auto")
    return torch.device("cpu")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether this is how a device says so: CUDA by a class of its own, the others in words."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(phrase in words for phrase in _OUT_OF_MEMORY)


def release_memory(device: torch.device) -> None:
    """Gives back what PyTorch keeps of memory that is free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def peak_memory(device: torch.device) -> int:
    """The most memory used since the process began, in bytes: tensors on CUDA; what the driver holds for the process,
    which only grows, on MPS; the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_used(device: torch.device) -> tuple[int, int] | None:
    """Bytes of tensors, and bytes that are free and kept; None on a CPU."""
    if device.type == "cuda":
        active = int(torch.cuda.memory_allocated(device))
        return active, int(torch.cuda.memory_reserved(device)) - active
    if device.type == "mps":
        active = int(torch.mps.current_allocated_memory())
        return active, int(torch.mps.driver_allocated_memory()) - active
    return None
