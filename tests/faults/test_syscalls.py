"""The system calls of a save, and of a whole run, made to fail in turn, from outside the program: `make faults`."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anarchobot.runs import checkpoint
from anarchobot.tasks.selftest_disk import _check_content, _save
from anarchobot.tasks.selftest import Playground

SAVE = """
import sys
from pathlib import Path
from anarchobot.tasks.selftest_disk import _save
from anarchobot.runs.checkpoint import rotate
_save(Path(sys.argv[1]), 3)
rotate(Path(sys.argv[1]), 2)
"""
NO_STRACE = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace; test_faults.py does without")
MOST = 50
CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "unlinkat", "rmdir")


@pytest.mark.faults
@NO_STRACE
@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
def test_every_system_call_of_a_save_may_fail(tmp_path: Path, fault: str) -> None:
    for step in (1, 2):
        _save(tmp_path / "before", step)
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
            happened = "INJECTED" in (tmp_path / "trace").read_text() or "SIGKILL" in (tmp_path / "trace").read_text()
            found = checkpoint.find(run)
            assert found.step in (2, 3), (call, number)
            assert found.passed_over == (), (call, number)
            _check_content(found)
            if not happened:
                assert (done.returncode, found.step) == (0, 3), done.stderr
                break
            tried += 1
            checkpoint.tidy(run)
            _save(run, 3)
            checkpoint.rotate(run, 2)
            _check_content(checkpoint.find(run))
            assert sorted(p.name for p in run.iterdir()) == ["latest.json", "step_00000002", "step_00000003"]
    print(f"{fault}: {tried} system calls failed, each recovered")
    assert tried > 20


@pytest.mark.faults
@NO_STRACE
def test_a_run_may_be_killed_at_any_change_to_its_folder(tmp_path: Path) -> None:
    """The writes, flushes and renames in the folder of a run that trains, validates, saves and logs, up to MOST evenly
    spread ones of a kind: it is killed there, resumed, and ends as the unbroken run."""
    playground = Playground(tmp_path / "play")

    def strace(name: str, *options: str) -> str:
        """The trace of a run with these options."""
        words = ["strace", "-f", "-y", "-qq", "-o", str(tmp_path / "trace"), *options]
        subprocess.run([*words, *playground.command(name)], capture_output=True, check=False)
        return (tmp_path / "trace").read_text()

    killed = 0
    for call in CALLS:
        lines = [
            line for line in strace("traced", "-e", f"trace={call}").splitlines() if re.search(rf" {call}\(", line)
        ]
        inside = [number for number, line in enumerate(lines, 1) if f"{playground.folder}/traced" in line]
        shutil.rmtree(playground.folder / "traced")
        for number in inside[:: -(-len(inside) // MOST) or 1]:
            name = f"{call}{number}"
            trace = strace(name, "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}")
            killed += "SIGKILL" in trace
            assert playground.differences(name) == [], name
            shutil.rmtree(playground.folder / name)
    print(f"killed at {killed} system calls of a run, each recovered")
    assert killed > 50
