"""Fault injection: interrupted runs resume to the same result, and damage is detected. `make faults` does more.

The harness is that of `anarchobot selftest`; the first test shows that it can fail.
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from anarchobot.cli.main import main
from anarchobot.runs import checkpoint
from anarchobot.tasks import selftest
from anarchobot.tasks.selftest import FaultHarness
from tests.tiny import write_config


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> FaultHarness:
    return FaultHarness(tmp_path_factory.mktemp("faults") / "play")


def test_harness_detects_a_faulty_program(harness: FaultHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(harness, "_reference", harness._reference | {"loss": 1.0})
        (failure,) = harness.kill_runs(1).failures
        assert failure.endswith("differs from the reference run: loss")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_damage", lambda *args: "")  # digests are not checked
        patch.setattr(selftest, "verify", lambda folder: [])
        outcome = harness.flip_bytes(8)
        assert outcome.tried == 8
        assert any("model.npz: byte" in failure for failure in outcome.failures)
        assert any("train_00000.npy: byte" in failure for failure in outcome.failures)


def test_runs_killed_at_random_moments(harness: FaultHarness) -> None:
    outcome = harness.kill_runs(3)
    assert (outcome.tried, outcome.failures) == (3, [])


def test_interrupted_runs(harness: FaultHarness) -> None:
    outcome = harness.interrupt_runs(2)
    assert (outcome.tried, outcome.failures) == (2, [])


def test_damaged_files_are_detected(harness: FaultHarness) -> None:
    for outcome, tried in ((harness.flip_bytes(200), 200), (harness.truncate_files(50), 50)):
        assert (outcome.tried, outcome.failures) == (tried, [])


@pytest.mark.parametrize("error", [selftest.KILL, errno.ENOSPC])
def test_failure_of_each_operation_of_a_save(tmp_path: Path, error: int) -> None:
    outcome = selftest.fail_each_operation(tmp_path / "disk", "kill or full disk", error)
    assert outcome.failures == []
    assert outcome.tried > 100


@pytest.mark.faults
def test_selftest_with_fifty_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of docs/reliability.md."""
    code = main(["selftest", "--faults", "--kills", "50"])
    with capsys.disabled():
        print("\n" + capsys.readouterr().out)
    assert code == 0


class RunProcess:
    """A run in its own process, observed through its metrics."""

    def __init__(self, tmp_path: Path, shards: Path, **settings: Any) -> None:
        settings = {
            "train__total_steps": 10**6, "train__eval_interval": 10**6, "train__ckpt_interval": 2, **settings
        }  # fmt: skip
        self.folder = tmp_path / "run"
        config = write_config(tmp_path / "run.yaml", shards, self.folder, **settings)
        self.command = [sys.executable, "-m", "anarchobot", "pretrain", str(config), "train.supervise=false"]
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True)

    def lines(self) -> list[dict[str, Any]]:
        metrics = self.folder / "logs" / "metrics.jsonl"
        if not metrics.exists():
            return []
        return [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]

    def wait_for(self, event: str, above: int = 0) -> dict[str, Any]:
        for _ in range(2400):  # two minutes, for slow machines
            for line in self.lines():
                if line["event"] == event and line["step"] > above:
                    return line
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.05)
        raise AssertionError(f"no {event} above step {above}: {self.lines()[-3:]}")

    def stop(self) -> str:
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=120)[1]


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux can change the limits of a running process")
def test_full_disk_is_reported_and_the_save_retried(tmp_path: Path, tiny_shards: Path) -> None:
    """For a while no file may exceed 64 KiB, as on a full disk; a checkpoint has 110 KiB. The metrics, which must
    report it, stay below the limit for minutes."""
    run = RunProcess(tmp_path, tiny_shards, train__log_interval=10**6, train__ckpt_interval=10)
    before = run.wait_for("save")["step"]
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
    failed = run.wait_for("warning", above=before)
    assert "saving failed" in failed["text"]
    assert "File too large" in failed["text"]
    good = checkpoint.find(run.folder)
    assert before <= good.step < failed["step"]
    assert good.skipped == ()
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, unlimited)
    run.wait_for("save", above=failed["step"])
    assert "resume with" in run.stop()
    assert run.process.returncode == 130
    assert checkpoint.find(run.folder).step > failed["step"]


