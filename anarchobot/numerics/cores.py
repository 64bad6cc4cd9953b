"""CPU cores, and the number of threads that share a micro-batch. Does not import MLX."""

import os

CPU_MLP_ROWS = 512  # tokens per chunk of an MLP: its activations fit a core's caches


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_for(rows: int, max_threads: int | None) -> int:
    """The number of threads for `rows` rows: the largest divisor of `rows` up to `max_threads` (default: all cores)."""
    return max(n for n in range(1, (max_threads or available_cores()) + 1) if rows % n == 0)
