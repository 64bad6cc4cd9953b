"""Memory of processes and machines: against a process of known size, cgroup files and a recorded sysctl."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from anarchobot.system import machine
from anarchobot.system.machine import gpu_working_set, process_memory, stay_awake, system_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc and sysconf")


def script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_process_memory_until_the_process_dies() -> None:
    code = "import sys; held = b'x' * 200_000_000; print('held', flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        size = process_memory(process.pid)
        assert size is not None and 200e6 < size < 260e6
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
        assert process_memory(process.pid) is None
    assert process_memory(process.pid) is None
    assert process_memory(-3) is None


def test_unreadable_process_raises_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: psutil.Process) -> str:
        raise psutil.AccessDenied(self.pid)

    monkeypatch.setattr(psutil.Process, "status", denied)
    with pytest.raises(PermissionError) as raised:
        process_memory(os.getpid())
    assert raised.value.filename == f"process {os.getpid()}"


@linux
def test_system_memory_matches_sysconf_and_meminfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CGROUPS", (tmp_path / "none",))  # this test may run in a container
    found = system_memory()
    assert found.total == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    used = 1024 * (int(meminfo["MemTotal:"]) - int(meminfo["MemAvailable:"]))
    assert found.used == pytest.approx(used, rel=0.2)
    assert found.pressure == ""


@linux
def test_a_container_limit_replaces_the_machines_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the files that Linux writes for control groups, version 1 and 2."""
    for folder, limit, usage, cache in (
        ("v2", "memory.max", "memory.current", "inactive_file"),
        ("v1", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / limit).write_text("100000000\n")
        (tmp_path / folder / usage).write_text("70000000\n")
        (tmp_path / folder / "memory.stat").write_text(f"anon 5\n{cache} 30000000\nactive_file 9\n")
        monkeypatch.setattr(machine, "CGROUPS", (tmp_path / "none", tmp_path / folder))
        assert (system_memory().total, system_memory().used) == (100_000_000, 40_000_000)
        (tmp_path / folder / limit).write_text("max\n" if folder == "v2" else "9223372036854771712\n")
        assert system_memory().total == psutil.virtual_memory().total


@pytest.mark.parametrize(("printed", "pressure"), [("1", "normal"), ("2", "warning"), ("4", "critical"), ("", "")])
def test_macos_memory_pressure(printed: str, pressure: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a fake sysctl that prints only the level; virtual machines have no level."""
    script(tmp_path / "sysctl", f'[ "$*" = "-n kern.memorystatus_vm_pressure_level" ] && echo {printed}')
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert system_memory().pressure == pressure


@pytest.mark.parametrize(
    ("set_to", "gib", "expected"),
    # The defaults as Metal reports them: 10922.67 MiB, 27648 MiB and 49152 MiB.
    [("0", 16, 11453246122), ("0", 36, 28991029248), ("0", 64, 51539607552), ("", 16, 11453246122),
     ("26624", 32, 26624 * 2**20)],
)  # fmt: skip
def test_memory_that_macos_recommends_for_the_gpu(
    set_to: str, gib: int, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a fake sysctl; old systems and Intel Macs have no such limit."""
    script(tmp_path / "sysctl", f'[ "$*" = "-n iogpu.wired_limit_mb" ] && echo {set_to}')
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_working_set(gib * 2**30) == expected


def test_caffeinate_runs_as_long_as_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake caffeinate records its arguments."""
    recorded = tmp_path / "recorded"
    script(tmp_path / "caffeinate", f'echo "$@" > {recorded}.part && mv {recorded}.part {recorded}')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(subprocess.Popen, "__del__", lambda process: None)  # the process is meant to outlive its handle
    monkeypatch.setattr(sys, "platform", "linux")
    assert stay_awake() is None and not recorded.exists()
    monkeypatch.setattr(sys, "platform", "darwin")
    message = stay_awake()
    for _ in range(5000):
        if recorded.exists():
            break
        time.sleep(0.02)
    assert recorded.read_text().split() == ["-i", "-w", str(os.getpid())]
    assert message is not None and "caffeinate" in message