def test_second_run_in_the_same_folder_is_refused(tmp_path: Path, tiny_shards: Path) -> None:
    run = RunProcess(tmp_path, tiny_shards)
    run.wait_for("save")
    other = subprocess.run([*run.command, "--resume-from", "auto"], capture_output=True, text=True, check=False)
    assert other.returncode == 2
    (line,) = other.stderr.strip().splitlines()
    assert f"process {run.process.pid} on" in line
    run.process.kill()
    run.process.communicate()
    assert (
        main([*run.command[3:], "--resume-from", "auto", "--quiet", "train.total_steps=1"]) == 0
    )  # the lock died with its process


def test_damaged_newest_checkpoint_is_skipped_and_quarantined(tmp_path: Path, tiny_shards: Path, capsys: Any) -> None:
    config = str(write_config(tmp_path / "c.yaml", tiny_shards, tmp_path / "run"))
    assert main(["pretrain", config, "--quiet"]) == 0
    original = (tmp_path / "run" / "step_00000006" / "state.json").read_bytes()
    model = tmp_path / "run" / "step_00000006" / "model.npz"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    assert main(["generate", "--checkpoint", str(tmp_path / "run"), "--max-new-tokens", "1"]) == 0
    assert "step_00000006/model.npz: damaged" in capsys.readouterr().err
    assert main(["pretrain", config, "--resume-from", "auto"]) == 0
    err = capsys.readouterr().err
    assert "warning: " in err
    assert "step_00000006/model.npz: damaged (SHA-256 mismatch)" in err
    assert "moved to step_00000006.damaged" in err
    again = json.loads((tmp_path / "run" / "step_00000006" / "state.json").read_bytes())
    assert again["sha256"] == json.loads(original)["sha256"]
    assert (tmp_path / "run" / "step_00000006.damaged" / "model.npz").read_bytes() == bytes(data)
    for step in (3, 6):
        (tmp_path / "run" / f"step_{step:08d}" / "state.json").write_text("{}")
    assert main(["pretrain", config, "--resume-from", "auto"]) == 2
    assert "every checkpoint here is damaged" in capsys.readouterr().err


SLOW = """
import mlx.core as mx
from anarchobot.training.signals import StopRequest
mx.set_default_device(mx.cpu)
with StopRequest() as stop:
    x = mx.full((400, 400), 1e-3)
    for _ in range(20_000):
        x = mx.sin(x @ x)
    print("evaluating", flush=True)
    mx.eval(x)
    print("evaluated", flush=True)
"""


def test_signals_are_handled_during_a_long_evaluation() -> None:
    """Python's own handlers wait until MLX has evaluated the graph, which takes a minute."""
    with subprocess.Popen(
        [sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "evaluating\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "\n"
        assert process.stdout.readline() == "SIGTERM: saving after this step; press Ctrl-C to stop immediately\n"
        process.send_signal(signal.SIGTERM)  # a second one, from the parent or the system
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().strip() == "stopped"
    assert process.returncode == 130


@pytest.mark.faults
@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="mounting requires root")
def test_disk_fills_up_and_is_emptied(tmp_path: Path, tiny_shards: Path) -> None:
    """A 3 MB file system is filled to the last byte by another file, which is then removed."""
    small = tmp_path / "run"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here; the test with a file size limit covers this in part")
    try:
        run = RunProcess(tmp_path, tiny_shards, train__ckpt_keep=1, train__log_interval=10**6)
        run.wait_for("save")
        ballast = (small / "ballast").open("wb", buffering=0)
        try:
            while True:
                ballast.write(b"x" * 4096)
        except OSError:
            pass
        ballast.close()
        good = checkpoint.find(small)
        time.sleep(3)  # steps and failed saves, whose events can't be written
        assert run.process.poll() is None
        assert checkpoint.find(small).step >= good.step
        (small / "ballast").unlink()
        run.wait_for("save", above=good.step + 10)
        err = run.stop()
        assert "No space left on device" in err
        assert "could not be written" in err  # the count of lost events
        assert run.process.returncode == 130
    finally:
        subprocess.run(["umount", str(small)], check=False)
