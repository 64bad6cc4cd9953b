"""The command line's words: argparse, with its mistakes told in one line and the nearest right word."""

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn, get_args

from anarchobot.config.errors import UserError, did_you_mean

_SETTING = "setting "  # dest of a flag that stands for a key of the schema
_KEY_VALUE = re.compile(r"\w[\w.-]*=")  # a file of such a name is given as ./NAME


class _Help(argparse.RawDescriptionHelpFormatter):
    """Takes the help of a setting's flag from the schema, and loads the schema only when help is shown."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.dest.startswith(_SETTING):
            return super()._get_help_string(action)
        from anarchobot.config.loading import expectation, leaf_keys

        key = action.dest.removeprefix(_SETTING)
        info = leaf_keys()[key]
        return f"{key}: {info.description}; takes {expectation(info)}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of printing its usage and leaving."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = did_you_mean(value, action.choices) or f"; expected one of {', '.join(action.choices)}"
            self.error(f"'{value}' is no command of {self.prog}{near}")


def parse(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """Parses. For a command with CONFIG, its KEY=VALUE words may stand before, between and behind the flags."""
    for word in argv:
        if not word.isprintable() and any("\ud800" <= c <= "\udfff" for c in word):
            raise UserError(f"{word!a}: not UTF-8: what is typed must be text")
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "settings"):
        words = [args.config, *args.settings, *(word for word in rest if not word.startswith("-"))]
        rest = [word for word in rest if word.startswith("-")]
        if getattr(args, "input", None):  # `--input FILE...` takes all words behind it
            words += [word for word in args.input if _KEY_VALUE.match(word)]
            args.input = [word for word in args.input if not _KEY_VALUE.match(word)]
            if not args.input:
                raise UserError(f"argument --input: expected FILE before KEY=VALUE (see {args.prog} --help)")
        args.settings = [word for word in words if word is not None and _KEY_VALUE.match(word)]
        configs = [word for word in words if word is not None and not _KEY_VALUE.match(word)]
        args.config = configs[0] if configs else None
        rest += configs[1:]
        if args.config is None and args.needs_config:
            raise UserError(f"which CONFIG? Expected a YAML file, such as those in configs/ (see {args.prog} --help)")
    if rest:
        word = rest[0].partition("=")[0]
        near = f": it belongs behind '{args.prog}'" if word in args.options else did_you_mean(word, args.options)
        raise UserError(f"unexpected '{rest[0]}'{near} (see {args.prog} --help)")
    return args


def add_command(commands: Any, name: str, run: Any, summary: str, **kwargs: Any) -> Parser:
    """A command with the flags that all have; `run(args)` does it and returns its exit code or None."""
    parser: Parser = commands.add_parser(name, help=summary, description=summary, **kwargs)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--quiet", action="store_true", help="no progress, only results")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run, prog=parser.prog, options=parser._option_string_actions)
    return parser


def check_output(file: Path) -> None:
    """Raises UserError when no file of this name can be written, before there is anything to lose."""
    if not file.parent.is_dir():
        raise UserError(f"--output {file}: no such folder: {file.parent}")
    if file.is_dir():
        raise UserError(f"--output {file}: is a folder: expected a file's name")


def add_config(parser: Parser, optional: bool = False) -> None:
    """CONFIG and KEY=VALUE words: `args.config`, a path (or None where it is optional), and `args.settings`."""
    parser.add_argument(
        "config", nargs="?" if optional else None, metavar="CONFIG", help="a YAML file, such as those in configs/"
    )
    parser.add_argument(
        "settings", nargs="*", default=[], metavar="KEY=VALUE", help="overrides the file's, such as train.lr=1e-3"
    )
    parser.set_defaults(needs_config=not optional)


def add_settings(parser: Parser, settings: dict[str, str]) -> None:
    """Flags that stand for keys of the schema: {"--lr": "train.lr"}."""
    for flag, key in settings.items():
        metavar = flag.strip("-").replace("-", "_").upper()
        parser.add_argument(flag, metavar=metavar, dest=f"{_SETTING}{key}", help=key)  # in full: _Help


def add_switch(parser: Parser, name: str, key: str) -> None:
    """--NAME and --no-NAME, which set a key of the schema to true and false."""
    for flag, value in ((f"--{name}", "true"), (f"--no-{name}", "false")):
        parser.add_argument(flag, action="store_const", const=value, dest=f"{_SETTING}{key}", help=key)


def overrides(args: argparse.Namespace, base: dict[str, Any] | None = None) -> list[str | tuple[str, Any]]:
    """What `load_config` is to lay over the file, the later ones stronger: `base` (keys and values), the KEY=VALUE
    words, the settings' flags. A flag for a text is taken as typed, whatever YAML would make of it."""
    from anarchobot.config.loading import leaf_keys

    result: list[str | tuple[str, Any]] = [*(base or {}).items(), *getattr(args, "settings", [])]
    for name, value in vars(args).items():
        if name.startswith(_SETTING) and value is not None:
            key = name.removeprefix(_SETTING)
            annotation = leaf_keys()[key].annotation
            is_text = annotation is str or str in get_args(annotation)
            result.append((key, value) if is_text else f"{key}={value}")
    return result


def count(word: str) -> int:
    if not word.isascii() or not word.isdigit():
        raise argparse.ArgumentTypeError(f"'{word}': expected a whole number, 0 or more")
    return int(word)


def positive(word: str) -> int:
    if not word.isascii() or not word.isdigit() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"'{word}': expected a whole number, 1 or more")
    return int(word)
