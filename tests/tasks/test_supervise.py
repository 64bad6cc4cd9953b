"""The supervising parent: how often it resumes a run, with which settings, and when it gives up."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from anarchobot.cli.main import main
from anarchobot.config.loading import load_config
from anarchobot.config.schema import Config, TrainConfig
from anarchobot.model.parameters import model_flops
from anarchobot.runs import checkpoint
from anarchobot.tasks import supervise
from anarchobot.training.signals import PARENT_ENV
from tests.tiny import write_config

# A fake run: logs its arguments, saves a step and exits or dies as planned. Each line of the plan is one process.
RUN = """
import json, os, signal, sys
from pathlib import Path
folder = Path(sys.argv[1])
plan = (folder / "plan").read_text().split("\\n")
(folder / "arguments").open("a").write(json.dumps(sys.argv[2:]) + "\\n")
(folder / "plan").write_text("\\n".join(plan[1:]))
step, end = plan[0].split()
if step != "-":
    (folder / "run" / f"step_{int(step):08d}").mkdir(parents=True)
    (folder / "run" / f"step_{int(step):08d}" / "state.json").write_text("{}")
assert int(os.environ["ANARCHOBOT_PARENT"]) == os.getppid()
os.kill(os.getpid(), getattr(signal, end)) if end.startswith("SIG") else sys.exit(int(end))
"""


def run_plan(tmp_path: Path, *plan: str, rows: int = 4, eval_batches: int | None = None) -> tuple[int, list[str]]:
    (tmp_path / "plan").write_text("\n".join(plan))
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    train = TrainConfig(
        save_dir=str(tmp_path / "run"), micro_batch_size=rows, grad_accum_steps=3, eval_batches=eval_batches
    )
    code = supervise.supervise(command, train)
    return code, (tmp_path / "arguments").read_text().splitlines()


def test_normal_exit_is_not_resumed(tmp_path: Path) -> None:
    for code in (0, 2, 130):
        folder = tmp_path / str(code)
        folder.mkdir()
        assert run_plan(folder, f"- {code}") == (code, ["[]"])


def test_death_by_a_forwarded_signal_is_not_resumed(tmp_path: Path) -> None:
    """A signal that arrives before the child installs its handlers kills it."""
    (tmp_path / "plan").write_text("- SIGTERM\n10 0")
    code = (
        "import os, signal, threading, time\nfrom pathlib import Path\nfrom anarchobot.tasks import supervise\n"
        "def stop():\n"
        "    while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL: time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "threading.Thread(target=stop).start()\n"
        "from anarchobot.config.schema import TrainConfig\n"
        "print(supervise.supervise(['sleep', '300'], TrainConfig(micro_batch_size=1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == "130\n" and "resuming" not in done.stderr


def test_killed_run_resumes_from_its_newest_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, arguments = run_plan(tmp_path, "- SIGABRT", "10 SIGKILL", "20 SIGSEGV", "30 0")
    auto = '["--resume-from", "auto"]'
    assert (code, arguments) == (0, ["[]", "[]", auto, auto])
    assert "the run was killed by SIGSEGV: resuming from step 20" in capfd.readouterr().err


def test_micro_batch_shrinks_after_three_deaths_at_one_checkpoint_then_gives_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, arguments = run_plan(tmp_path, "5 SIGABRT", *["- SIGABRT"] * 9)
    auto = '"--resume-from", "auto"]'
    assert code == 1
    assert arguments == [
        "[]", *[f"[{auto}"] * 3, f'["train.grad_accum_steps=6", "--batch-size", "2", {auto}',
        f'["train.grad_accum_steps=12", "--batch-size", "1", {auto}',
    ]  # fmt: skip
    err = capfd.readouterr().err
    assert "giving up" in err and "after step 5, even with train.micro_batch_size=1: reduce the model" in err


def test_smaller_micro_batches_validate_on_as_many_sequences(tmp_path: Path) -> None:
    """A resumed run keeps its validation set (tests/tasks/test_resume.py); one that starts again must be told."""
    (tmp_path / "a").mkdir()
    _, lines = run_plan(tmp_path / "a", *["- SIGABRT"] * 9, rows=12, eval_batches=3)
    words = [json.loads(line) for line in lines[4:]]
    sizes = [(int(w[w.index("--batch-size") + 1]), next(x for x in w if "eval_batches" in x)) for w in words]
    assert sizes == [(6, "train.eval_batches=6"), (3, "train.eval_batches=12"), (1, "train.eval_batches=36")]
    (tmp_path / "b").mkdir()
    _, lines = run_plan(tmp_path / "b", "5 SIGABRT", *["- SIGABRT"] * 9, rows=12, eval_batches=3)
    assert not any("eval_batches" in line for line in lines)


def test_long_runs_are_supervised_by_default(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = load_config(write_config(tmp_path / "c.yaml", tiny_shards, tmp_path / "run")).config
    long = load_config(tmp_path / "c.yaml", ["train.total_steps=20000000"]).config
    assert not supervise.should_supervise(short)
    assert supervise.should_supervise(long)
    per_step = 2 * model_flops(short.model, 2, [(0, 32)])
    assert supervise.estimate_seconds(long) == pytest.approx(2e7 * per_step / supervise.CPU_RATE)

    def with_supervise(config: Config, value: bool) -> Config:
        return config.model_copy(update={"train": config.train.model_copy(update={"supervise": value})})

    assert supervise.should_supervise(with_supervise(short, True))
    assert not supervise.should_supervise(with_supervise(long, False))
    monkeypatch.setenv(PARENT_ENV, "1")
    assert not supervise.should_supervise(with_supervise(long, True))


def test_duration_of_a_tuning_run_is_estimated_from_its_files(tmp_path: Path, tiny_shards: Path) -> None:
    """Four bytes per token, windows of 32, two per step; a Hugging Face dataset counts as 10^8 tokens."""
    (tmp_path / "chats").mkdir()
    for name, size in {"a": 12_800, "b": 25_600}.items():
        (tmp_path / "chats" / f"{name}.jsonl").write_bytes(b" " * size)
    words = ["train.epochs=2", "train.micro_batch_size=2", "train.grad_accum_steps=1"]
    path = write_config(tmp_path / "c.yaml", tiny_shards, tmp_path / "run")
    local = load_config(path, [*words, f"data.dataset={tmp_path}/chats"]).config
    step = model_flops(local.model, 2, [(0, 32)])
    assert supervise.estimate_seconds(local, tuning=True) == pytest.approx(300 * step / supervise.CPU_RATE)
    assert not supervise.should_supervise(local, tuning=True)
    remote = load_config(path, [*words, "data.dataset=somebody/chats"]).config
    assert supervise.estimate_seconds(remote, tuning=True) == pytest.approx(1e8 / 32 * step / supervise.CPU_RATE)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(2400):  # two minutes, for slow machines
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("timeout after two minutes")


def test_supervised_run_survives_kill_9_and_stops_on_ctrl_c(tmp_path: Path, tiny_shards: Path) -> None:
    """A real run with --supervise, killed once and then interrupted through its parent."""
    run = tmp_path / "run"
    config = write_config(
        tmp_path / "c.yaml", tiny_shards, run, train__total_steps=10**6, train__eval_interval=10**6,
        train__ckpt_interval=3,
    )  # fmt: skip
    command = [sys.executable, "-m", "anarchobot", "pretrain", str(config), "--supervise", "--quiet"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: bool(checkpoint.saved_steps(run)))
        os.kill(int((run / ".lock").read_text().split()[1]), signal.SIGKILL)
        metrics = run / "logs" / "metrics.jsonl"
        wait_for(lambda: '"train"' in metrics.read_text().partition('"resume"')[2])
        newest = max(checkpoint.saved_steps(run))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the run was killed by SIGKILL: resuming from step" in err
    assert "stopped at step" in err
    assert max(checkpoint.saved_steps(run)) >= newest
    assert main(["pretrain", str(config), "--quiet", "--resume-from", "auto", "train.total_steps=1"]) == 0


def test_run_saves_and_stops_if_its_parent_is_gone(tmp_path: Path, tiny_shards: Path) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__total_steps=10**6)
    command = [sys.executable, "-m", "anarchobot", "pretrain", str(config), "--quiet"]
    environment = {**os.environ, PARENT_ENV: "99999999"}  # no such process; 1 may be this process, in a container
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "stopped at step 0" in done.stderr
