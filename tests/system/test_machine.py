"""What the systems print, read: macOS by recorded texts, Linux by hand-counted ones and by a process of known size."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anarchobot.system import machine
from anarchobot.system.machine import (
    SystemMemory,
    of_macos,
    of_meminfo,
    of_ps,
    of_status,
    process_memory,
    system_memory,
)

VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                6412.
Pages active:                            366173.
Pages inactive:                          363364.
Pages speculative:                         1806.
Pages throttled:                              0.
Pages wired down:                        150894.
Pages purgeable:                            712.
"Translation faults":                1213456789.
Pages copy-on-write:                   23456789.
Pages zero filled:                    567890123.
Pages reactivated:                     12345678.
Pages purged:                           1234567.
File-backed pages:                       213456.
Anonymous pages:                         517887.
Pages stored in compressor:              345678.
Pages occupied by compressor:            123456.
Decompressions:                        12345678.
Compressions:                          23456789.
Pageins:                               34567890.
Pageouts:                                123456.
Swapins:                                  12345.
Swapouts:                                 23456.
"""
SYSCTL = """\
hw.memsize: 19327352832
vm.swapusage: total = 3072.00M  used = 1843.75M  free = 1228.25M  (encrypted)
kern.memorystatus_vm_pressure_level: 2
"""
MEMINFO = """\
MemTotal:       16000000 kB
MemFree:          500000 kB
MemAvailable:   12000000 kB
Active(anon):    1234567 kB
SwapTotal:       2000000 kB
SwapFree:        1500000 kB
HugePages_Total:       0
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux'")


def test_macos_memory_used_is_that_of_apps_wired_and_compressed() -> None:
    used = (517887 - 712 + 150894 + 123456) * 16384
    assert of_macos(VM_STAT, SYSCTL) == SystemMemory(18 * 2**30, used, round(1843.75 * 2**20), "warning")


def test_macos_without_a_pressure_level_and_with_commas_for_points() -> None:
    """A guest has no such level; some languages write 1843,75M."""
    found = of_macos(VM_STAT, SYSCTL.replace(".75M", ",75M").rpartition("kern")[0])
    assert (found.swap_used, found.pressure) == (1933312000, "")


def test_ps_tells_the_size_and_who_is_dead() -> None:
    assert of_ps("S+    123456\n") == 123456 * 1024
    assert of_ps("Z         0\n") is None
    assert of_ps("") is None


def test_linux_memory_used_is_what_is_not_available() -> None:
    assert of_meminfo(MEMINFO) == SystemMemory(16_384_000_000, 4_096_000_000, 512_000_000)
    assert of_status("Name:\tpython\nState:\tS (sleeping)\nVmHWM:\t  900 kB\nVmRSS:\t  800 kB\n") == 819_200
    assert of_status("Name:\tpython\nState:\tZ (zombie)\n") is None


def test_a_process_is_as_large_as_what_it_holds_until_it_is_dead() -> None:
    code = "import sys; held = b'x' * 200_000_000; print('held', flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        size = process_memory(process.pid)
        assert size is not None and 200e6 < size < 260e6
        if shutil.which("ps"):
            told = subprocess.run(
                ["ps", "-o", "stat=", "-o", "rss=", "-p", str(process.pid)], capture_output=True, text=True, check=True
            )
            assert of_ps(told.stdout) == pytest.approx(size, rel=0.02)
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet buried
        assert process_memory(process.pid) is None
    assert process_memory(process.pid) is None


@linux
def test_the_machine_is_as_large_as_sysconf_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CGROUPS", (tmp_path / "none",))  # a container may be smaller than its machine
    found = system_memory()
    assert found.total == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < found.used < found.total


@linux
def test_a_container_is_smaller_than_its_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The files of a control group as Linux writes them, of either version."""
    for folder, limit, usage, kept in (
        ("v2", "memory.max", "memory.current", "inactive_file"),
        ("v1", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / limit).write_text("100000000\n")
        (tmp_path / folder / usage).write_text("70000000\n")
        (tmp_path / folder / "memory.stat").write_text(f"anon 5\n{kept} 30000000\nactive_file 9\n")
        monkeypatch.setattr(machine, "CGROUPS", (tmp_path / "none", tmp_path / folder))
        assert (system_memory().total, system_memory().used) == (100_000_000, 40_000_000)
        (tmp_path / folder / limit).write_text("max\n" if folder == "v2" else "9223372036854771712\n")
        assert system_memory().total == of_meminfo(Path("/proc/meminfo").read_text()).total


def test_on_macos_the_systems_own_programs_are_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Programs of these names that print what a Mac's do."""
    for name, text in {"vm_stat": VM_STAT, "sysctl": SYSCTL, "ps": "S+  2048\n"}.items():
        (tmp_path / name).write_text(f"#!{sys.executable}\nprint('''{text}''', end='')\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert system_memory() == of_macos(VM_STAT, SYSCTL)
    assert process_memory(1) == 2 * 2**20
