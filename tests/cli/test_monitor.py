"""`anarchobot monitor` beside a process that locks a run folder and writes a log."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anarchobot.cli import monitor
from anarchobot.cli.main import main
from anarchobot.reporting.monitor import Monitor, Sample
from anarchobot.reporting.run_status import RunStatus

# Locks the folder, waits for a line, appends it to the log, and ends.
RUN = """
import sys
from pathlib import Path
from anarchobot.storage.lock import FolderLock
folder = Path(sys.argv[1])
with FolderLock(folder):
    print("locked", flush=True)
    line = sys.stdin.readline()
    with (folder / "logs" / "metrics.jsonl").open("a") as log:
        log.write(line)
"""


def event(name: str, step: int, time: float = 0.0, **values: Any) -> dict[str, Any]:
    return {"step": step, "event": name, "time": time, **values}


def write_run(folder: Path, *events: dict[str, Any], steps: int = 100) -> Path:
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))
    (folder / "logs" / "environment.json").write_text(json.dumps({"steps": steps}))
    return folder


def test_what_a_run_has_logged(tmp_path: Path) -> None:
    """Ten steps in 20 s, after an interruption of an hour: 70 steps are left."""
    run = write_run(
        tmp_path / "mine",
        event("eval", 0, val_loss=9.0, val_bpb=3.0),
        event("train", 20, 50, loss=4.0, smooth_loss=5.0, tokens_per_second=9.0),
        event("eval", 20, val_loss=4.5),
        event("train", 30, 70, loss=1.0, smooth_loss=1.0),
        event("eval", 30, val_loss=1.0),
        event("resume", 20, 3670),
        event("train", 20, 3670, loss=4.0, smooth_loss=5.0),
        event("skip", 25, reason="spike"),
        event("train", 30, 3690, loss=3.0, smooth_loss=3.5, tokens_per_second=2000.4, peak_memory_gb=0.5),
        event("eval", 30, val_loss="nan"),
    )
    status = RunStatus(run)
    assert (status.step, status.steps, status.seconds_left, status.best) == (30, 100, 140.0, (20, 4.5))
    assert status.losses == {20: 5.0, 30: 3.5}
    shown = dict(monitor.rows(status, Sample(0, 1.25, 2.0, 16.0, 0.0, ""), curves=True))
    assert shown["step"] == "30 of 100 (30%), 2:20 left"
    assert shown["loss"] == "3.5000  █▁"
    assert shown["validation"] == "4.5000 at step 20, best 4.5000 at step 20  █▁"
    assert shown["speed"] == "2,000 tokens/s"
    assert {"1.25", "0.50", "2.0", "16.0"} <= set(shown["memory"].split())
    assert "warning" not in shown
    with (run / "logs" / "metrics.jsonl").open("a") as log:
        log.write(json.dumps(event("train", 40, 3695, loss=2.0, smooth_loss=3.0)) + "\n")
        log.write(json.dumps(event("skip", 40, reason="not finite")) + "\n")
    status.update()
    assert status.warning == "step 40: not finite"
    assert (status.step, status.seconds_left) == (40, 60 * 25 / 20)


@pytest.mark.parametrize(
    ("values", "bars"),
    [([4, 3, 2, 1], "█▆▃▁"), ([2, 2], "▁▁"), ([x // 2 for x in range(80)], "▁▁▁▂▂▂▂▂▂▃▃▃▃▃▄▄▄▄▄▄▅▅▅▅▅▅▆▆▆▆▆▇▇▇▇▇▇███")],
    ids=["falling", "constant", "means of two"],
)
def test_a_curve(values: list[float], bars: str) -> None:
    assert monitor._curve(values).strip() == bars


@pytest.mark.parametrize(("finished", "code"), [(True, 0), (False, 0), (None, 1)])
def test_it_ends_with_the_run(
    finished: bool | None,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = write_run(tmp_path / "mine", event("train", 50, 10, loss=4.0, smooth_loss=4.0))
    process = subprocess.Popen([sys.executable, "-c", RUN, str(run)], stdin=-1, stdout=-1, text=True)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()
    last = event("train", 60, loss=3.0, smooth_loss=3.0) if finished is None else event("end", 50, finished=finished)
    rows = monitor.rows

    def shown(*args: Any, **kwargs: Any) -> list[tuple[str, str]]:
        """Ends the run once it is shown."""
        if process.poll() is None:
            process.communicate(json.dumps(last) + "\n", timeout=20)
        return rows(*args, **kwargs)

    monkeypatch.setattr(monitor, "REFRESH_SECONDS", 0.01)
    monkeypatch.setattr(monitor, "rows", shown)
    assert main(["monitor", str(run)]) == code
    output = capsys.readouterr()
    assert "50 of 100 (50%)" in output.err
    state, step = {True: ("finished", 50), False: ("stopped", 50), None: ("died", 60)}[finished]
    advice = ": --resume-from auto resumes it" if state == "died" else ""
    assert output.out == f"{run}: {state} at step {step}{advice}\n"


def test_it_ends_with_the_run_though_its_process_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of `train`, which first ends and resumes its run with another length."""
    run = write_run(tmp_path / "mine", event("train", 15, 10, loss=4.0), steps=15)
    log, environment = run / "logs" / "metrics.jsonl", run / "logs" / "environment.json"
    watched, status = Monitor(os.getpid(), run), RunStatus(run)

    def append(*events: dict[str, Any]) -> None:
        with log.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in events))
        status.update()

    append(event("end", 15, finished=True))
    assert watched.sample() is not None and watched.state == "running"
    environment.write_text(json.dumps({"steps": 90}))
    assert watched._log is not None
    watched._log.last_event = -1e9
    append(event("resume", 15), event("train", 30, 20, loss=4.0))
    assert watched.sample() is not None and watched._log.last_event >= 0
    monkeypatch.setattr("anarchobot.reporting.monitor.END_SECONDS", -1.0)
    assert watched.sample() is not None and watched.state == "running" and status.steps == 90
    append(event("end", 90, finished=True))
    assert watched.sample() is None and watched.state == "finished"


def test_a_run_that_has_ended_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "mine", event("eval", 100, val_loss=2.5), event("end", 100, finished=True))
    assert main(["monitor", str(run)]) == 0
    output = capsys.readouterr()
    assert "100 of 100 (100%)" in output.err and "left" not in output.err
    assert output.out == f"{run}: finished at step 100, best validation loss 2.5000 at step 100\n"
    assert main(["monitor", str(run), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["state"], values["steps"], values["best_val_loss"]) == ("finished", 100, 2.5)
    assert main(["monitor", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err
