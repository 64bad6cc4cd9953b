"""The program: exit codes, one-line errors, `config`, and imports kept light for `--help`."""

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
from anarchobot.cli.main import build_parser, main
from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.loading import leaf_keys, load, load_config
from anarchobot.config.schema import Config
from anarchobot.config.strict_yaml import parse

Captured = pytest.CaptureFixture[str]
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("shards", "the following arguments are required: info|verify (see anarchobot shards --help)"),
        ("pretrian c.yaml", "unknown command 'pretrian'; did you mean 'pretrain'? (see anarchobot --help)"),
        (
            "config shwo",
            "unknown command 'shwo'; did you mean 'show'? (see anarchobot config --help)",
        ),
        (
            "config show --jsn",
            "unrecognized argument '--jsn'; did you mean '--json'? (see anarchobot config show --help)",
        ),
        ("config show train.lrr=3", "command line: train.lrr: unknown key; did you mean 'lr'?"),
        ("pretrain nothere.yaml", "nothere.yaml: no such file"),
        ("pretokenize --input a.txt", "missing tokenizer: give --tokenizer FILE, or set train.tokenizer_path"),
        ("tokenizer train", "missing --output PREFIX (or set train.tokenizer_path)"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(
    words: str, message: str, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"anarchobot: {message}\n"


def test_the_bare_program_shows_its_help_as_an_error(capsys: Captured) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == build_parser().format_help()


def test_debug_shows_the_traceback_and_ends_with_the_same_line(capsys: Captured) -> None:
    assert main(["config", "show", "--debug", "train.lrr=3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "anarchobot: command line: train.lrr: unknown key; did you mean 'lr'?"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            ZeroDivisionError("of\ntwo lines"),
            1,
            "internal error: ZeroDivisionError: of two lines (--debug shows the traceback)",
        ),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_other_exit_codes(
    error: BaseException, code: int, message: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(training, "overrides", fail)
    assert main(["pretrain", "c.yaml"]) == code
    assert capsys.readouterr().err == f"anarchobot: {message}\n"


def test_an_output_that_cannot_be_written_is_one_line(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text\n" * 20)
    (tmp_path / "file").write_text("in the way")
    words = ["--input", str(tmp_path / "a.txt"), "--tokenizer", str(tiny_shards / "tokenizer.model")]
    assert main(["pretokenize", *words, "--output", str(tmp_path / "file" / "shards")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "file" in line and ("Not a directory" in line or "exists" in line)


def test_invalid_utf8_arguments_are_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--checkpoint", "x", "--prompt", "caf\udce9"]) == 2
    assert "not valid UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_output_lacks_are_escaped(encoding: str) -> None:
    words = [sys.executable, "-m", "anarchobot", "config", "show", "generation.prompt=é 日"]
    done = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    shown = done.stdout.decode(encoding)
    assert done.returncode == 0 and "\\u65e5" in shown and ("é" if encoding == "latin-1" else "\\xe9") in shown


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
    sources, sections = {}, list[str]()
    for line in out.splitlines():
        name = line.strip().partition(":")[0]
        sections = [*sections[: (len(line) - len(line.lstrip())) // 2], name]
        if not line.endswith(":"):
            sources[".".join(sections)] = line.rpartition(" # ")[2]
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


def test_config_show_omits_the_replaced_run_length(capsys: Captured, tmp_path: Path) -> None:
    """With both epochs and total_steps, the output would not be a valid configuration."""
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


def test_config_recognizes_adapt_vocab(capsys: Captured, tmp_path: Path) -> None:
    """By the sections in the file or in KEY=VALUE."""
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


# --- in a subprocess --------------------------------------------------------------------------------------------------


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


HEAVY = ("mlx", "mlx_lm", "torch", "transformers", "pydantic", "numpy", "yaml", "rich", "tokenizers", "sentencepiece")


@pytest.mark.parametrize(
    "code", ["import anarchobot", "import sys; from anarchobot.cli.main import main; sys.argv[1:] = ['--help']; {main}"]
)
def test_help_and_import_load_nothing_heavy(code: str) -> None:
    """`--help` is fast only if command modules import no other package at module level."""
    call = "\ntry: main()\nexcept SystemExit as end: assert end.code == 0"
    probe = f"\nimport sys; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = python(code.replace("{main}", call) + probe)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert ("usage: anarchobot" in done.stdout) == ("--help" in code)


def test_config_show_loads_no_mlx() -> None:
    done = python(
        "import sys, anarchobot.config.loading; from anarchobot.cli.main import main; main(['config', 'show'])\n"
        "print(sorted({'mlx', 'torch', 'numpy'} & set(sys.modules)))"
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("part", ["schema", "show"])
def test_a_closed_pipe_is_not_an_error(part: str) -> None:
    """As in `anarchobot config show | head -1`: no traceback, and no message by Python at exit."""
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
    assert done.stderr == ("anarchobot: unknown command 'pretrian'; did you mean 'pretrain'? (see anarchobot --help)\n")
