"""Memory of the machine and of a process, in bytes, as the system tells it: /proc on Linux; vm_stat, sysctl and ps on
macOS. What they print is read by functions of its text alone."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

PRESSURE = {1: "normal", 2: "warning", 4: "critical"}  # macOS' kern.memorystatus_vm_pressure_level
CGROUPS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))  # of version 2, and of version 1
SYSCTL = ("sysctl", "hw.memsize", "vm.swapusage", "kern.memorystatus_vm_pressure_level")


@dataclass(frozen=True)
class SystemMemory:
    """`used` is what no program can have without another losing it: on macOS the memory of apps, wired and compressed
    (Activity Monitor's "Memory Used"), on Linux all but what is available. `pressure` is macOS' own word, else ""."""

    total: int
    used: int
    swap_used: int
    pressure: str = ""


def system_memory() -> SystemMemory:
    if sys.platform == "darwin":
        return of_macos(_said("vm_stat"), _said(*SYSCTL))
    whole = of_meminfo(Path("/proc/meminfo").read_text())
    limits = [found for folder in CGROUPS if (found := of_cgroup(folder)) and found[0] < whole.total]
    return replace(whole, total=limits[0][0], used=limits[0][1]) if limits else whole


def process_memory(pid: int) -> int | None:
    """What of the process is in memory (its resident set); None when it is gone, or dead and not yet buried."""
    if sys.platform == "darwin":
        return of_ps(_said("ps", "-o", "stat=", "-o", "rss=", "-p", str(pid)))
    try:
        return of_status(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None


def of_cgroup(folder: Path) -> tuple[int, int] | None:
    """What a container may take, and what it uses but for files that are kept as long as nobody needs the room; None
    where nothing limits it."""
    for limit, usage, kept in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, used = (int((folder / name).read_text()) for name in (limit, usage))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # not there, or "max"
            continue
        return most, used - int(stat.get(kept, 0))
    return None


def of_meminfo(text: str) -> SystemMemory:
    """Linux' /proc/meminfo, whose kB are 1,024 bytes."""
    kib = {name: int(number) for name, number in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}
    used, swap = kib["MemTotal"] - kib["MemAvailable"], kib["SwapTotal"] - kib["SwapFree"]
    return SystemMemory(1024 * kib["MemTotal"], 1024 * used, 1024 * swap)


def of_status(text: str) -> int | None:
    """Linux' /proc/PID/status."""
    found = re.search(r"^VmRSS:\s+(\d+) kB$", text, re.MULTILINE)
    return 1024 * int(found[1]) if found and not re.search(r"^State:\s+[ZX]", text, re.MULTILINE) else None


def of_macos(vm_stat: str, sysctl: str) -> SystemMemory:
    """What `vm_stat` and `sysctl hw.memsize vm.swapusage kern.memorystatus_vm_pressure_level` print."""
    page = int(re.findall(r"page size of (\d+) bytes", vm_stat)[0])
    pages = {name: int(number) for name, number in re.findall(r'^"?([^":]+)"?: +(\d+)\.$', vm_stat, re.MULTILINE)}
    told = dict(re.findall(r"^([\w.]+)[:=] *(.*)$", sysctl, re.MULTILINE))
    apps = pages["Anonymous pages"] - pages["Pages purgeable"]
    used = page * (apps + pages["Pages wired down"] + pages["Pages occupied by compressor"])
    swap, unit = re.findall(r"used = ([\d.]+)([KMG])", told["vm.swapusage"].replace(",", "."))[0]
    level = int(told.get("kern.memorystatus_vm_pressure_level", 0))
    swapped = round(float(swap) * {"K": 2**10, "M": 2**20, "G": 2**30}[unit])
    return SystemMemory(int(told["hw.memsize"]), used, swapped, PRESSURE.get(level, ""))


def of_ps(text: str) -> int | None:
    """What `ps -o stat= -o rss= -p PID` prints: the state and the size in units of 1,024 bytes, or nothing."""
    state, _, size = text.strip().partition(" ")
    return 1024 * int(size) if size and not state.startswith("Z") else None


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def stay_awake() -> str | None:
    """Starts macOS' own `caffeinate`, which ends with this process; a line that says so, or None elsewhere."""
    program = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if program is None:
        return None
    subprocess.Popen([program, "-i", "-w", str(os.getpid())], stdin=subprocess.DEVNULL, start_new_session=True)
    return "this Mac will not go to sleep before the run ends (caffeinate; a closed lid still puts it to sleep)"
