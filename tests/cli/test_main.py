"""The program as a person meets it: exit codes, one line on stderr, and what it loads to say so."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from anarchobot import __version__
from anarchobot.cli import training
from anarchobot.cli.main import main
from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.loading import leaf_keys, load, load_config
from anarchobot.config.schema import Config
from anarchobot.config.strict_yaml import parse

Captured = pytest.CaptureFixture[str]
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "the following arguments are required: COMMAND (see anarchobot --help)"),
        ("pretrian c.yaml", "'pretrian' is no command of anarchobot; did you mean 'pretrain'? (see anarchobot --help)"),
        (
            "config shwo",
            "'shwo' is no command of anarchobot config; did you mean 'show'? (see anarchobot config --help)",
        ),
        ("config show --jsn", "unexpected '--jsn'; did you mean '--json'? (see anarchobot config show --help)"),
        ("config show train.lrr=3", "command line: train.lrr: unknown key; did you mean 'lr'?"),
        ("pretrain nothere.yaml", "nothere.yaml: no such file"),
        ("pretokenize --input a.txt", "which tokenizer? Give --tokenizer FILE, or set train.tokenizer_path"),
        ("tokenizer train", "where to? Give --output PREFIX, or set train.tokenizer_path"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: str, told: str, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"anarchobot: {told}\n"


def test_debug_shows_the_traceback_and_ends_with_the_same_line(capsys: Captured) -> None:
    assert main(["config", "show", "--debug", "train.lrr=3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "anarchobot: command line: train.lrr: unknown key; did you mean 'lr'?"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (
            ZeroDivisionError("of\ntwo lines"),
            1,
            "unexpected ZeroDivisionError: of two lines (a fault of the program's; --debug shows where)",
        ),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_other_endings(
    error: BaseException, code: int, told: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(training, "overrides", fail)
    assert main(["pretrain", "c.yaml"]) == code
    assert capsys.readouterr().err == f"anarchobot: {told}\n"


def test_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"anarchobot {__version__}\n"


# --- config show, config schema --------------------------------------------------------------------------------------


def test_config_show_names_the_source_of_each_value_and_loads_again(capsys: Captured, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train:\n  lr: 3e-3\n\n  tokenizer_path: '3e-4'\ndata: {dataset: [a, '1']}\n")
    assert main(["config", "show", str(file), "generation.prompt='a # b: c'", "train.seed=7"]) == 0
    out = capsys.readouterr().out
    sources = {}
    for line in out.splitlines():
        if line[0] != " ":
            section = line.rstrip(":")
        else:
            value, _, source = line.rpartition(" # ")
            sources[f"{section}.{value.strip().partition(':')[0]}"] = source
    assert sources == dict.fromkeys(leaf_keys(), "default") | {
        "train.lr": f"{file}:2",
        "train.tokenizer_path": f"{file}:4",
        "data.dataset": f"{file}:5",
        "generation.prompt": "command line",
        "train.seed": "command line",
    }
    shown = Config.model_validate(parse(out.encode(), "shown").values)
    assert shown == load_config(file, ["generation.prompt='a # b: c'", "train.seed=7"]).config
    assert (shown.train.tokenizer_path, shown.data.dataset) == ("3e-4", ["a", "1"])


def test_config_show_leaves_out_the_length_that_is_replaced(capsys: Captured, tmp_path: Path) -> None:
    """Shown beside epochs, total_steps would be a lie, and the output no configuration."""
    assert main(["config", "show", "train.epochs=2"]) == 0
    out = capsys.readouterr().out
    assert "total_steps" not in out
    (tmp_path / "c.yaml").write_text(out)
    assert load_config(tmp_path / "c.yaml").config.train.epochs == 2


def test_config_show_as_json(capsys: Captured) -> None:
    assert main(["config", "show", "--json", "train.lr=1", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["config"] == load_config(None, ["train.lr=1"]).config.model_dump()
    assert result["sources"] == dict.fromkeys(leaf_keys(), "default") | {"train.lr": "command line"}


def test_config_schema_is_the_schema(capsys: Captured) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == Config.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)


def test_config_knows_what_adapt_vocab_takes(capsys: Captured, tmp_path: Path) -> None:
    """By the sections of the file, or of the words alone."""
    words = ["models.source_model=runs/a", "corpus.domain=b.txt", "embedding.fasttext.epochs=7"]
    assert main(["config", "show", str(CONFIGS / "adapt_stable.yaml"), *words]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^    epochs: 7 +# command line$", out, re.MULTILINE)
    assert re.search(r"^  top_k: 2000 +# .*adapt_stable.yaml:\d+$", out, re.MULTILINE)
    assert re.search(r"^  seed: 0 +# default$", out, re.MULTILINE)
    (tmp_path / "c.yaml").write_text(out)
    assert (
        load(tmp_path / "c.yaml", [], AdaptConfig).config
        == load(CONFIGS / "adapt_stable.yaml", words, AdaptConfig).config
    )
    assert main(["config", "show", "--json", *words]) == 0
    sources = json.loads(capsys.readouterr().out)["sources"]
    given = dict.fromkeys(("models.source_model", "corpus.domain", "embedding.fasttext.epochs"), "command line")
    assert sources == dict.fromkeys(leaf_keys(AdaptConfig), "default") | given
    for name, schema in (("adapt_stable", AdaptConfig), ("adapt_paper", AdaptConfig), ("quickstart", Config)):
        assert main(["config", "schema", str(CONFIGS / f"{name}.yaml")]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found == schema.model_json_schema()
        jsonschema.validate(parse((CONFIGS / f"{name}.yaml").read_bytes(), name).values, found)
    assert main(["config", "show", "train.lr=1", "corpus.domain=b"]) == 2
    assert "corpus" in capsys.readouterr().err


# --- in a process of its own -----------------------------------------------------------------------------------------


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


HEAVY = ("mlx", "mlx_lm", "torch", "transformers", "pydantic", "numpy", "yaml", "rich", "tokenizers", "sentencepiece")


@pytest.mark.parametrize(
    "code", ["import anarchobot", "import sys; from anarchobot.cli.main import main; sys.argv[1:] = ['--help']; {main}"]
)
def test_help_and_import_load_nothing_heavy(code: str) -> None:
    """`--help` answers at once only as long as no room is imported at the top of a command's file."""
    call = "\ntry: main()\nexcept SystemExit as end: assert end.code == 0"
    probe = f"\nimport sys; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = python(code.replace("{main}", call) + probe)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert ("usage: anarchobot" in done.stdout) == ("--help" in code)


def test_the_config_rooms_load_no_mlx() -> None:
    done = python(
        "import sys, anarchobot.config.loading; from anarchobot.cli.main import main; main(['config', 'show'])\n"
        "print(sorted({'mlx', 'torch', 'numpy'} & set(sys.modules)))"
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("part", ["schema", "show"])
def test_a_reader_that_leaves_is_no_fault(part: str) -> None:
    """As in `anarchobot config show | head -1`: no traceback, and nothing of Python's own at exit."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "anarchobot", "config", part],
            stdout=gone, stderr=subprocess.PIPE, timeout=60, env={**os.environ, "PYTHONUNBUFFERED": ""},
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"")


def test_python_m_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "anarchobot", "pretrian"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        "anarchobot: 'pretrian' is no command of anarchobot; did you mean 'pretrain'? (see anarchobot --help)\n"
    )
