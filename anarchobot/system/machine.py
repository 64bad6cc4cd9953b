"""Memory of the machine and of processes, in bytes, and keeping a Mac awake.

psutil provides most of the numbers. This module adds the memory limit of a Linux container (cgroup v1 and v2), and
macOS's memory pressure level and limit for the GPU.
"""

import errno
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUPS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))  # version 2, version 1
GPU_SHARES = ((36 * 2**30, 2 / 3), (math.inf, 3 / 4))  # of the memory, for machines with less than this
PRESSURE_LEVELS = {"1": "normal", "2": "warning", "4": "critical"}  # kern.memorystatus_vm_pressure_level


@dataclass(frozen=True)
class SystemMemory:
    """`used` is total minus available. `pressure` is macOS's pressure level, and "" elsewhere."""

    total: int
    used: int
    swap_used: int
    pressure: str = ""


def system_memory() -> SystemMemory:
    """In a container with a memory limit, `total` and `used` are the container's."""
    memory = psutil.virtual_memory()
    total, used = memory.total, memory.total - memory.available
    for folder in CGROUPS:
        if (limit := cgroup_memory(folder)) and limit[0] < memory.total:
            total, used = limit
            break
    return SystemMemory(total, used, psutil.swap_memory().used, _memory_pressure())


def process_memory(pid: int) -> int | None:
    """The resident set size, or None if the process does not exist or is a zombie. Raises PermissionError."""
    try:
        process = psutil.Process(pid)
        return None if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else process.memory_info().rss
    except (psutil.NoSuchProcess, ValueError):  # ValueError: a negative PID
        return None
    except psutil.AccessDenied as error:  # macOS: processes of other users
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"process {pid}") from error


def cgroup_memory(folder: Path) -> tuple[int, int] | None:
    """The limit and the usage of a control group, or None if it has no limit. Reclaimable file cache does not count as
    used."""
    for limit_file, usage_file, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, usage = (int((folder / name).read_text()) for name in (limit_file, usage_file))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such file, or the limit is "max"
            continue
        return limit, usage - int(stat.get(cache_key, 0))
    return None


def gpu_working_set(total: int) -> int:
    """The memory that macOS recommends for the GPU of a Mac with `total` bytes: Metal's recommendedMaxWorkingSetSize,
    without loading MLX. It is the limit that the user has set or a share of the memory, by default; macOS 26 has a
    larger share on large machines."""
    megabytes = _sysctl("iogpu.wired_limit_mb")
    if megabytes.isdecimal() and int(megabytes) > 0:
        return int(megabytes) * 2**20
    return int(total * next(share for below, share in GPU_SHARES if total < below))


def _memory_pressure() -> str:
    if sys.platform != "darwin":
        return ""
    return PRESSURE_LEVELS.get(_sysctl("kern.memorystatus_vm_pressure_level"), "")


def _sysctl(name: str) -> str:
    command = ["sysctl", "-n", name]  # by PATH, like caffeinate
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def stay_awake() -> str | None:
    """Runs macOS's `caffeinate` until this process ends. Returns a message for the user, or None on other systems."""
    program = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if program is None:
        return None
    subprocess.Popen([program, "-i", "-w", str(os.getpid())], stdin=subprocess.DEVNULL, start_new_session=True)
    return "keeping this Mac awake until the run ends (caffeinate); closing the lid still puts it to sleep"
