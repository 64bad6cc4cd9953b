"""The monitor next to real runs that are running, killed, finished, not started yet or missing."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from anarchobot.config.errors import UserError
from anarchobot.reporting import memory_chart
from anarchobot.reporting.monitor import Alarm, LogTail, Monitor, Sample, attach
from anarchobot.storage.lock import FolderLock
from anarchobot.system.machine import process_memory
from tests.tiny import write_config

SCRIPT = Path(__file__).parents[2] / "scripts" / "memory_monitor.py"
LONG = {"train__total_steps": 10**6, "train__eval_interval": 10**6, "train__ckpt_interval": 10**6}
# A run that takes a step only once the CSV has as many rows, so the monitor cannot miss it.
PACED_RUN = """
import sys, time
from pathlib import Path
from anarchobot.cli.main import main
from anarchobot.training.mlx_engine import MLXEngine
table, step = Path(sys.argv[1]), MLXEngine.train_step
def paced(self, batch, number, *rest):
    while not table.exists() or len(table.read_text().splitlines()) <= number:
        time.sleep(0.01)
    return step(self, batch, number, *rest)
MLXEngine.train_step = paced
sys.exit(main(sys.argv[2:]))
"""


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(2400):  # machines can be slow
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("timed out after two minutes")


def monitor(*words: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **more)


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def start_run(config: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "anarchobot", "pretrain", str(config), "--quiet"])


@pytest.fixture
def long_run(tmp_path: Path, tiny_shards: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run in tmp_path/run that has logged its first steps."""
    process = start_run(write_config(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", **LONG))
    metrics = tmp_path / "run" / "logs" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"train"' in metrics.read_text())
    yield process
    process.kill()
    process.wait()


def sample(**values: Any) -> Sample:
    return Sample(**{
        "time": 0.0, "process_gb": 1.0, "system_used_gb": 4.0, "system_total_gb": 10.0, "swap_used_gb": 0.0,
        "pressure": "", **values,
    })  # fmt: skip


def test_csv_matches_the_system_and_the_runs_log(long_run: subprocess.Popen[bytes], tmp_path: Path) -> None:
    run, table, picture = tmp_path / "run", tmp_path / "m.csv", tmp_path / "m.svg"
    words = ["--run", run, "--interval", 0.25, "--duration", 2, "--csv", table, "--plot", picture, "--alarm", "0.01"]
    for _ in range(10):  # monitor or run may be stalled for two seconds: then retry
        table.unlink(missing_ok=True)
        done = monitor(*words)
        memory = process_memory(long_run.pid)
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr.count(" alarm: the process uses ") == 1
        assert done.stderr.endswith(f"{run}: still running\n")
        rows = rows_of(table)
        assert 1 <= len(rows) <= 9
        steps = [int(row["step"]) for row in rows]
        if steps[-1] > steps[0]:
            break
    assert memory is not None and float(rows[-1]["process_gb"]) == pytest.approx(memory / 1e9, rel=0.1)
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()[:-1]]
    by_step = {line["step"]: line for line in lines if line["event"] == "train"}
    assert steps == sorted(steps) and steps[-1] > steps[0]
    for row in rows:
        line = by_step[int(row["step"])]
        for name in ("tokens_per_second", "active_memory_gb", "peak_memory_gb", "cache_memory_gb"):
            assert float(row[name]) == line[name]
        assert 0 < line["active_memory_gb"] <= line["peak_memory_gb"]
    svg = ElementTree.fromstring(picture.read_text())
    names = {title.text for title in svg.iter("{http://www.w3.org/2000/svg}title")}
    assert {"process", "MLX active", "machine"} <= names
    assert monitor("--pid", long_run.pid, "--duration", 0.1, "--quiet").stderr == f"{long_run.pid}: still running\n"


def test_killed_run_ends_the_monitor_with_exit_code_1(long_run: subprocess.Popen[bytes], tmp_path: Path) -> None:
    run, table = tmp_path / "run", tmp_path / "m.csv"
    command = [sys.executable, str(SCRIPT), "--run", str(run), "--interval", "0.1", "--csv", str(table), "--quiet"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: table.exists() and len(table.read_text().splitlines()) > 2)
        os.kill(long_run.pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=100)
    assert (process.returncode, stderr) == (1, f"{run}: died\n")
    done = monitor("--run", run)
    assert done.returncode == 2
    assert "not running (died at step" in done.stderr and "--wait" in done.stderr


def test_waits_for_a_run_and_ends_with_it(tmp_path: Path, tiny_shards: Path) -> None:
    run, table = tmp_path / "run", tmp_path / "m.csv"
    config = write_config(tmp_path / "c.yaml", tiny_shards, run)
    words = ["--run", str(run), "--wait", "--interval", "0.05", "--csv", str(table)]
    with subprocess.Popen([sys.executable, str(SCRIPT), *words], stderr=subprocess.PIPE, text=True) as process:
        subprocess.run([sys.executable, "-c", PACED_RUN, str(table), "pretrain", str(config), "--quiet"], check=True)
        _, stderr = process.communicate(timeout=100)
    assert process.returncode == 0 and stderr.endswith(f"{run}: finished\n")
    assert len(rows_of(table)) > 2


def test_waits_again_after_a_run_died(tmp_path: Path) -> None:
    """Two fake runs in the same folder: the first is killed, the second logs its end."""
    fake_run = (
        "import json, sys, time\nfrom pathlib import Path\nfrom anarchobot.storage.lock import FolderLock\n"
        "folder, table, rows = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])\n"
        "with FolderLock(folder):\n"
        "    while not table.exists() or len(table.read_text().splitlines()) < rows: time.sleep(0.01)\n"
        "    line = json.dumps({'event': 'end', 'step': 1, 'finished': False})\n"
        "    (folder / 'logs' / 'metrics.jsonl').write_text(line + chr(10))"
    )
    (tmp_path / "logs").mkdir()
    table = tmp_path / "m.csv"
    words = ["--run", str(tmp_path), "--wait", "--interval", "0.1", "--csv", str(table)]
    said = tmp_path / "said"
    with (
        said.open("w") as file,
        subprocess.Popen([sys.executable, str(SCRIPT), *words], stderr=file) as process,
    ):
        with subprocess.Popen([sys.executable, "-c", fake_run, str(tmp_path), str(table), "100000"]) as first:
            wait_for(lambda: table.exists() and len(table.read_text().splitlines()) > 1)
            first.kill()
        wait_for(lambda: "died" in said.read_text())
        seen = len(table.read_text().splitlines())
        subprocess.run([sys.executable, "-c", fake_run, str(tmp_path), str(table), str(seen + 1)], check=True)
        assert process.wait(timeout=100) == 0
    stderr = said.read_text()
    assert f"{tmp_path}: died; waiting for it to resume\n" in stderr and stderr.endswith(f"{tmp_path}: stopped\n")
    assert len(table.read_text().splitlines()) > seen


@pytest.mark.parametrize(
    ("words", "stderr"),
    [
        (["--run", "none"], "none: no run here (no none/logs/metrics.jsonl): expected a run folder"),
        (["--pid", "99999999"], "--pid 99999999: no such process"),
        (["--interval", "0"], "--interval 0: expected seconds above 0"),
        (["--interval", "x"], "argument --interval: invalid float value: 'x' (see memory_monitor --help)"),
        (["--wait"], "--wait: requires --run DIR"),
        (["--alarm", "much"], "--alarm much: expected GB, such as 12, or a share of the machine's memory, such as 90%"),
        (["--plot", "m.jpg"], "--plot m.jpg: expected a .png or .svg file"),
        (["--plot", "none/m.svg"], "--plot none/m.svg: no such folder: none"),
        (["--csv", "none/m.csv", "--duration", "1"], "none/m.csv: No such file or directory"),
    ],
)
def test_usage_errors_are_one_line(words: list[str], stderr: str, tmp_path: Path) -> None:
    done = monitor(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"memory_monitor: {stderr}\n")


def test_png_without_matplotlib_is_an_error_before_monitoring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory_chart, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"m.png: .*pip install matplotlib, or use .svg"):
        memory_chart.check_plot_path(tmp_path / "m.png")


