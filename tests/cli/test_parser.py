"""The words of the command line: which are known, where they may stand, and how a slip is told."""

import argparse
from typing import Any

import pytest

from anarchobot.cli.main import build_parser
from anarchobot.cli.parser import Parser, add_command, add_config, add_settings, overrides, parse
from anarchobot.config.errors import UserError
from anarchobot.config.loading import leaf_keys, load_config

EVERYWHERE = ["--debug", "--help", "--json", "--quiet"]

# Scripts and notebooks rely on these words. A new one is added here on purpose; none is taken away without a migration.
SURFACE = {
    "tokenizer train": ["CONFIG?", "KEY=VALUE", "--format", "--input", "--model-type", "--output", "--vocab-size"],
    "pretokenize": [
        "CONFIG?", "KEY=VALUE", "--input", "--join", "--output", "--part", "--processes", "--restart", "--text-field",
        "--tokenizer", "--val-fraction", "--workers",
    ],
    "shards info": ["DIR"],
    "shards verify": ["DIR"],
    "pretrain": [
        "CONFIG", "KEY=VALUE", "--backend", "--batch-size", "--checkpoint-dir", "--epochs", "--lr", "--max-grad-norm",
        "--no-supervise", "--resume-from", "--save-every", "--supervise", "--warmup-steps",
    ],
    **{
        command: [
            "CONFIG", "KEY=VALUE", "--backend", "--batch-size", "--checkpoint-dir", "--dataset", "--epochs", "--lr",
            "--max-grad-norm", "--model", "--no-supervise", "--resume-from", "--save-every", "--supervise",
            "--warmup-steps",
        ]
        for command in ("sft", "dpo")
    },
    "launch": ["COMMAND", "--backend", "--hostfile", "--hosts", "--ranks"],
    "adapt-vocab": ["CONFIG", "KEY=VALUE"],
    "export": ["--checkpoint", "--dtype", "--output", "--to"],
    "import": ["DIR", "--output"],
    "fuse": ["--adapter", "--model", "--output"],
    "selftest": ["--faults", "--kills", "--seed"],
    "bench": ["CONFIG", "KEY=VALUE", "--steps"],
    "generate": [
        "--checkpoint", "--max-new-tokens", "--method", "--min-p", "--prompt", "--prompts", "--repetition-penalty",
        "--seed", "--stop", "--temperature", "--top-k", "--top-p",
    ],
    "kb add": ["FILE", "--kb", "--text-field"],
    "kb search": ["QUESTION", "--feedback-alpha", "--kb", "-k"],
    "kb list": ["--kb"],
    "kb remove": ["NAME", "--kb"],
    "kb feedback": ["--bad", "--feedback-alpha", "--good", "--kb", "--passage", "--question"],
    "chat": [
        "--checkpoint", "--feedback-alpha", "--kb", "--max-new-tokens", "--method", "--min-p", "--repetition-penalty",
        "--seed", "--stop", "--temperature", "--top-k", "--top-p", "-k",
    ],
    "serve": [
        "--allow-host", "--allow-origin", "--api-key-file", "--checkpoint", "--host", "--max-tokens", "--model-name",
        "--port", "--queue",
    ],
    "evaluate": [
        "--checkpoint", "--compare", "--include", "--limit", "--num-fewshot", "--output", "--rouge", "--shards",
        "--tasks", "--text",
    ],
    "report": ["RUN", "--output"],
    "runs": ["DIR?"],
    "plan": ["CONFIG", "KEY=VALUE", "--deadline"],
    "verify": ["CONFIG", "KEY=VALUE", "--no-calibration"],
    "config show": ["CONFIG?", "KEY=VALUE"],
    "config schema": ["CONFIG?", "KEY=VALUE"],
}  # fmt: skip


