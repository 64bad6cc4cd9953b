"""`anarchobot config init`, and configurations that are found by name."""

import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from anarchobot.cli.main import build_parser, main
from anarchobot.cli.parser import parse
from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.loading import leaf_keys, load, load_config
from anarchobot.config.schema import Config
from anarchobot.config.templates import FOLDERS, PURPOSES, shipped_configs

REPOSITORY = Path(__file__).parents[2]
ANSWERS = {
    "pretrain": {"data.dataset": "notes.txt"},
    "adapt-vocab": {"models.source_model": "runs/a", "corpus.domain": "field.txt"},
} | {key: {"train.init_from": "ORG/NAME", "data.dataset": "chats.jsonl"} for key in ("sft", "lora", "dpo", "grpo")}


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_template_is_a_valid_configuration_with_a_comment_for_each_key(
    purpose: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, answers = tmp_path / "my.yaml", ANSWERS[purpose]
    words = [f"{key}={value}" for key, value in answers.items()]
    assert main(["config", "init", purpose, *words, "--output", str(file)]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: next: anarchobot ")
    schema: Any = PURPOSES[purpose].schema
    loaded = load_config(file) if schema is Config else load(file, [], AdaptConfig)
    shipped = shipped_configs()[PURPOSES[purpose].config]
    original = load(shipped, list(PURPOSES[purpose].settings.items()), schema)
    keys = leaf_keys(schema)
    given = [key for key in loaded.sources if key in keys]
    assert set(given) == {key for key in original.sources if key in keys} | answers.keys()
    for key in given:
        value, expected = loaded.config, original.config
        for name in key.split("."):
            value, expected = getattr(value, name), getattr(expected, name)
        assert value == answers.get(key, expected)
    lines = file.read_text().splitlines()
    for key in given:
        (at,) = [i for i, line in enumerate(lines) if loaded.sources[key] == f"{file}:{i + 1}"]
        assert lines[at - 1].lstrip().startswith("# ")
        comment = " ".join(line.lstrip(" #") for line in lines[:at])
        assert comment.endswith(" ".join(str(keys[key].description).split()).lstrip("#"))


def test_answers_are_asked_for_at_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or f" answer{len(asked)} ")
    assert main(["config", "init", "lora", "lora.r=16"]) == 0
    config = load_config("lora.yaml").config
    assert (config.train.init_from, config.data.dataset, config.lora.r) == ("answer1", "answer2", 16)
    assert ["[train.init_from]: " in asked[0], "[data.dataset]: " in asked[1]] == [True, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lra", "unknown purpose 'lra'; did you mean 'lora'?"),
        ("lora", "; for example: anarchobot config init lora train.init_from=ORG/NAME data.dataset=chats.jsonl"),
        ("lora", "missing train.init_from=VALUE (run, checkpoint, Hugging Face folder or name"),
        ("lora", " and data.dataset=VALUE (text, "),
        ("dpo data.dataset=a", "example: anarchobot config init dpo data.dataset=a train.init_from=ORG/NAME"),
        ("pretrain data.dataset=a train.lrr=1", "train.lrr: unknown key; did you mean 'lr'?"),
        ("pretrain data.dataset=a --output old.yaml", "old.yaml: exists already: choose another name with --output"),
    ],
)
def test_errors(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.yaml").write_text("mine")
    assert main(["config", "init", *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "old.yaml").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_shipped_configurations_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder; a file of this name in it comes first."""
    monkeypatch.chdir(tmp_path)
    args = parse(build_parser(), ["pretrain", "tuning/sft", "train.lr=1"])
    assert Path(args.config) == REPOSITORY / "configs/tuning/sft.yaml"
    assert {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")} < shipped_configs().keys()
    (tmp_path / "tiny").write_text("")
    assert parse(build_parser(), ["pretrain", "tiny"]).config == "tiny"
    assert parse(build_parser(), ["pretrain", "nothing"]).config == "nothing"


def test_a_wheel_contains_every_file_of_the_package_and_the_configurations(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    installed, checkout = FOLDERS
    files = {file: file for file in (REPOSITORY / "anarchobot").rglob("*")}
    files |= {installed / file.relative_to(checkout): file for file in checkout.rglob("*")}
    assert names == {
        place.relative_to(REPOSITORY).as_posix()
        for place, file in files.items()
        if file.is_file() and file.suffix != ".pyc"
    }
