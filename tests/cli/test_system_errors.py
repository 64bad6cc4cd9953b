"""What the system refuses is one line too: a folder that can't be made is no fault of the program's."""

from pathlib import Path

import pytest

from anarchobot.cli.main import main
from anarchobot.tasks.pretrain import pretrain
from tests.tiny import loaded


def test_an_output_that_cannot_be_written_is_one_line(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text\n" * 20)
    (tmp_path / "file").write_text("in the way")
    words = ["--input", str(tmp_path / "a.txt"), "--tokenizer", str(tiny_shards / "tokenizer.model")]
    assert main(["pretokenize", *words, "--output", str(tmp_path / "file" / "shards")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "file" in line and ("Not a directory" in line or "exists" in line)


def test_a_prompt_that_is_too_long_is_not_echoed(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run"), show="nothing")
    assert main(["generate", "--checkpoint", str(tmp_path / "run"), "--prompt", "word " * 99]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "the prompt is" in said.err and len(said.err.splitlines()) == 1
    assert main(["generate", "--checkpoint", str(tmp_path / "run"), "--prompt", "a word", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("a word")


def test_words_that_are_no_text_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--checkpoint", "x", "--prompt", "caf\udce9"]) == 2
    assert "not UTF-8" in capsys.readouterr().err
