"""The command line: the frozen set of options, help with defaults, argument order, and error messages."""

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from anarchobot.cli.main import build_parser
from anarchobot.cli.parser import Parser, add_command, add_config, add_settings, overrides, parse
from anarchobot.config.errors import UserError
from anarchobot.config.loading import leaf_keys, load_config
from anarchobot.config.names_elsewhere import KEYS_ELSEWHERE

EVERYWHERE = ["--debug", "--help", "--json", "--quiet"]

# Scripts and notebooks rely on these. Add new ones here deliberately; do not remove any without a migration.
SURFACE = {
    "tokenizer train": ["CONFIG?", "KEY=VALUE", "--format", "--input", "--model-type", "--output", "--vocab-size"],
    "pretokenize": [
        "CONFIG?", "KEY=VALUE", "--input", "--join", "--output", "--part", "--processes", "--restart", "--text-field",
        "--tokenizer", "--val-fraction", "--workers",
    ],
    "shards info": ["DIR"],
    "shards verify": ["DIR"],
    "pretrain": [
        "CONFIG", "KEY=VALUE", "--backend", "--batch-size", "--brief", "--checkpoint-dir", "--epochs", "--log-to",
        "--lr", "--max-grad-norm", "--no-supervise", "--resume-from", "--save-every", "--seed", "--steps",
        "--supervise", "--warmup-steps",
    ],
    **{
        command: [
            "CONFIG?", "KEY=VALUE", "--backend", "--batch-size", "--brief", "--checkpoint-dir", "--dataset",
            "--epochs", "--log-to", "--lr", "--max-grad-norm", "--model", "--no-supervise", "--resume-from",
            "--save-every", "--seed", "--steps", "--supervise", "--warmup-steps",
        ]
        for command in ("sft", "dpo", "grpo")
    },
    "train": ["TEXTS", "--chat", "--dry-run", "--model", "--output", "--time"],
    "launch": ["COMMAND", "--backend", "--hostfile", "--hosts", "--ranks"],
    "adapt-vocab": ["CONFIG", "KEY=VALUE"],
    "export": [
        "--bits", "--checkpoint", "--dtype", "--eval-text", "--group-size", "--mixed", "--output", "--public", "--push",
        "--to", "--type",
    ],
    "import": ["DIR", "--output"],
    "fuse": ["--adapter", "--model", "--output"],
    "selftest": ["--faults", "--kills", "--seed"],
    "bench": ["CONFIG", "KEY=VALUE", "--steps", "--device", "--output"],
    "generate": [
        "KEY=VALUE", "--checkpoint", "--draft-model", "--frequency-penalty", "--max-new-tokens", "--method",
        "--min-p", "--model", "--num-draft-tokens", "--presence-penalty", "--prompt", "--prompts",
        "--repetition-penalty", "--seed", "--stop", "--temperature", "--top-k", "--top-p",
    ],
    "kb add": ["FILE", "--embedding-model", "--kb", "--text-field"],
    "kb embed": ["--embedding-model", "--kb", "--rebuild"],
    "kb search": ["QUESTION", "--embedding-model", "--feedback-alpha", "--kb", "-k"],
    "kb list": ["--kb"],
    "kb remove": ["NAME", "--kb"],
    "kb feedback": ["--bad", "--feedback-alpha", "--good", "--kb", "--passage", "--question"],
    "chat": [
        "KEY=VALUE", "-k", "--checkpoint", "--draft-model", "--embedding-model", "--feedback-alpha",
        "--frequency-penalty", "--kb", "--max-new-tokens", "--method", "--min-p", "--model", "--num-draft-tokens",
        "--presence-penalty", "--repetition-penalty", "--seed", "--stop", "--temperature", "--top-k", "--top-p",
    ],
    "serve": [
        "KEY=VALUE", "-k", "--allow-host", "--allow-origin", "--api-key-file", "--checkpoint",
        "--client-connections", "--draft-model", "--embedding-model", "--feedback-alpha", "--host", "--kb",
        "--log-level", "--log-prompts", "--max-tokens", "--model", "--model-name", "--num-draft-tokens", "--port",
        "--prefix-cache", "--queue",
    ],
    "evaluate": [
        "KEY=VALUE", "--chats", "--checkpoint", "--compare", "--include", "--limit", "--model", "--num-fewshot",
        "--output", "--page", "--preferences", "--rouge", "--shards", "--tasks", "--text",
    ],
    "report": ["RUN", "--output"],
    "monitor": ["RUN", "--wait"],
    "runs": ["DIR?"],
    "plan": ["CONFIG", "KEY=VALUE", "--deadline"],
    "verify": ["CONFIG", "KEY=VALUE", "--no-calibration"],
    "completion": ["SHELL"],
    "config init": ["PURPOSE", "KEY=VALUE", "--output"],
    "config show": ["CONFIG?", "KEY=VALUE"],
    "config schema": ["CONFIG?", "KEY=VALUE"],
}  # fmt: skip


