"""The report shows what the log contains, escapes it, and loads nothing."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from anarchobot.cli.main import main
from tests.runs.test_run_log import write

HOSTILE = "</pre><script>alert(1)</script><img src=https://example.org/x>"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}

    def handle_data(self, data: str) -> None:
        self.text += data


def a_run(folder: Path, name: str, rate: float) -> Path:
    train = [
        {"step": i, "event": "train", "loss": 5.0 / i**rate, "lr": 1e-3, "grad_norm": 1.0, "tokens": 10 * i,
         "tokens_per_second": 1000.0, "peak_memory_gb": 1.5}
        for i in range(1, 40)
    ]  # fmt: skip
    rest: list[dict[str, Any]] = [
        {"step": 20, "event": "eval", "val_loss": 3.25, "val_bpb": 1.5, "perplexity": 25.8},
        {"step": 20, "event": "sample", "text": HOSTILE},
        {"step": 21, "event": "skip", "reason": "spike", "loss": "7.5", "grad_norm": "31.0"},
        {"step": 39, "event": "resume", "folder": "step_22", "changed": {"train.lr": [0.1, rate], "ranks": [1, 2]}},
        {"step": 39, "event": "warning", "text": "nearly full"},
        {"step": 30, "event": "save", "folder": "step_00000030"},
        {"step": 39, "event": "end", "finished": True},
    ]
    run = write(folder / name, *train, *rest)
    (run / "config.yaml").write_text(f"model:\n  d_model: 32\ntrain:\n  lr: {rate}\n  total_steps: 39\n")
    return run


def test_a_run_of_train_is_reported_with_its_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path, "notes", 0.1)
    chat = a_run(run, "chat", 0.3)
    for file in (run / "train.json", chat / "latest.json"):
        file.touch()
    assert main(["report", str(run)]) == 0
    assert "<title>notes and chat" in Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8")


def test_report_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(a_run(tmp_path, name, rate)) for name, rate in (("one", 0.1), ("two<b>", 0.3))]
    assert main(["report", *runs]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == Path(runs[0]) / "report.html"
    html = path.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(html)
    assert "script" not in tags.found and "img" not in tags.found and "b" not in tags.found
    assert HOSTILE in tags.text and "two<b>" in tags.text
    for wanted in ("3.2500 at step 20", "39 of 39", "train.lr", "last at step 30"):
        assert wanted in tags.text, wanted
    for event in (
        "skip update skipped: its gradient was far above the mean (loss 7.5, norm 31)",
        "resume resumed from step_22; changed: train.lr 0.1 to 0.3, ranks 1 to 2",
        "warning nearly full",
        "end finished",
    ):
        kind, _, text = event.partition(" ")
        assert f"<td>{kind}</td><td>{text}</td>" in html, event
    assert "model.d_model" not in tags.text  # equal in both runs
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 7
    for drawing in drawings:
        ET.fromstring(drawing)  # well-formed
    lines = [e for e in ET.fromstring(drawings[0]).iter() if e.tag == "polyline"]
    assert [len(e.attrib["points"].split()) for e in lines] == [39] * 4


def test_runs_command_lists_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "runs", "one", 0.1)
    assert main(["runs", str(tmp_path / "runs")]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "state", "step"] and line.split()[1:6] == [
        "finished",
        "39",
        "3.4663",
        "3.2500",
        "1.5000",
    ]
    assert main(["runs", str(tmp_path / "runs"), "--json"]) == 0
    (figures,) = json.loads(capsys.readouterr().out)
    assert figures["best_step"] == 20 and figures["loss"] == pytest.approx(5 / 39**0.1)


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    run = str(a_run(tmp_path, "one", 0.1))
    for words, message in (
        (["report", str(tmp_path / "none")], "no run here"),
        (["report", run, "--output", str(tmp_path / "none" / "x.html")], "no such folder"),
        (["runs", str(tmp_path / "none")], "no such folder"),
        (["runs", str(tmp_path / "empty")], "no runs found"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_chromium_renders_the_report_without_console_messages(tmp_path: Path) -> None:
    """Dumps the DOM with Chromium, if installed."""
    browser = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    assert main(["report", str(a_run(tmp_path, "one", 0.1)), "--output", str(tmp_path / "r.html")]) == 0
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    done = subprocess.run(
        [*words, (tmp_path / "r.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.count("<polyline") == 6 and done.stdout.count("<circle") == 2 and "CONSOLE" not in done.stderr
