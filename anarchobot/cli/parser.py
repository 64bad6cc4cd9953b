"""Command-line parsing: argparse with one-line errors, suggestions, and a default in the help of every option."""

import argparse
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NoReturn, get_args

from anarchobot.config.errors import UserError, did_you_mean
from anarchobot.config.paths import find_path, such_as_runs

REQUIRED = "required"  # in place of the default, in the help of a flag that sets a config key
_SETTING = "setting "  # prefix of the dest of a flag that sets a config key
_PATHS = ("CONFIG", "DIR", "FILE", "PATH", "PREFIX", "RUN", "TEXTS")  # metavars of arguments that name files
HUB_NAME = "ORG/NAME[@REVISION] on the Hugging Face Hub"  # in the help of arguments that name a model
# Names in mlx-lm, Unsloth, transformers, nanochat, Ollama and Hugging Face's hf, for suggestions; those of settings are
# in config/names_elsewhere.py.
COMMANDS_ELSEWHERE = {
    "merge": "fuse", "convert": "import", "quantize": "export", "lora": "sft", "finetune": "sft", "fine-tune": "sft",
    "orpo": "dpo", "kto": "dpo", "simpo": "dpo", "cpo": "dpo", "ppo": "grpo", "rl": "grpo",
    "server": "serve", "run": "chat", "eval": "evaluate", "perplexity": "evaluate", "tokenize": "pretokenize",
    "prepare": "pretokenize", "sample": "generate",
    "upload": "export", "list": "runs", "ls": "runs", "init": "config init",
    "resume": "pretrain CONFIG --resume-from auto", "help": "--help",
}  # fmt: skip
DOWNLOADS_ELSEWHERE = ("pull", "download")
FLAGS_ELSEWHERE = {
    "--iters": ("--steps",),
    "--max-steps": ("--steps",),
    "--data": ("--dataset", "--input"),
    "--adapter-path": ("--adapter", "--checkpoint", "--checkpoint-dir"),
    "--model-path": ("--checkpoint", "--model"),
    "--model": ("--checkpoint",),
    "--output": ("--checkpoint-dir",),
    "--output-dir": ("--output", "--checkpoint-dir"),
    "--save-dir": ("--checkpoint-dir",),
    "--resume": ("--resume-from",),
    "--q-bits": ("--bits",),
    "--q-group-size": ("--group-size",),
    "--quant-predicate": ("--mixed",),
    "--outtype": ("--type",),
    "--upload-repo": ("--push",),
}
KEY_VALUE = re.compile(r"\w[\w.-]*=")  # a file with such a name can be given as ./NAME


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds "required" or the default to the help of each option, unless the help has "default:" or it takes no value.

    Flags for config keys are described by the schema, which is loaded only if help is shown.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.dest.startswith(_SETTING):
            return _setting_help(action).replace("%", "%%")
        if not action.help or "default:" in action.help or action.nargs == 0:
            return action.help
        if action.option_strings and action.required:
            return f"{action.help} (required)"
        if action.default is not None and (action.option_strings or action.nargs == "?"):
            return f"{action.help} (default: {action.default})"
        return action.help


class _Setting(argparse.Action):
    """A flag that sets a config key. `defaults_of`: the command whose own default applies, if it has one."""

    def __init__(self, *, defaults_of: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.defaults_of = defaults_of

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values)


def _setting_help(action: argparse.Action) -> str:
    from anarchobot.config.loading import describe_type, leaf_keys

    key = action.dest.removeprefix(_SETTING)
    info = leaf_keys()[key]
    value = info.default
    if isinstance(action, _Setting) and action.defaults_of:
        value = _command_default(action.defaults_of, key, value)
    default = "" if "default:" in (info.description or "") else f"; {action.help}{_shown(value)}"
    default = f"; {REQUIRED}" if action.help == REQUIRED else default
    return f"{info.description} [{key}: {describe_type(info)}{default}]"


