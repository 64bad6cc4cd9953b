"""`anarchobot export` and `anarchobot import`: what they print, and that every mistake is one line and exit code 2."""

import json
from pathlib import Path
from typing import Any

import pytest

from anarchobot.cli import exchanging
from anarchobot.cli import main as program
from anarchobot.cli.parser import Parser
from tests.exchange.random_run import make_run

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def only_these_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Parser:
        parser = Parser(prog="anarchobot")
        exchanging.add_commands(parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser))
        return parser

    monkeypatch.setattr(program, "build_parser", build)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("export") / "run", tiny_shards / "tokenizer.model", n_layers=1)


def test_there_and_back(run: Path, tmp_path: Path, capsys: Captured) -> None:
    words = ["export", "--checkpoint", str(run), "--to", "hf", "--output", str(tmp_path / "hf")]
    assert program.main([*words, "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr()
    assert out.out.startswith(f"{tmp_path / 'hf'}: ") and out.out.endswith(" MB\n") and " in bfloat16, " in out.out
    assert out.err == "" and out.out.count("\n") == 1
    assert program.main(["import", str(tmp_path / "hf"), "--output", str(tmp_path / "back"), "--json"]) == 0
    done: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert done["architecture"] == "llama" and done["output"] == str(tmp_path / "back")
    assert program.main(["export", "--checkpoint", str(tmp_path / "back"), "--to", "gguf", "--output",
                         str(tmp_path / "gguf"), "--quiet"]) == 0  # fmt: skip
    assert capsys.readouterr().out == ""
    assert (tmp_path / "gguf" / "model.gguf").stat().st_size > 10000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("export --checkpoint nothere --to hf --output out", "nothere: no checkpoint here"),
        ("export --checkpoint RUN --to onnx --output out", "argument --to: 'onnx', expected one of hf, mlx, gguf"),
        (
            "export --checkpoint RUN --to hf --output out --dtype int8",
            "argument --dtype: 'int8', expected one of float32",
        ),
        ("export --checkpoint RUN --output out", "the following arguments are required: --to"),
        ("export --checkpoint RUN --to hf --output RUN", "holds something already: choose another folder"),
        ("import nothere --output out", "nothere: no such folder"),
        ("import RUN --output out", "config.json: no such file: expected a Hugging Face model's folder"),
    ],
)
def test_a_mistake_is_one_line(
    run: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, words: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert program.main([str(run) if word == "RUN" else word for word in words.split()]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and line.startswith("anarchobot: ") and told in line
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_a_softcap_is_refused(tmp_path: Path, tiny_shards: Path, capsys: Captured) -> None:
    run = make_run(tmp_path / "run", tiny_shards / "tokenizer.model", n_layers=1, logit_softcap=15.0)
    assert program.main(["export", "--checkpoint", str(run), "--to", "mlx", "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "can't be exported to mlx: model.logit_softcap: 15: Llama has no cap on its logits" in line
