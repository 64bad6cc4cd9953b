"""A parent that resumes what died: how often, with what, and when it gives up."""

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
from anarchobot.config.schema import Config
from anarchobot.model.llama.flops import model_step
from anarchobot.runs import checkpoint
from anarchobot.tasks import supervise
from anarchobot.training.signals import PARENT
from tests.tiny import write_config

# Stands in for a run: notes its words, saves a step as told, and dies as told. Each line of its plan is one life.
RUN = """
import json, os, signal, sys
from pathlib import Path
folder = Path(sys.argv[1])
plan = (folder / "plan").read_text().split("\\n")
(folder / "words").open("a").write(json.dumps(sys.argv[2:]) + "\\n")
(folder / "plan").write_text("\\n".join(plan[1:]))
step, end = plan[0].split()
if step != "-":
    (folder / "run" / f"step_{int(step):08d}").mkdir(parents=True)
    (folder / "run" / f"step_{int(step):08d}" / "state.json").write_text("{}")
assert int(os.environ["ANARCHOBOT_PARENT"]) == os.getppid()
os.kill(os.getpid(), getattr(signal, end)) if end.startswith("SIG") else sys.exit(int(end))
"""


def live(tmp_path: Path, *plan: str, rows: int = 4) -> tuple[int, list[str]]:
    (tmp_path / "plan").write_text("\n".join(plan))
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    code = supervise.supervise(command, tmp_path / "run", rows, 3)
    return code, (tmp_path / "words").read_text().splitlines()


def test_what_ends_by_itself_is_not_started_again(tmp_path: Path) -> None:
    for code in (0, 2, 130):
        folder = tmp_path / str(code)
        folder.mkdir()
        assert live(folder, f"- {code}") == (code, ["[]"])


def test_what_dies_because_it_was_told_to_stop_is_not_started_again(tmp_path: Path) -> None:
    """A signal that comes before the child can answer it kills it."""
    (tmp_path / "plan").write_text("- SIGTERM\n10 0")
    code = (
        "import os, signal, threading, time\nfrom pathlib import Path\nfrom anarchobot.tasks import supervise\n"
        "def stop():\n"
        "    while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL: time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "threading.Thread(target=stop).start()\n"
        "print(supervise.supervise(['sleep', '300'], Path('.'), 1, 1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == "130\n" and "going on" not in done.stderr


def test_what_dies_goes_on_from_its_newest_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, words = live(tmp_path, "- SIGABRT", "10 SIGKILL", "20 SIGSEGV", "30 0")
    auto = '["--resume-from", "auto"]'
    assert (code, words) == (0, ["[]", "[]", auto, auto])
    assert "the run was ended by SIGSEGV: going on from step 20" in capfd.readouterr().err


def test_after_three_deaths_behind_one_checkpoint_the_micro_batch_shrinks_and_then_it_ends(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, words = live(tmp_path, "5 SIGABRT", *["- SIGABRT"] * 9)
    auto = '"--resume-from", "auto"]'
    assert code == 1
    assert words == [
        "[]", *[f"[{auto}"] * 3, f'["train.grad_accum_steps=6", "--batch-size", "2", {auto}',
        f'["train.grad_accum_steps=12", "--batch-size", "1", {auto}',
    ]  # fmt: skip
    err = capfd.readouterr().err
    assert "behind step 5, at last with one sequence at a time: make the model" in err


def test_supervision_is_for_long_runs_unless_told(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = load_config(write_config(tmp_path / "c.yaml", tiny_shards, tmp_path / "run")).config
    long = load_config(tmp_path / "c.yaml", ["train.total_steps=20000000"]).config
    assert not supervise.wanted(short)
    assert supervise.wanted(long)
    per_step = 2 * model_step(short.model, 2, [(0, 32)])
    assert supervise.estimate_seconds(long) == pytest.approx(2e7 * per_step / supervise.CPU_RATE)

    def told(config: Config, value: bool) -> Config:
        return config.model_copy(update={"train": config.train.model_copy(update={"supervise": value})})

    assert supervise.wanted(told(short, True))
    assert not supervise.wanted(told(long, False))
    monkeypatch.setenv(PARENT, "1")
    assert not supervise.wanted(told(long, True))


def test_a_tuning_run_is_guessed_by_its_files(tmp_path: Path, tiny_shards: Path) -> None:
    """Four bytes a token, in windows of 32, two a step; of a dataset elsewhere nothing is known, and it is taken for
    10^8 tokens."""
    (tmp_path / "chats").mkdir()
    for name, size in {"a": 12_800, "b": 25_600}.items():
        (tmp_path / "chats" / f"{name}.jsonl").write_bytes(b" " * size)
    words = ["train.epochs=2", "train.micro_batch_size=2", "train.grad_accum_steps=1"]
    path = write_config(tmp_path / "c.yaml", tiny_shards, tmp_path / "run")
    here = load_config(path, [*words, f"data.dataset={tmp_path}/chats"]).config
    step = model_step(here.model, 2, [(0, 32)])
    assert supervise.estimate_seconds(here, tuning=True) == pytest.approx(300 * step / supervise.CPU_RATE)
    assert not supervise.wanted(here, tuning=True)
    elsewhere = load_config(path, [*words, "data.dataset=somebody/chats"]).config
    assert supervise.estimate_seconds(elsewhere, tuning=True) == pytest.approx(1e8 / 32 * step / supervise.CPU_RATE)


def wait_for(so: Callable[[], bool]) -> None:
    for _ in range(2400):  # slow machines are
        if so():
            return
        time.sleep(0.05)
    raise AssertionError("waited for two minutes")


def test_a_supervised_run_survives_kill_9_and_obeys_ctrl_c(tmp_path: Path, tiny_shards: Path) -> None:
    """The flag on the command line, a real run, killed once and then interrupted through its parent."""
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
    assert "the run was ended by SIGKILL: going on from step" in err
    assert "stopped at step" in err
    assert max(checkpoint.saved_steps(run)) >= newest
    assert main(["pretrain", str(config), "--quiet", "--resume-from", "auto", "train.total_steps=1"]) == 0


def test_a_run_whose_parent_is_gone_saves_and_stops(tmp_path: Path, tiny_shards: Path) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__total_steps=10**6)
    command = [sys.executable, "-m", "anarchobot", "pretrain", str(config), "--quiet"]
    environment = {**os.environ, PARENT: "99999999"}  # which nobody is; 1 may be this process, in a container
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "stopped at step 0" in done.stderr
