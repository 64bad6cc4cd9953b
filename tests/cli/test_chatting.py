"""`anarchobot chat` as a person meets it, at a terminal and through a pipe."""

import fcntl
import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from anarchobot.cli.main import main
from tests.exchange.random_run import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "run"
    return make_run(folder, next(tiny_shards.glob("*.model")), n_layers=1, max_seq_len=100_000)


def said(run: Path, lines: str, *flags: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(lines))
        words = ["chat", "--checkpoint", str(run), "--method", "random", "--max-new-tokens", "6", *flags]
        return main(words)


def test_a_pipe_is_answered_line_by_line(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    lines = f"Hello\n\n/save {file}\n/reset\nHello\n/system Be kind.\nHello\n/save {file}\n"
    assert said(run, lines) == 0
    captured = capsys.readouterr()
    talks = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert [m["role"] for m in talks[0]] == ["user", "assistant"]
    assert [m["role"] for m in talks[1]] == ["system", "user", "assistant", "user", "assistant"]  # one was forgotten
    answers = [talks[0][1]["content"], talks[1][2]["content"], talks[1][4]["content"]]
    assert captured.out.split() == " ".join(answers).split()
    assert captured.err.splitlines()[1:] == [f"{file}: added", "forgotten", "told", f"{file}: added"]


def test_json_and_a_knowledge_base(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bees.txt").write_text("Bees have four wings.")
    base = str(tmp_path / "kb.sqlite")
    assert main(["kb", "add", "--kb", base, str(tmp_path / "bees.txt"), "--quiet"]) == 0
    assert said(run, "How many wings?\n/good\nzzz\n/good\n", "--kb", base, "--json") == 0
    captured = capsys.readouterr()
    first, second = (json.loads(line) for line in captured.out.splitlines())
    assert first["question"] == "How many wings?" and first["answer"]
    assert first["sources"] == [str(tmp_path / "bees.txt")] and second["sources"] == []
    assert captured.err.splitlines()[1:] == [
        "noted for 1 passages",
        "anarchobot: nothing was found in the knowledge base for the last question",
    ]
    assert main(["kb", "list", "--kb", base]) == 0
    assert "1 votes" in capsys.readouterr().out
    assert said(run, "How many wings?\n", "--kb", base) == 0
    assert capsys.readouterr().out.endswith(f"\n(from {tmp_path / 'bees.txt'})\n")


def test_a_mistake_is_told_and_the_chat_goes_on(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    nowhere = tmp_path / "no" / "where.jsonl"
    assert said(run, f"/svae x\n/save\n/save x\n/good\nHi\n/save {nowhere}\n/help\n") == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert captured.err.splitlines()[1:6] == [
        "anarchobot: '/svae': no such command; did you mean '/save'? (/help lists them)",
        "anarchobot: /save: which FILE?",
        "anarchobot: nothing was said yet",
        "anarchobot: there is no knowledge base that could learn from it: start with --kb FILE",
        f"anarchobot: {nowhere}: No such file or directory",
    ]
    assert "/reset        forget what was said" in captured.err


def test_it_does_not_start_without_a_model_or_with_a_base_that_is_none(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert said(tmp_path, "Hi\n") == 2
    assert said(run, "Hi\n", "--kb", str(tmp_path / "none.sqlite")) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_ctrl_c_stops_the_answer_and_ctrl_d_ends_the_chat(run: Path) -> None:
    """In a terminal; without Ctrl-C the answer would be 90,000 tokens long."""
    ours, theirs = pty.openpty()
    words = ["chat", "--checkpoint", str(run), "--method", "random", "--max-new-tokens", "90000"]
    done = subprocess.Popen(
        [sys.executable, "-m", "anarchobot", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
    )
    os.close(theirs)
    seen = b""

    def read_until(wanted: bytes, key: bytes = b"") -> None:
        """`key` is pressed now, and again where nothing comes of it: Python's line editor does not see a Ctrl-C that
        comes between its prompt and its wait for input. Not at once: a second one, in time, would end the chat."""
        nonlocal seen
        os.write(ours, key)
        while wanted not in seen:
            if select.select([ours], [], [], 3.0)[0]:
                seen += os.read(ours, 4096)
            else:
                os.write(ours, key)
        seen = seen.partition(wanted)[2]

    try:
        read_until(b"> ")
        read_until(b"Ctrl-D ends the chat", key=b"\x03")
        read_until(b"> ")
        os.write(ours, b"Hello\n")
        read_until(b"Hello")
        while len(seen) < 200:  # it is answering
            seen += os.read(ours, 4096)
        read_until(b"\n> ", key=b"\x03")
        os.write(ours, b"\x04")
        assert done.wait(200) == 0
    finally:
        done.kill()
        done.wait()
        os.close(ours)
