"""Control characters in text from models and files, on a pseudo-terminal and in a pipe."""

import json
import os
import pty
import shutil
import sys
import threading
import tty
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from anarchobot.cli.main import main
from anarchobot.config.terminal import visible, visible_output
from anarchobot.inference.generation import generate
from anarchobot.inference.model import load_model
from anarchobot.tasks import engines
from tests.exchange.random_run import make_run
from tests.tiny import write_config

# Sets the title, clears the screen (also with a C1 character), moves to the start of the line, reverses the text.
HOSTILE = "a\x1b]0;title\x07\x1b[2J\x9b2J\rb\x7f\u202ec\u2066"
SHOWN = r"a\x1b]0;title\x07\x1b[2J\x9b2J\rb\x7f\u202ec\u2066"
BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def is_control(c: str) -> bool:
    return (unicodedata.category(c) == "Cc" and c not in "\n\t") or unicodedata.bidirectional(c) in BIDI


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Makes stdout and stderr a terminal, inside which the function returns what was printed to it."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)  # otherwise it adds carriage returns
    received = bytearray()

    def read() -> None:
        while data := os.read(ours, 65536):
            received.extend(data)
            if received.endswith(b"\0"):
                return

    thread = threading.Thread(target=read)
    thread.start()
    with open(theirs, "w", encoding="utf-8", errors="backslashreplace") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)

        def printed() -> str:
            stream.write("\0")  # the only NUL: others are escaped
            stream.flush()
            thread.join(60)
            return received[:-1].decode()

        try:
            yield printed
        finally:
            if thread.is_alive():
                printed()
    os.close(ours)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A model with random weights whose vocabulary is mostly bytes: it generates many control characters."""
    return make_run(tmp_path_factory.mktemp("run") / HOSTILE, next(tiny_shards.glob("*.model")), n_layers=1)


def test_visible_escapes_exactly_the_control_characters() -> None:
    for c in map(chr, [*range(0xD800), *range(0xE000, 0x11000)]):
        assert visible(c) == (c.encode("unicode-escape").decode() if is_control(c) else c)
    assert "".join(map(visible, HOSTILE)) == visible(HOSTILE) == SHOWN  # however it is split into pieces


def test_generated_text_is_escaped_on_a_terminal_and_exact_in_a_pipe(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> None:
    words = ["generate", "--checkpoint", str(run), "--prompt", HOSTILE, "--method", "random", "--max-new-tokens", "60"]
    model, config = load_model(str(run))
    settings = config.generation.model_copy(update={"prompt": HOSTILE, "method": "random", "max_new_tokens": 60})
    text = HOSTILE + generate(model, settings) + "\n"
    assert any(map(is_control, text[len(HOSTILE) : -1]))
    assert main(words) == 0
    assert capfdbinary.readouterr().out.decode() == text
    with terminal(monkeypatch) as printed:
        assert main(words) == 0
        assert printed() == visible(text)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text(HOSTILE.replace("\r", ""))
    with terminal(monkeypatch) as printed:
        assert main(["generate", "--checkpoint", str(run), "--prompts", str(prompts), "--max-new-tokens", "20"]) == 0
        shown = printed()
    assert shown.startswith(SHOWN.replace(r"\r", "")) and not any(map(is_control, shown))


def test_no_command_prints_control_characters(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_shards: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text(f"cherries {HOSTILE}\n")
    Path(f"{HOSTILE}.txt").write_text("words of a text\n" * 500)
    Path("report.json").write_text(json.dumps({"checkpoint": HOSTILE, "results": {HOSTILE: {"loss": 1.0}}}))
    shutil.copytree(tiny_shards, f"shards{HOSTILE}")
    Path("runs", HOSTILE, "logs").mkdir(parents=True)
    Path("runs", HOSTILE, "config.yaml").write_text("{}")
    Path("runs", HOSTILE, "logs", "metrics.jsonl").write_text('{"step": 1, "event": "train", "time": 1, "loss": 2}\n')
    commands: list[tuple[list[str], int, int]] = [  # words, exit code, how often the hostile text is printed
        (["kb", "add", "notes.txt", "--kb", "kb.db"], 0, 0),
        (["kb", "search", "cherries", "--kb", "kb.db"], 0, 1),
        (["kb", "remove", HOSTILE, "--kb", "kb.db"], 2, 1),
        (["shards", "info", f"shards{HOSTILE}"], 0, 1),
        (["runs"], 0, 1),
        (["evaluate", "--compare", "report.json", "report.json"], 0, 2),
        (["config", "show", f"generation.stop={json.dumps([HOSTILE])}"], 0, 0),
        (["tokenizer", "train", "--input", f"{HOSTILE}.txt", "--output", HOSTILE, "--vocab-size", "290"], 0, 1),
        (["import", HOSTILE, "--output", "x"], 2, 1),
        (["report", HOSTILE], 2, 1),
        (["pretokenize", "--input", f"{HOSTILE}.txt", "--tokenizer", HOSTILE, "--output", f"{HOSTILE}.txt"], 2, 1),
        (["generate", "--debug", "--checkpoint", HOSTILE], 2, 2),
    ]
    for words, code, count in commands:
        with terminal(monkeypatch) as printed:
            assert main(words) == code, words
            shown = printed()
        assert not any(map(is_control, shown)), (words, shown)
        assert shown.replace("\\\\", "\\").count(SHOWN) >= count, (words, shown)


def test_progress_bars_are_drawn_and_text_beside_them_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as printed, visible_output():
        sys.stderr.write("\r 50%|====\x1b[0m")  # as tqdm writes
        with Progress(console=Console(file=sys.stderr)) as bar:
            bar.add_task("working", total=3, completed=1)
        shown = printed()
    assert shown.startswith("\r 50%|====\\x1b[0m") and "working" in shown and "\x1b[?25h" in shown


def test_samples_are_escaped_beside_the_progress_bar_and_in_a_log_file(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = engines.open_engine
    monkeypatch.setattr(
        "anarchobot.tasks.pretrain.open_engine", lambda *a, **k: replace(real(*a, **k), sample=lambda _: HOSTILE)
    )
    settings = {"train__total_steps": 1, "train__sample_interval": 1}
    config = str(write_config(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", **settings))
    with terminal(monkeypatch) as printed:
        assert main(["pretrain", config]) == 0
        shown = printed()
    assert f"step 1: sample: {SHOWN}" in shown and HOSTILE not in shown and "\x1b]" not in shown
    assert "\x1b[?25h" in shown  # the progress bar is drawn

    assert main(["pretrain", config, f"train.save_dir={tmp_path / 'other'}"]) == 0
    assert f"step 1: sample: {SHOWN}" in capfd.readouterr().err
    lines = map(json.loads, (tmp_path / "other" / "logs" / "metrics.jsonl").read_text().splitlines())
    assert [line["text"] for line in lines if line["event"] == "sample"] == [HOSTILE]