def test_png_with_matplotlib(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    memory_chart.plot_memory(tmp_path / "m.png", [sample(time=float(i), process_gb=float(i)) for i in range(9)])
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_machine_alone(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    assert monitor("--interval", 0.1, "--duration", 0.25, "--csv", table).returncode == 0
    rows = rows_of(table)
    assert 1 <= len(rows) <= 3 and all(row["process_gb"] == row["step"] == "" for row in rows)
    assert monitor("--interval", 0.1, "--duration", 0.05, "--csv", table, "--quiet").stderr == ""
    assert len(rows_of(table)) == len(rows) + 1  # appended to the file


def test_run_on_another_machine_is_an_error(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        (tmp_path / ".lock").write_text("process 1 on elsewhere\n")
        with pytest.raises(UserError, match="process 1 on elsewhere: monitor it there"):
            attach(tmp_path, wait=False)


def test_log_tail_reads_only_appended_lines(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "metrics.jsonl"

    def line(step: int, event: str = "train") -> str:
        return json.dumps({"step": step, "event": event, "tokens_per_second": 10 * step, "finished": True}) + "\n"

    log.write_text("".join(line(i) for i in range(1, 9999)) + line(9999, "end"))
    tail = LogTail(tmp_path)
    assert tail.metrics["step"] == 9998 and tail.finished is None  # that end is an earlier run's
    before = log.stat().st_size
    log.write_text("x" * before + line(10_000)[:-9])  # lines already read are not parsed again
    tail.read()
    assert tail.metrics["step"] == 9998
    log.write_text("x" * before + line(10_000) + line(10_001, "eval") + line(10_002, "end"))
    tail.read()
    assert (tail.metrics["step"], tail.metrics["tokens_per_second"], tail.finished) == (10_000, 100_000, True)


def test_alarm_rings_once_per_crossing() -> None:
    def rings(limit: str, **changing: list[float]) -> list[bool]:
        alarm = Alarm(limit)
        rows = zip(*changing.values(), strict=True)
        return [alarm.message(sample(**dict(zip(changing, row, strict=True)))) is not None for row in rows]

    assert rings("2.5", process_gb=[1, 3, 3, 2, 3]) == [False, True, False, False, True]
    assert rings("50%", system_used_gb=[4, 6, 4]) == [False, True, False]
    alone = Alarm("3").message(sample(process_gb=None))
    assert alone is not None and alone.endswith("alarm: the machine uses 4 GB, above 3 GB")


def test_a_sample_takes_less_than_10_ms_of_cpu(long_run: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """CPU time, so that a busy machine does not matter."""
    monitored = Monitor(long_run.pid, tmp_path / "run")
    before = time.process_time()
    for _ in range(100):
        assert monitored.sample() is not None
    assert time.process_time() - before < 1.0
