"""strace makes every system call of a save, and of a whole run, fail in turn: `make faults`."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anarchobot.runs import checkpoint
from anarchobot.tasks.selftest import FaultHarness, check_test_step, save_test_step

SAVE = """
import sys
from pathlib import Path
from anarchobot.runs.checkpoint import rotate
from anarchobot.tasks.selftest import save_test_step
save_test_step(Path(sys.argv[1]), 3)
rotate(Path(sys.argv[1]), 2)
"""
NO_STRACE = pytest.mark.skipif(shutil.which("strace") is None, reason="requires strace; test_faults.py does not")
MAX_CALLS = 50
CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "unlinkat", "rmdir")


@pytest.mark.faults
@NO_STRACE
@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
def test_failure_of_every_system_call_of_a_save(tmp_path: Path, fault: str) -> None:
    for step in (1, 2):
        save_test_step(tmp_path / "before", step)
    tried = 0
    for call in CALLS:
        for number in range(1, 1000):
            run = tmp_path / "run"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(tmp_path / "before", run)
            inject = ["-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={number}"]
            strace = ["strace", "-f", "-qq", "-o", str(tmp_path / "trace"), *inject]
            command = [*strace, sys.executable, "-B", "-c", SAVE, str(run)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            injected = "INJECTED" in (tmp_path / "trace").read_text() or "SIGKILL" in (tmp_path / "trace").read_text()
            found = checkpoint.find(run)
            assert found.step in (2, 3), (call, number)
            assert found.skipped == (), (call, number)
            check_test_step(found)
            if not injected:
                assert (done.returncode, found.step) == (0, 3), done.stderr
                break
            tried += 1
            checkpoint.clean_up(run)
            save_test_step(run, 3)
            checkpoint.rotate(run, 2)
            check_test_step(checkpoint.find(run))
            assert sorted(p.name for p in run.iterdir()) == ["latest.json", "step_00000002", "step_00000003"]
    print(f"{fault}: {tried} system calls failed, each recovered")
    assert tried > 20


@pytest.mark.faults
@NO_STRACE
def test_kill_at_any_change_to_the_run_folder(tmp_path: Path) -> None:
    """A run is killed at up to MAX_CALLS evenly spread calls of each kind that change its folder, then resumed, and
    ends like the reference run."""
    harness = FaultHarness(tmp_path / "harness")

    def strace(name: str, *options: str) -> str:
        """Returns the trace of a run."""
        words = ["strace", "-f", "-y", "-qq", "-o", str(tmp_path / "trace"), *options]
        subprocess.run([*words, *harness.command(name)], capture_output=True, check=False)
        return (tmp_path / "trace").read_text()

    killed = 0
    for call in CALLS:
        lines = [
            line for line in strace("traced", "-e", f"trace={call}").splitlines() if re.search(rf" {call}\(", line)
        ]
        inside = [number for number, line in enumerate(lines, 1) if f"{harness.folder}/traced" in line]
        shutil.rmtree(harness.folder / "traced")
        for number in inside[:: -(-len(inside) // MAX_CALLS) or 1]:
            name = f"{call}{number}"
            trace = strace(name, "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}")
            killed += "SIGKILL" in trace
            assert harness.differences(name) == [], name
            shutil.rmtree(harness.folder / name)
    print(f"killed at {killed} system calls of a run, each recovered")
    assert killed > 50
