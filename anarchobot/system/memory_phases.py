"""The result of cpu_memory.py, gpu_memory.py and module_memory.py."""

from typing import NamedTuple


class MemoryPhases(NamedTuple):
    """Bytes beside weights and optimizer state: parts and phases of MemoryEstimate (system/memory.py)."""

    activations: int
    logits: int
    forward: int
    loss: int
    backward: int
    norm: int
    update: int
