"""The system calls of one save made to fail in turn, from outside the program. Part of `make faults`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anarchobot.tasks.failing_disk import _check_content, _save
from anarchobot.training import checkpoint

SAVE = """
import sys
from pathlib import Path
from anarchobot.tasks.failing_disk import _save
from anarchobot.training.checkpoint import rotate
_save(Path(sys.argv[1]), 3)
rotate(Path(sys.argv[1]), 2)
"""
CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "unlinkat", "rmdir")


@pytest.mark.faults
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace; test_faults.py fails the same operations")
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
