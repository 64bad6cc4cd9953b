"""metrics.jsonl, TensorBoard and the terminal display."""

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from anarchobot.runs.metrics_log import MetricsLog
from anarchobot.runs.run_log import read_run
from tests.training.fake_engine import FakeEngine, train


def test_truncated_last_line_does_not_corrupt_the_next(tmp_path: Path) -> None:
    for text in ('{"step": 1}\n{"step": 2, "ev', '{"step": 1}\n', ""):
        (tmp_path / "metrics.jsonl").write_text(text)
        with MetricsLog(tmp_path) as log:
            log.event("resume", 2)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["event"] == "resume"
        assert "".join(lines[:-1]) == text.replace("\n", "")


def test_closed_terminal_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    from anarchobot.training.display import TerminalDisplay

    for number in (5, 32):  # EIO: a closed terminal; EPIPE: a pipe

        class Closed(io.StringIO):
            def write(self, text: str, number: int = number) -> int:
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr(sys, "stderr", Closed())
        with TerminalDisplay(9, 0) as display:
            display.message("hello")
            names = ("loss", "smooth_loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_gb")
            display.train(1, dict.fromkeys(names, 1))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_activity_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from anarchobot.training.display import activity_bar

    monkeypatch.setenv("TERM", "xterm")
    for stream, quiet, shown in ((Terminal(), False, True), (Terminal(), True, False), (io.StringIO(), False, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with activity_bar("importing", quiet) as progress:
            print("line", file=sys.stderr)
            progress(0.42)
        assert ("importing" in stream.getvalue()) == shown
        assert ("42%" in stream.getvalue()) == shown
        assert "line" in stream.getvalue()


def test_the_bar_shows_the_newest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from anarchobot.training.display import TerminalDisplay

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with TerminalDisplay(50, 0) as display:
        display.step(7, 2.75)
    assert "step 7/50" in sys.stderr.getvalue() and "loss 2.7500 | " in sys.stderr.getvalue()


def test_a_narrow_terminal_shows_what_the_line_of_the_bar_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from anarchobot.training.display import TerminalDisplay

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setattr(sys, "stderr", Terminal())
    values = {
        "loss": 2.5,
        "smooth_loss": 2.75,
        "lr": 1e-3,
        "grad_norm": 1,
        "tokens_per_second": 900,
        "peak_memory_gb": 1,
    }
    with TerminalDisplay(50, 0) as display:
        display.train(7, values)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue())
    assert "loss 2.7500 | 0:00 left | lr 1.00e-03" in drawn and "norm" not in drawn and "…" not in drawn


def test_tensorboard_shows_samples_and_config(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.config(0, "model:\n  d_model: 8\n")
        log.event("sample", 7, text="Once upon a time")
    values = [(event.step, value) for event in tensorboard_events(tmp_path) for value in event.summary.value]
    assert [(step, value.tag.split("/")[0], value.tensor.string_val[0].decode()) for step, value in values] == [
        (0, "config", "```yaml\nmodel:\n  d_model: 8\n```"),
        (7, "sample", "Once upon a time"),
    ]
    assert {value.metadata.plugin_data.plugin_name for _, value in values} == {"text"}


def test_events_are_echoed(tmp_path: Path) -> None:
    echo = io.StringIO()
    with MetricsLog(tmp_path, echo) as log:
        log.event("train", 1, loss=2.0)
        log.event("end", 1, finished=True)
    assert echo.getvalue() == (tmp_path / "metrics.jsonl").read_text()


def tensorboard_events(logs: Path) -> list[Event]:
    """An independent TFRecord reader: length, checksum, event, checksum. Events are as protobuf would write them."""

    def take(size: int) -> bytes:
        data, checksum = file.read(size), file.read(4)
        assert len(data) == size and int.from_bytes(checksum, "little") == masked_crc32c(data)
        return data

    (path,) = (logs / "tensorboard").iterdir()
    events = []
    with path.open("rb") as file:
        while file.tell() < path.stat().st_size:
            data = take(int.from_bytes(take(8), "little"))
            events.append(Event.FromString(data))
            assert events[-1].step == 0 or events[-1].SerializeToString() == data
    assert events[0].file_version == "brain.Event:2"
    return events


def test_tensorboard_has_numbers_of_any_size(tmp_path: Path) -> None:
    values = {"val_loss": float("nan"), "perplexity": 1e300, "delta": -1e300, "loss": 0.0}
    with MetricsLog(tmp_path) as log:
        log.event("eval", 2**40, **values)
    _, event = tensorboard_events(tmp_path)
    assert event.step == 2**40
    assert {value.tag: repr(value.simple_value) for value in event.summary.value} == {
        "eval/val_loss": "nan", "eval/perplexity": "inf", "eval/delta": "-inf", "eval/loss": "0.0"
    }  # fmt: skip


def test_tensorboard_matches_metrics_jsonl(tmp_path: Path) -> None:
    _, lines = train(tmp_path, FakeEngine(), 4, log_interval=2, eval_interval=4)
    points = [
        (v.tag, event.step, v.simple_value)
        for event in tensorboard_events(tmp_path / "logs")
        for v in event.summary.value
    ]
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_gb"):
        wanted = [(line["step"], line[name]) for line in lines if line["event"] == "train"]
        assert [(step, v) for tag, step, v in points if tag == f"train/{name}"] == [
            (step, pytest.approx(v, rel=1e-6)) for step, v in wanted
        ]
    for name in ("val_loss", "val_bpb", "perplexity"):
        assert len([tag for tag, _, _ in points if tag == f"eval/{name}"]) == 2


def test_numbers_that_are_not_finite_are_strict_json(tmp_path: Path) -> None:
    """A validation loss of NaN: other programs read the log, and it is never the best."""

    def refuse(name: str) -> float:
        raise ValueError(name)

    _, lines = train(tmp_path, FakeEngine([float("nan"), 2.0, float("inf"), 3.0]), 6, eval_interval=2)
    for file in ("metrics.jsonl", "final_training_summary.json"):
        with MetricsLog(tmp_path / "logs") as log:
            log.summary({"final_loss": float("-inf"), "best": [float("nan"), 1.5]})
        text = (tmp_path / "logs" / file).read_text()
        for part in [text] if file.endswith(".json") else text.splitlines():
            json.loads(part, parse_constant=refuse)
    assert [line["val_loss"] for line in lines if line["event"] == "eval"] == ["nan", 2.0, "inf", 3.0]
    for file in tmp_path.glob("step_*/state.json"):
        json.loads(file.read_text(), parse_constant=refuse)
    log_of_run = read_run(tmp_path)
    assert log_of_run.best("val_loss") == (2, 2.0)
    assert log_of_run.points("eval", "val_loss") == [(2, 2.0), (6, 3.0)]


def test_logs_of_earlier_versions_may_have_nan(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    lines = [f'{{"step": {i}, "event": "eval", "val_loss": {x}}}\n' for i, x in enumerate(("NaN", "2.5", "Infinity"))]
    (tmp_path / "logs" / "metrics.jsonl").write_text("".join(lines))
    assert read_run(tmp_path).best("val_loss") == (1, 2.5)
