"""What a run says of itself: lines that are read later, and a display."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from anarchobot.training.metrics import MetricsLog
from tests.training.counting import CountingEngine, train


def test_a_torn_line_of_a_killed_run_does_not_swallow_the_next(tmp_path: Path) -> None:
    for text in ('{"step": 1}\n{"step": 2, "ev', '{"step": 1}\n', ""):
        (tmp_path / "metrics.jsonl").write_text(text)
        with MetricsLog(tmp_path) as log:
            log.event("resume", 2)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["event"] == "resume"
        assert "".join(lines[:-1]) == text.replace("\n", "")


def test_a_display_whose_reader_has_gone_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    from anarchobot.training.display import TerminalDisplay

    for number in (5, 32):  # EIO: a closed terminal; EPIPE: a pipe

        class Gone(io.StringIO):
            def write(self, text: str, number: int = number) -> int:
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr(sys, "stderr", Gone())
        with TerminalDisplay(9, 0) as display:
            display.note("hello")
            display.train(1, {"loss": 1, "lr": 1, "grad_norm": 1, "tokens_per_second": 1, "peak_memory_gb": 1})


def test_tensorboard_has_what_the_lines_have(tmp_path: Path) -> None:
    """Read with a reader of our own: length, checksum, event, checksum, as TFRecord files are."""
    _, lines = train(tmp_path, CountingEngine(), 4, log_interval=2, eval_interval=4)
    (file,) = (tmp_path / "logs" / "tensorboard").iterdir()
    raw, place, points = file.read_bytes(), 0, []
    while place < len(raw):
        size = int.from_bytes(raw[place : place + 8], "little")
        event = Event.FromString(raw[place + 12 : place + 12 + size])
        points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        place += 12 + size + 4
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_gb"):
        wanted = [(line["step"], line[name]) for line in lines if line["event"] == "train"]
        assert [(step, v) for tag, step, v in points if tag == f"train/{name}"] == [
            (step, pytest.approx(v, rel=1e-6)) for step, v in wanted
        ]
    for name in ("val_loss", "val_bpb", "perplexity"):
        assert len([tag for tag, _, _ in points if tag == f"eval/{name}"]) == 2
