"""How many cores there are, how many threads share a micro-batch on them, and what a core takes at a time. No MLX
here."""

import os

CPU_MLP_ROWS = 512  # tokens whose MLP stays in a core's caches


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_for(rows: int, wanted: int | None) -> int:
    """How many threads share `rows` rows: as many as there are cores, or `wanted`, as far as they divide the rows."""
    most = wanted or available_cores()
    return max(n for n in range(1, most + 1) if rows % n == 0)
