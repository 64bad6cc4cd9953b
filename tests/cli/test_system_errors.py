"""What the system refuses is one line too: a folder that can't be made is no fault of the program's."""

from pathlib import Path

import pytest

from anarchobot.cli.main import main


def test_an_output_that_cannot_be_written_is_one_line(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text\n" * 20)
    (tmp_path / "file").write_text("in the way")
    words = ["--input", str(tmp_path / "a.txt"), "--tokenizer", str(tiny_shards / "tokenizer.model")]
    assert main(["pretokenize", *words, "--output", str(tmp_path / "file" / "shards")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "file" in line and ("Not a directory" in line or "exists" in line)