def leaves(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Every command that does something, by the words that call it."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found |= leaves(child)
    return found or {parser.prog.removeprefix("anarchobot "): parser}


def words_of(parser: argparse.ArgumentParser) -> list[str]:
    named = [f"{a.metavar}{'?' if a.nargs == '?' else ''}" for a in parser._actions if not a.option_strings]
    return named + sorted(a.option_strings[-1] for a in parser._actions if a.option_strings)


def test_the_option_surface_is_frozen() -> None:
    expected = {
        command: [w for w in words if w[0] != "-"] + sorted([*EVERYWHERE, *(w for w in words if w[0] == "-")])
        for command, words in SURFACE.items()
    }
    assert {command: words_of(parser) for command, parser in leaves(build_parser()).items()} == expected


@pytest.mark.parametrize("command", SURFACE)
def test_help_says_of_each_setting_what_the_schema_says(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """argparse leaves out the help of a flag that has none of its own, and asks nobody for it."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as leaving:
        parse(build_parser(), [*command.split(), "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: anarchobot {command} ")
    settings = [a.dest.removeprefix("setting ") for a in leaves(build_parser())[command]._actions if " " in a.dest]
    assert len(settings) == {
        "pretrain": 11,
        "sft": 13,
        "dpo": 13,
        "generate": 9,
        "chat": 11,
        "pretokenize": 5,
        "tokenizer train": 3,
        "kb add": 2,
        "kb search": 3,
        "kb list": 1,
        "kb remove": 1,
        "kb feedback": 2,
    }.get(command, 0)
    for key in settings:
        assert f"{key}: {leaf_keys()[key].description}; takes " in text


def small() -> Parser:
    """A program of one command, which takes all that a command can take."""
    parser = Parser(prog="p")
    commands = parser.add_subparsers(required=True, parser_class=Parser)
    run = add_command(commands, "run", lambda args: 0, "runs")
    add_config(run)
    run.add_argument("--input", nargs="+")
    add_settings(run, {"--lr": "train.lr", "--prompt": "generation.prompt", "--resume-from": "train.checkpoint_path"})
    look = add_command(commands, "look", lambda args: 0, "looks")
    add_config(look, optional=True)
    return parser


@pytest.mark.parametrize(
    "words",
    [
        "c.yaml train.seed=1 data.seq_len=2 --lr 3 --quiet",
        "c.yaml --lr 3 --quiet train.seed=1 data.seq_len=2",
        "--lr 3 c.yaml train.seed=1 --quiet data.seq_len=2",
        "--quiet train.seed=1 --lr 3 data.seq_len=2 c.yaml",
        "train.seed=1 c.yaml data.seq_len=2 --quiet --lr=3",
    ],
)
def test_config_and_overrides_may_stand_anywhere(words: str) -> None:
    args = parse(small(), ["run", *words.split()])
    assert args.config == "c.yaml"
    assert overrides(args) == ["train.seed=1", "data.seq_len=2", "train.lr=3"]
    assert args.quiet


@pytest.mark.parametrize(
    ("words", "config", "settings"),
    [
        ("", None, []),
        ("c.yaml", "c.yaml", []),
        ("--json c.yaml", "c.yaml", []),
        ("train.lr=1 --json train.seed=2", None, ["train.lr=1", "train.seed=2"]),
        ("runs/lr=3/c.yaml", "runs/lr=3/c.yaml", []),
        ("./lr=3.yaml", "./lr=3.yaml", []),
        ("lr=3", None, ["lr=3"]),
    ],
)
def test_config_may_be_left_out_where_it_is_optional(words: str, config: str | None, settings: list[str]) -> None:
    args = parse(small(), ["look", *words.split()])
    assert (args.config, args.settings) == (config, settings)


def test_input_files_do_not_swallow_overrides() -> None:
    args = parse(small(), ["run", "c.yaml", "--input", "a.txt", "b.txt", "train.seed=1"])
    assert (args.input, args.settings) == (["a.txt", "b.txt"], ["train.seed=1"])


@pytest.mark.parametrize("text", ["a: [b", "3", "null", "- x", "😀 \x7f\u2028", "a=b", "100 %", ""])
def test_a_text_behind_a_flag_is_taken_as_typed(text: str) -> None:
    args = parse(small(), ["run", "c.yaml", "--prompt", text, "--resume-from", text])
    config = load_config(None, overrides(args)).config
    assert config.generation.prompt == text
    assert config.train.checkpoint_path == text


def test_a_number_behind_a_flag_is_a_number_and_the_flag_wins() -> None:
    args = parse(small(), ["run", "c.yaml", "--lr", "3e-4", "train.lr=1"])
    assert load_config(None, overrides(args)).config.train.lr == 3e-4
    base: dict[str, Any] = {"train.lr": 0.5, "generation.prompt": "a: [b"}
    assert load_config(None, overrides(parse(small(), ["run", "c.yaml"]), base)).config.train.lr == 0.5
    assert load_config(None, overrides(args, base)).config.train.lr == 3e-4


MISTAKES = {
    "rum": "'rum' is no command of p; did you mean 'run'? (see p --help)",
    "zzz": "'zzz' is no command of p; expected one of run, look (see p --help)",
    "run": "the following arguments are required: CONFIG (see p run --help)",
    "run train.lr=1": "which CONFIG? Expected a YAML file, such as those in configs/ (see p run --help)",
    "run c.yaml --lrr 3": "unexpected '--lrr'; did you mean '--lr'? (see p run --help)",
    "run c.yaml --prompts=a_text": "unexpected '--prompts=a_text'; did you mean '--prompt'? (see p run --help)",
    "run c.yaml --zzz": "unexpected '--zzz' (see p run --help)",
    "run c.yaml --resume auto": "unexpected '--resume'; did you mean '--resume-from'? (see p run --help)",
    "run c.yaml --lr": "argument --lr: expected one argument (see p run --help)",
    "run c.yaml --quiet=3": "argument --quiet: ignored explicit argument '3' (see p run --help)",
    "run c.yaml d.yaml": "unexpected 'd.yaml' (see p run --help)",
    "--debug run c.yaml": "unexpected '--debug': it belongs behind 'p run' (see p run --help)",
    "run c.yaml --input train.lr=1": "argument --input: expected FILE before KEY=VALUE (see p run --help)",
}  # fmt: skip


@pytest.mark.parametrize(("words", "told"), MISTAKES.items(), ids=MISTAKES)
def test_a_slip_is_told_with_the_nearest_word(words: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        parse(small(), words.split())
    assert str(error.value) == told


@pytest.mark.parametrize("words", ["shards info d train.lr=1", "generate --checkpoint c train.lr=1"])
def test_overrides_are_refused_where_there_is_no_config(words: str) -> None:
    """Taken and forgotten, they would seem to work."""
    with pytest.raises(UserError, match=r"^unexpected 'train\.lr=1'"):
        parse(build_parser(), words.split())
