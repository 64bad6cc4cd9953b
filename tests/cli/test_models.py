"""`anarchobot export` and `import`: output, and one-line errors with exit code 2."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from anarchobot.cli.main import main
from tests.exchange.random_run import make_run

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("export") / "run", tiny_shards / "tokenizer.model", n_layers=1)


def test_export_and_import_round_trip(run: Path, tmp_path: Path, capsys: Captured) -> None:
    words = ["export", "--checkpoint", str(run), "--to", "hf", "--output", str(tmp_path / "hf")]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr()
    assert (
        out.out.startswith(f"{tmp_path / 'hf'}: ")
        and out.out.endswith(" MB\n")
        and " parameters, bfloat16, " in out.out
    )
    assert out.err == "" and out.out.count("\n") == 1
    assert main(["import", str(tmp_path / "hf"), "--output", str(tmp_path / "back"), "--json"]) == 0
    done: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert done["architecture"] == "llama" and done["output"] == str(tmp_path / "back")
    assert main(["export", "--checkpoint", str(tmp_path / "back"), "--to", "gguf", "--output",
                         str(tmp_path / "gguf"), "--quiet"]) == 0  # fmt: skip
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'gguf'}: ")
    assert (tmp_path / "gguf" / "model.gguf").stat().st_size > 10000


def test_quantized_exports_print_bits_and_losses(run: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "text.txt").write_text("Some words to score.\n" * 20)
    text = ["--eval-text", str(tmp_path / "text.txt")]
    words = ["export", "--checkpoint", str(run), "--output", str(tmp_path / "mlx"), "--to", "mlx", "--bits", "4"]
    assert main([*words, "--group-size", "32", *text]) == 0
    captured = capsys.readouterr()
    first, second = captured.out.splitlines()
    assert first.startswith(f"{tmp_path / 'mlx'}: ") and ", 4 bits in groups of 32, " in first
    assert re.fullmatch(r"bits per byte on text\.txt: \d\.\d{4} before, \d\.\d{4} after", second)
    assert "1 of 1 documents" in captured.err and "warning: " in captured.err
    words = ["export", "--checkpoint", str(run), "--output", str(tmp_path / "gguf"), "--to", "gguf", "--type", "Q8_0"]
    assert main([*words, "--json"]) == 0
    captured = capsys.readouterr()
    done: dict[str, Any] = json.loads(captured.out)
    assert done["dtype"] == "q8_0" and done["bits_per_byte"] is None and captured.err == ""  # the run has no shards


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("export --checkpoint nothere --to hf --output out", "nothere: no checkpoint"),
        ("export --checkpoint RUN --to onnx --output out", "argument --to: expected one of hf, mlx, gguf, "),
        (
            "export --checkpoint RUN --to mlx --bits 7 --output out",
            "argument --bits: expected one of 2, 3, 4, 5, 6, 8, got '7'",
        ),
        (
            "export --checkpoint RUN --to mlx --bits 4 --group-size 16 --output out",
            "argument --group-size: expected one of 32, 64, 128, got '16'",
        ),
        ("export --checkpoint RUN --to mlx --bits 4 --mixed 4 --output out", "argument --mixed: expected more bits"),
        ("export --checkpoint RUN --to mlx --group-size 32 --output out", "argument --group-size: only with --bits"),
        ("export --checkpoint RUN --to hf --bits 4 --output out", "argument --bits: only with --to mlx"),
        ("export --checkpoint RUN --to gguf --bits 4 --output out", "a GGUF file has --type"),
        ("export --checkpoint RUN --to mlx --type q4_0 --output out", "argument --type: only with --to gguf"),
        ("export --checkpoint RUN --to gguf --type q4_k --output out", "got 'q4_k'; did you mean 'q4_k_"),
        (
            "export --checkpoint RUN --to gguf --type q4_0 --dtype float16 --output out",
            "argument --dtype: not with --type",
        ),
        ("export --checkpoint RUN --to mlx --bits 4 --eval-text nothere.txt --output out", "nothere.txt"),
        (
            "export --checkpoint RUN --to hf --output out --dtype int8",
            "argument --dtype: expected one of float32",
        ),
        ("export --checkpoint RUN --output out", "the following arguments are required: --to"),
        ("export --checkpoint RUN --to hf --output RUN", "not empty: choose another folder"),
        ("import nothere --output out", "nothere: no such folder"),
        ("import RUN --output out", "config.json: no such file: expected a Hugging Face model"),
    ],
)
def test_an_error_is_one_line(
    run: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(run) if word == "RUN" else word for word in words.split()]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and line.startswith("anarchobot: ") and message in line
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_a_softcap_is_rejected(tmp_path: Path, tiny_shards: Path, capsys: Captured) -> None:
    run = make_run(tmp_path / "run", tiny_shards / "tokenizer.model", n_layers=1, logit_softcap=15.0)
    assert main(["export", "--checkpoint", str(run), "--to", "mlx", "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "exported to mlx: model.logit_softcap: 15: " in line
