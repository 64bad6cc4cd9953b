"""The page holds what the log holds, as text whatever it looks like, and asks for nothing from anywhere."""

import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anarchobot.cli.main import main
from anarchobot.reporting import chart as charts
from anarchobot.reporting.chart import Line, chart, log_ticks, smoothed, thinned, ticks
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
        {"step": 21, "event": "skip", "reason": "spike", "loss": "nan"},
        {"step": 30, "event": "save", "folder": "step_00000030"},
        {"step": 39, "event": "end", "finished": True},
    ]
    run = write(folder / name, *train, *rest)
    (run / "config.yaml").write_text(f"model:\n  d_model: 32\ntrain:\n  lr: {rate}\n  total_steps: 39\n")
    return run


def test_a_report_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(a_run(tmp_path, name, rate)) for name, rate in (("one", 0.1), ("two<b>", 0.3))]
    assert main(["report", *runs]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == Path(runs[0]) / "report.html"
    html = path.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(html)
    assert "script" not in tags.found and "img" not in tags.found and "b" not in tags.found
    assert HOSTILE in tags.text and "two<b>" in tags.text
    for wanted in ("3.2500 at step 20", "39 of 39", "train.lr", "reason spike", "last at step 30", "finished"):
        assert wanted in tags.text, wanted
    assert "model.d_model" not in tags.text  # the same in both
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 7
    for drawing in drawings:
        ET.fromstring(drawing)  # well-formed
    lines = [e for e in ET.fromstring(drawings[0]).iter() if e.tag == "polyline"]
    assert [len(e.attrib["points"].split()) for e in lines] == [39] * 4


def test_runs_lists_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    run = str(a_run(tmp_path, "one", 0.1))
    for words, message in (
        (["report", str(tmp_path / "none")], "no run here"),
        (["report", run, "--output", str(tmp_path / "none" / "x.html")], "no such folder"),
        (["runs", str(tmp_path / "none")], "no such folder"),
        (["runs", str(tmp_path / "empty")], "no runs here"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_and_inside(low: float, span: float) -> None:
    high = low + span
    found = ticks(low, high)
    assert 1 <= len(found) <= 12
    slack = 1e-6 * max(abs(low), abs(high), span)
    assert all(low - slack <= tick <= high + slack for tick in found)
    assert log_ticks(0.02, 30) == pytest.approx([0.01, 0.1, 1, 10, 100])


def test_a_line_of_many_points_keeps_its_spikes() -> None:
    points = [(float(x), math.sin(x / 500)) for x in range(100_000)]
    points[54_321] = (54_321.0, 50.0)
    points[77_777] = (77_777.0, -50.0)
    kept = thinned(points)
    assert len(kept) <= charts.MOST_POINTS + 2 and points[54_321] in kept and points[77_777] in kept
    assert kept == sorted(kept)


def test_what_is_not_finite_is_not_drawn_and_a_wide_span_is_logarithmic() -> None:
    assert chart("x", [Line("a", "c0", [(1, math.nan), (2, math.inf)])]) == ""
    drawing = chart("x", [Line("a", "c0", [(1, 1.0), (2, 10.0), (3, 100.0), (4, 1000.0)])])
    assert "logarithmic" in drawing
    (line,) = [e for e in ET.fromstring(drawing).iter() if e.tag == "polyline"]
    heights = [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    assert [a - b for a, b in pairwise(heights)] == pytest.approx([heights[0] - heights[1]] * 3, abs=0.2)


def test_the_average_is_adams() -> None:
    found = smoothed([(1, 4.0), (2, 2.0)], 0.9)
    assert found == [(1, pytest.approx(4.0)), (2, pytest.approx((0.9 * 0.1 * 4 + 0.1 * 2) / (1 - 0.81)))]


def test_a_browser_shows_it_without_complaint(tmp_path: Path) -> None:
    """Chromium, where there is one: the document as it built it, and nothing on its console."""
    browser = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    assert main(["report", str(a_run(tmp_path, "one", 0.1)), "--output", str(tmp_path / "r.html")]) == 0
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    done = subprocess.run(
        [*words, (tmp_path / "r.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.count("<polyline") == 6 and done.stdout.count("<circle") == 2 and "CONSOLE" not in done.stderr