def _command_default(command: str, key: str, default: Any) -> Any:
    """The value of a key in a command without CONFIG."""
    from anarchobot.config.strict_yaml import parse
    from anarchobot.config.templates import DEFAULT_CONFIGS
    from anarchobot.config.validation import RUN_LENGTH_KEYS

    path = Path(DEFAULT_CONFIGS[command])
    values = {
        f"{section}.{name}": value
        for section, of_section in parse(path.read_bytes(), str(path)).values.items()
        for name, value in of_section.items()
    }
    is_other_length = key in RUN_LENGTH_KEYS and not values.keys().isdisjoint(RUN_LENGTH_KEYS)
    return values.get(key, None if is_other_length else default)


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    return default if isinstance(default, str) and default else json.dumps(default)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of printing its usage and exiting."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        """Expands ~ in the arguments that name files: a shell does not where it is quoted or follows `=`."""
        if kwargs.get("metavar") in _PATHS:
            kwargs["type"] = _find if kwargs.get("type") is Path else find_path
        return super().add_argument(*names, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise _UsageError(message, self)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = _similar_command(value, action.choices) or f"; expected one of {', '.join(action.choices)}"
            self.error(f"unknown command '{value}'{near}")


class _UsageError(UserError):
    def __init__(self, message: str, parser: Parser) -> None:
        super().__init__(f"{message} (see {parser.prog} --help)")
        self.message, self.parser = message, parser


def _find(word: str) -> Path:
    return Path(find_path(word))


def parse(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """Parses `argv`. KEY=VALUE arguments of a command with CONFIG may precede, follow or be mixed with its flags."""
    for word in argv:
        if not word.isprintable() and any("\ud800" <= c <= "\udfff" for c in word):
            raise UserError(f"argument {word!a} is not valid UTF-8")
    try:
        args, rest = parser.parse_known_args(argv)
    except _UsageError as error:
        if "required" not in error.message:
            raise
        raise _missing_arguments(error, argv) from error
    if hasattr(args, "settings"):
        words = [args.config, *args.settings, *(word for word in rest if not word.startswith("-"))]
        rest = [word for word in rest if word.startswith("-")]
        for option in {action.dest: action for action in args.options.values() if action.nargs == "+"}.values():
            given = getattr(args, option.dest) or []  # such an option consumes all positional arguments after it
            files = [word for word in given if not KEY_VALUE.match(word)]
            if given and not files:
                name = option.option_strings[0]
                raise UserError(f"argument {name}: expected {option.metavar} before KEY=VALUE (see {args.prog} --help)")
            words += [word for word in given if word not in files]
            setattr(args, option.dest, files)
        args.settings = [word for word in words if word is not None and KEY_VALUE.match(word)]
        configs = [word for word in words if word is not None and not KEY_VALUE.match(word)]
        if args.sections:
            for word in args.settings:
                if word.partition(".")[0] not in args.sections:
                    raise UserError(f"'{word}': this command has only settings of {' and '.join(args.sections)}")
                if word.partition("=")[0] in args.unused:
                    raise UserError(f"'{word}': this command does not use {word.partition('=')[0]}")
        else:
            args.config_name = configs[0] if configs else None
            args.config, configs = (_find_config(configs[0]) if configs and not rest else None), configs[1:]
        rest += configs
        if args.config is None and args.needs_config and not rest:
            raise UserError(
                f"missing CONFIG: expected a YAML file, or a name such as quickstart (see {args.prog} --help)"
            )
    if rest:
        word = rest[0].partition("=")[0]
        near = f"; place it after '{args.prog}'" if word in args.options else _flag_for(word, args)
        raise UserError(f"unrecognized argument '{rest[0]}'{near} (see {args.prog} --help)")
    return args


def _find_config(word: str) -> str:
    """A file, or the name of a configuration that comes with AnarchoBot."""
    if Path(word).is_file():
        if Path(word).suffix in (".jsonl", ".parquet", ".txt"):
            raise UserError(f"{word}: not a configuration file (YAML); for data, set data.dataset={word}")
        return word
    from anarchobot.config.templates import shipped_configs

    return str(shipped_configs().get(word, word))


def _missing_arguments(error: _UsageError, argv: Sequence[str]) -> UserError:
    """The error for missing arguments, or for an unknown flag, which is the likely reason that one is missing."""
    flags = [word.partition("=")[0] for word in takewhile(lambda word: word != "--", argv) if word.startswith("--")]
    args = argparse.Namespace(
        options=error.parser._option_string_actions, instead=error.parser.get_default("instead") or {}
    )
    unknown = next((flag for flag in flags if flag not in args.options), None)
    if unknown is not None:
        near = _similar_flag(unknown, args)
        return UserError(f"unrecognized argument '{unknown}'{near} (see {error.parser.prog} --help)")
    if "--checkpoint" in error.message and "--model" in flags:  # mlx-lm's name
        return _UsageError(
            f"{error.message}; use --checkpoint instead of --model, the base model of adapters", error.parser
        )
    words = [word for before, word in pairwise(argv) if not before.startswith("-")]  # no values of flags
    path = next((word for word in words if not word.startswith("-") and Path(word).exists()), None)
    if path is not None and ": --checkpoint" in error.message:
        return _UsageError(f"{error.message}; did you mean --checkpoint {shlex.quote(path)}?", error.parser)
    if not error.message.endswith(": --checkpoint"):
        return error
    return _UsageError(f"{error.message}{such_as_runs()}", error.parser)


def _similar_command(word: str, commands: Iterable[str]) -> str:
    name = COMMANDS_ELSEWHERE.get(word, word)
    if name.startswith("-") or name.split()[0] in commands:
        return f"; did you mean '{name}'?"
    if word in DOWNLOADS_ELSEWHERE:
        return "; models are downloaded when they are named, as in chat --checkpoint ORG/NAME"
    return did_you_mean(word, commands)


def _flag_for(word: str, args: argparse.Namespace) -> str:
    """The flag that an argument without one, or with an unknown one, may need."""
    if not word.startswith("-"):
        is_prompt = bool(getattr(args, "sections", ()))  # not CONFIG
        for flag, is_meant in (("--checkpoint", Path(word).exists()), ("--prompt", is_prompt)):
            if flag in args.options and is_meant:
                return f"; did you mean {flag} {shlex.quote(word)}?"
    return _similar_flag(word, args)


def _similar_flag(word: str, args: argparse.Namespace) -> str:
    """The flag or the KEY=VALUE that the user may have meant, or why there is none."""
    from anarchobot.config.loading import find_key

    if word in getattr(args, "instead", {}):
        return f"; {args.instead[word]}"
    names = [name for name in FLAGS_ELSEWHERE.get(word, ()) if name in args.options]
    if not names and (key := find_key(word.lstrip("-").replace("-", "_"))) is not None:
        names = [name for name, action in args.options.items() if action.dest == f"{_SETTING}{key}"]
        names += [f"{key}=VALUE"] if _accepts(args, key) else []
        if not names and hasattr(args, "why_no_settings"):
            return f"; {args.why_no_settings}"
    return f"; did you mean '{names[0]}'?" if names else did_you_mean(word, args.options)


def _accepts(args: argparse.Namespace, key: str) -> bool:
    """Whether KEY=VALUE can set `key`."""
    sections = getattr(args, "sections", None)
    return sections is not None and (not sections or (key.partition(".")[0] in sections and key not in args.unused))


def add_command(commands: Any, name: str, run: Any, summary: str, **kwargs: Any) -> Parser:
    """Adds a command with the flags that all commands share. `run(args)` returns its exit code or None."""
    parser: Parser = commands.add_parser(name, help=summary, description=summary, **kwargs)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--quiet", action="store_true", help="print results only, no progress")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run, prog=parser.prog, options=parser._option_string_actions)
    return parser


def add_group(commands: Any, name: str, subcommands: str, summary: str) -> Any:
    """Adds a command with subcommands; returns what `add_command` takes to add them."""
    parser: Parser = commands.add_parser(name, help=summary, description=summary)
    return parser.add_subparsers(metavar=subcommands, required=True, parser_class=Parser)


def add_config(parser: Parser, optional: bool = False, default: str = "") -> None:
    """Adds CONFIG and KEY=VALUE: `args.config`, a path (or None if optional), and `args.settings`. `default` describes
    the settings without CONFIG."""
    parser.add_argument(
        "config",
        nargs="?" if optional else None,
        metavar="CONFIG",
        help="YAML file, or the name of one that comes with AnarchoBot, such as quickstart"
        + (f" (default: {default})" if default else ""),
    )
    parser.add_argument(
        "settings", nargs="*", default=[], metavar="KEY=VALUE", help="overrides a key of CONFIG, such as train.lr=1e-3"
    )
    parser.set_defaults(needs_config=not optional, sections=())


def add_overrides(parser: Parser, *sections: str, unused: Sequence[str] = ()) -> None:
    """Adds KEY=VALUE for keys of `sections`, except for those in `unused`, to a command without CONFIG."""
    parser.add_argument(
        "settings",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help=f"a setting of {' or '.join(sections)}, such as generation.top_k=20",
    )
    parser.set_defaults(config=None, needs_config=False, sections=sections, unused=unused)


def add_settings(parser: Parser, settings: dict[str, str], default: str = "default: ", defaults_of: str = "") -> None:
    """Adds flags that set config keys: {"--lr": "train.lr"}. `default` precedes the default in the help; REQUIRED
    replaces it. The default is the schema's, or that of the command `defaults_of` without CONFIG."""
    for flag, key in settings.items():
        metavar = flag.strip("-").replace("-", "_").upper()
        dest = f"{_SETTING}{key}"
        parser.add_argument(flag, metavar=metavar, dest=dest, help=default, action=_Setting, defaults_of=defaults_of)