def leaves(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Every command without subcommands, by its full name."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found |= leaves(child)
    return found or {parser.prog.removeprefix("anarchobot "): parser}


def words_of(parser: argparse.ArgumentParser) -> list[str]:
    named = [f"{a.metavar}{'?' if a.nargs == '?' else ''}" for a in parser._actions if not a.option_strings]
    flags = [a.option_strings for a in parser._actions if a.option_strings]
    return named + sorted(flag for names in flags for flag in names if flag.startswith("--") or len(names) == 1)


def test_the_option_surface_is_frozen() -> None:
    expected = {
        command: [w for w in words if w[0] != "-"] + sorted([*EVERYWHERE, *(w for w in words if w[0] == "-")])
        for command, words in SURFACE.items()
    }
    assert {command: words_of(parser) for command, parser in leaves(build_parser()).items()} == expected


@pytest.mark.parametrize("command", SURFACE)
def test_help_describes_settings_by_the_schema(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """argparse does not ask the formatter for the help of a flag whose own help is empty."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as leaving:
        parse(build_parser(), [*command.split(), "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: anarchobot {command} ")
    settings = [a.dest.removeprefix("setting ") for a in leaves(build_parser())[command]._actions if " " in a.dest]
    assert len(settings) == {
        "pretrain": 13,
        "sft": 15,
        "dpo": 15,
        "grpo": 15,
        "generate": 11,
        "chat": 14,
        "serve": 4,
        "pretokenize": 5,
        "tokenizer train": 3,
        "kb add": 3,
        "kb embed": 2,
        "kb search": 4,
        "kb list": 1,
        "kb remove": 1,
        "kb feedback": 2,
    }.get(command, 0)
    for key in settings:
        assert f"{leaf_keys()[key].description} [{key}: " in text


@pytest.mark.parametrize("command", SURFACE)
def test_help_shows_the_default_of_every_option(command: str) -> None:
    """Or that it is required. Flags without a value are off by default, except for --FLAG/--no-FLAG pairs."""
    parser = leaves(build_parser())[command]
    formatter = parser._get_formatter()
    for action in parser._actions:
        is_switch = isinstance(action, argparse.BooleanOptionalAction)
        if action.option_strings and (action.nargs != 0 or is_switch):
            text = formatter._expand_help(action)
            assert "default: " in text or "required" in text, f"{action.option_strings}: {text}"
            if action.required:
                assert "required" in text, f"{action.option_strings}: {text}"


@pytest.mark.parametrize(
    ("command", "flag", "expected"),
    [
        ("pretrain", "--lr", "default: 0.0003]"),
        ("pretrain", "--supervise", "default: on for runs over 1 hour"),
        ("sft", "--lr", "default: 0.0002]"),  # of the command without CONFIG
        ("sft", "--epochs", "default: 2]"),
        ("sft", "--steps", "default: none]"),
        ("sft", "--seed", "default: 0]"),
        ("dpo", "--checkpoint-dir", "default: runs/dpo]"),
        ("generate", "--top-k", "default: the model's setting, else 50]"),
        ("generate", "--checkpoint", "(required)"),
        ("serve", "--port", "(default: 8080)"),
        ("kb search", "--kb", "; required]"),
        ("chat", "--kb", "default: the model's setting, else none]"),
        ("export", "--dtype", "(default: float32, or bfloat16 with --bits)"),
        ("tokenizer train", "--output", "(default: train.tokenizer_path)"),
    ],
)
def test_defaults_in_help(command: str, flag: str, expected: str) -> None:
    parser = leaves(build_parser())[command]
    (action,) = [action for action in parser._actions if flag in action.option_strings]
    assert expected in parser._get_formatter()._expand_help(action)


def small() -> Parser:
    """A program with a command that has every kind of argument, and one with an optional CONFIG."""
    parser = Parser(prog="p")
    commands = parser.add_subparsers(required=True, parser_class=Parser)
    run = add_command(commands, "run", lambda args: 0, "runs")
    add_config(run)
    run.add_argument("--input", nargs="+", metavar="FILE")
    add_settings(run, {"--lr": "train.lr", "--prompt": "generation.prompt", "--resume-from": "train.checkpoint_path"})
    look = add_command(commands, "look", lambda args: 0, "looks")
    add_config(look, optional=True)
    return parser


def test_the_home_folder_is_expanded_in_arguments_that_name_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    args = parse(build_parser(), ["generate", "--checkpoint=~/run", "--prompts", "~/p.txt", "--prompt", "~/x"])
    assert (args.checkpoint, str(args.prompts)) == ("/home/me/run", "/home/me/p.txt")
    assert overrides(args) == [("generation.prompt", "~/x")]
    assert parse(build_parser(), ["pretrain", "~/c.yaml"]).config == "/home/me/c.yaml"
    assert parse(build_parser(), ["train", "~/notes", "x"]).texts == ["/home/me/notes", "x"]


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
def test_config_and_overrides_may_be_anywhere(words: str) -> None:
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
def test_config_may_be_omitted_if_optional(words: str, config: str | None, settings: list[str]) -> None:
    args = parse(small(), ["look", *words.split()])
    assert (args.config, args.settings) == (config, settings)


def test_input_does_not_consume_overrides() -> None:
    args = parse(small(), ["run", "c.yaml", "--input", "a.txt", "b.txt", "train.seed=1"])
    assert (args.input, args.settings) == (["a.txt", "b.txt"], ["train.seed=1"])
    words = ["evaluate", "--checkpoint", "a", "--text", "a.txt", "generation.seed=1", "--chats", "b.jsonl"]
    args = parse(build_parser(), words)
    assert (args.text, args.settings) == (["a.txt"], ["generation.seed=1"])


@pytest.mark.parametrize("text", ["a: [b", "3", "null", "- x", "😀 \x7f\u2028", "a=b", "100 %", ""])
def test_string_flags_are_taken_literally(text: str) -> None:
    args = parse(small(), ["run", "c.yaml", "--prompt", text, "--resume-from", text])
    config = load_config(None, overrides(args)).config
    assert config.generation.prompt == text
    assert config.train.checkpoint_path == text


def test_number_flags_are_parsed_and_take_precedence() -> None:
    args = parse(small(), ["run", "c.yaml", "--lr", "3e-4", "train.lr=1"])
    assert load_config(None, overrides(args)).config.train.lr == 3e-4
    base: dict[str, Any] = {"train.lr": 0.5, "generation.prompt": "a: [b"}
    assert load_config(None, overrides(parse(small(), ["run", "c.yaml"]), base)).config.train.lr == 0.5
    assert load_config(None, overrides(args, base)).config.train.lr == 3e-4


ERRORS = {
    "rum": "unknown command 'rum'; did you mean 'run'? (see p --help)",
    "zzz": "unknown command 'zzz'; expected one of run, look (see p --help)",
    "run": "the following arguments are required: CONFIG (see p run --help)",
    "run train.lr=1": "missing CONFIG: expected a YAML file, or a name such as quickstart (see p run --help)",
    "run c.yaml --lrr 3": "unrecognized argument '--lrr'; did you mean '--lr'? (see p run --help)",
    "run c.yaml --prompts=text": "unrecognized argument '--prompts=text'; did you mean '--prompt'? (see p run --help)",
    "run c.yaml --zzz": "unrecognized argument '--zzz' (see p run --help)",
    "run c.yaml --resume auto": "unrecognized argument '--resume'; did you mean '--resume-from'? (see p run --help)",
    "run c.yaml --lr": "argument --lr: expected one argument (see p run --help)",
    "run c.yaml --quiet=3": "argument --quiet: ignored explicit argument '3' (see p run --help)",
    "run c.yaml d.yaml": "unrecognized argument 'd.yaml' (see p run --help)",
    "--debug run c.yaml": "unrecognized argument '--debug'; place it after 'p run' (see p run --help)",
    "run c.yaml --input train.lr=1": "argument --input: expected FILE before KEY=VALUE (see p run --help)",
}  # fmt: skip


@pytest.mark.parametrize(("words", "message"), ERRORS.items(), ids=ERRORS)
def test_errors_suggest_the_nearest_name(words: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(small(), words.split())
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        ("merge", "fuse"),
        ("lora", "sft"),
        ("convert", "import"),
        ("eval", "evaluate"),
        ("generate --temp 0", "--temperature"),
        ("generate --max-tokens 9", "--max-new-tokens"),
        ("generate --adapter-path a --checkpoint b", "--checkpoint"),
        ("sft --learning-rate 1", "--lr"),
        ("sft --iters 5", "--steps"),
        ("sft --data d", "--dataset"),
        ("pretokenize --data d", "--input"),
        ("serve --model-path d", "--checkpoint"),
        ("sft --adapter-path a", "--checkpoint-dir"),
        ("sft --output a", "--checkpoint-dir"),
        ("sft --num-layers 4", "lora.num_layers=VALUE"),
        ("sft --max-seq-length 4", "data.seq_len=VALUE"),
        ("pretrain tiny --weight-decay 0.1", "train.weight_decay=VALUE"),
        ("sft --batchsize 4", "--batch-size"),
        ("generate --length 9", "--max-new-tokens"),
        ("serve --temp 0", "generation.temperature=VALUE"),
        ("chat --chekpoint c", "--checkpoint"),  # the reason why the required flag is missing
        ("export --model c", "--checkpoint"),
        ("export --checkpoint c --to mlx --output o --q-bits 4", "--bits"),
        ("export --checkpoint c --to mlx --output o --q-group-size 32", "--group-size"),
        ("export --checkpoint c --to mlx --output o --quant-predicate mixed_4_6", "--mixed"),
        ("export --checkpoint c --to gguf --output o --outtype q8_0", "--type"),
        ("export --checkpoint c --to hf --output o --upload-repo a/b", "--push"),
        ("export --checkpoint c --to mlx --output o --format gguf", "--to"),
        ("list", "runs"),
        ("ls", "runs"),
        ("kb ls", "list"),
        ("init", "config init"),
        ("resume", "pretrain CONFIG --resume-from auto"),
        ("help", "--help"),
        ("upload", "export"),
        ("prepare", "pretokenize"),
        ("sample", "generate"),
    ],
)
def test_names_of_other_programs_are_known(words: str, suggestion: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{suggestion}'"):
        parse(
            build_parser(),
            words.replace("generate", "generate --checkpoint c").replace("serve", "serve --checkpoint c").split(),
        )


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("chat model", "did you mean --checkpoint model?"),
        ("serve model --port 1", "did you mean --checkpoint model?"),
        ("export model --to hf", "did you mean --checkpoint model?"),
        ("generate --checkpoint c hello", "did you mean --prompt hello?"),
        ("fuse --checkpoint c", "the adapters with --adapter"),
        ("serve --api-key-file model", "are required: --checkpoint (see"),
        ("sft --data chats.jsonl", "did you mean '--dataset'?"),
        ("sft chats.jsonl", "chats.jsonl: not a configuration file (YAML); for data, set data.dataset=chats.jsonl"),
    ],
)
def test_the_flag_of_an_argument_without_one_is_named(
    words: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "chats.jsonl").touch()
    with pytest.raises(UserError) as error:
        parse(build_parser(), words.split())
    assert hint in str(error.value)


def test_a_missing_checkpoint_is_suggested_from_the_newest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("new", "older run", "old", "oldest")):
        (file := tmp_path / "runs" / name / "latest.json").parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (1000 - age, 1000 - age))
    with pytest.raises(UserError, match="such as runs/new or 'runs/older run' or runs/old"):
        parse(build_parser(), ["generate"])


@pytest.mark.parametrize("word", KEYS_ELSEWHERE)
def test_names_of_settings_in_other_programs_are_of_existing_keys(word: str) -> None:
    assert KEYS_ELSEWHERE[word] in leaf_keys()


@pytest.mark.parametrize("flag", ["--model m", "--model=m"])
@pytest.mark.parametrize("command", ["generate", "chat", "serve", "evaluate"])
def test_a_model_without_a_checkpoint_is_explained(command: str, flag: str) -> None:
    with pytest.raises(UserError, match=f"required.*; use --checkpoint .* \\(see anarchobot {command} --help"):
        parse(build_parser(), [command, *flag.split()])


@pytest.mark.parametrize("words", ["train notes --lr 1e-3", "train notes --batch-size=8", "train notes train.lr=1e-3"])
def test_train_explains_that_it_chooses_the_settings(words: str) -> None:
    with pytest.raises(UserError, match=r"config\.yaml"):
        args = parse(build_parser(), words.split())
        args.run(args)


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        ("--dataset notes", "--chat"),
        ("--data=notes", "--chat"),
        ("notes --minutes 5", "--time"),
        ("--text n", "--chat"),
    ],
)
def test_train_explains_flags_of_other_commands(words: str, instead: str) -> None:
    with pytest.raises(UserError, match=f"^unrecognized argument '--.*; .*{instead}.* \\(see anarchobot train --help"):
        parse(build_parser(), ["train", *words.split()])


def test_a_flag_of_another_commands_setting_is_not_suggested_to_a_command_without_it() -> None:
    with pytest.raises(UserError) as error:
        parse(build_parser(), ["generate", "--checkpoint", "c", "--weight-decay", "1"])
    assert "train.weight_decay" not in str(error.value)


def test_downloads_need_no_command() -> None:
    for word in ("pull", "download"):
        with pytest.raises(UserError, match="models are downloaded when they are named"):
            parse(build_parser(), [word, "ORG/NAME"])


def test_settings_of_a_command_without_a_config() -> None:
    args = parse(build_parser(), ["generate", "generation.top_k=7", "--checkpoint", "c", "generation.prompt=The end"])
    generation = load_config(None, overrides(args)).config.generation
    assert (generation.top_k, generation.prompt) == (7, "The end")


@pytest.mark.parametrize("words", ["shards info d train.lr=1", "generate --checkpoint c train.lr=1"])
def test_overrides_without_a_config_are_rejected(words: str) -> None:
    """Ignored, they would seem to work."""
    with pytest.raises(UserError, match=r"^(unrecognized argument )?'train\.lr=1'"):
        parse(build_parser(), words.split())