def add_switch(parser: Parser, flag: str, key: str) -> None:
    """Adds --FLAG and --no-FLAG, which set a config key to true and false."""
    parser.add_argument(flag, action=argparse.BooleanOptionalAction, dest=f"{_SETTING}{key}", help="default: ")


def overrides(args: argparse.Namespace, base: dict[str, Any] | None = None) -> list[str | tuple[str, Any]]:
    """Overrides for `load_config`, in increasing precedence: `base` (keys and values), KEY=VALUE arguments, flags.

    The value of a flag for a string is taken literally, not parsed as YAML.
    """
    from anarchobot.config.loading import leaf_keys
    from anarchobot.config.schema import PathName

    result: list[str | tuple[str, Any]] = [*(base or {}).items(), *getattr(args, "settings", [])]
    for name, value in vars(args).items():
        if name.startswith(_SETTING) and value is not None:
            key = name.removeprefix(_SETTING)
            annotation = leaf_keys()[key].annotation
            is_literal = isinstance(value, bool) or {str, PathName} & {annotation, *get_args(annotation)}
            result.append((key, value) if is_literal else f"{key}={value}")
    return result


def non_negative(word: str) -> int:
    if not word.isascii() or not word.isdigit():
        raise argparse.ArgumentTypeError(f"expected an integer >= 0, got '{word}'")
    return int(word)


def positive(word: str) -> int:
    if not word.isascii() or not word.isdigit() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got '{word}'")
    return int(word)


def check_output(file: Path) -> None:
    """Raises UserError if `file` cannot be written, before any work is done."""
    if not file.parent.is_dir():
        raise UserError(f"--output {file}: no such folder: {file.parent}")
    if file.is_dir():
        raise UserError(f"--output {file}: is a folder; expected a file name")
