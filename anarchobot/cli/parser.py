"""The command line's words: argparse, with its mistakes told in one line and the nearest right word."""

import argparse
import json
import re
from typing import Any, NoReturn

from anarchobot.config.errors import UserError, did_you_mean


class _Help(argparse.RawDescriptionHelpFormatter):
    """Takes the help of a setting's flag from the schema, and loads the schema only when help is shown."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.dest.startswith(_SETTING):
            return super()._get_help_string(action)
        from anarchobot.config.loading import leaf_keys

        key = action.dest.removeprefix(_SETTING)
        return f"{key}: {leaf_keys()[key].description}".replace("%", "%%")


_SETTING = "setting "  # dest of a flag that stands for a key of the schema


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of printing its usage and leaving."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message: str) -> NoReturn:
        if match := re.search(r"invalid choice: '([^']*)'", message):
            choices = re.sub(r".*choose from ", "", message).rstrip(")").replace("'", "")
            near = did_you_mean(match[1], choices.split(", ")) or f": expected one of {choices}"
            raise UserError(f"{self.prog}: '{match[1]}' is none of its words{near}")
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def parse(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """Parses; `section.key=value` words may stand anywhere behind the command, in `args.overrides`."""
    args, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if re.match(r"[\w.]+=", word)]
    unknown = [word for word in rest if word not in overrides]
    if unknown or (overrides and not hasattr(args, "overrides")):
        word = (unknown or overrides)[0]
        raise UserError(f"{args.prog}: unexpected '{word}'{did_you_mean(word, args.options)} (see {args.prog} --help)")
    if overrides:
        args.overrides = [*args.overrides, *overrides]
    return args


def add_command(commands: Any, name: str, run: Any, summary: str, **kwargs: Any) -> Parser:
    """A command with the flags that all have; `run(args)` does it and returns its exit code or None."""
    parser: Parser = commands.add_parser(name, help=summary, description=summary, **kwargs)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--quiet", action="store_true", help="no progress, only results")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run, prog=parser.prog, options=parser._option_string_actions)
    return parser


def add_config(parser: Parser, optional: bool = False) -> None:
    """CONFIG and KEY=VALUE words; where CONFIG may be left out, `config_path` sorts the two."""
    parser.add_argument(
        "overrides",
        nargs="*" if optional else "+",
        metavar="[CONFIG] KEY=VALUE" if optional else "CONFIG KEY=VALUE",
        help="a YAML file, then settings that override it, such as train.lr=1e-3",
    )


def config_path(args: argparse.Namespace, optional: bool = False) -> str | None:
    """Takes CONFIG out of the words of `add_config` and leaves the overrides."""
    if args.overrides and not re.match(r"\w+\.\w+=", args.overrides[0]):
        return str(args.overrides.pop(0))
    if optional:
        return None
    raise UserError(f"{args.prog}: which CONFIG? Expected a YAML file first (see configs/)")


def add_settings(parser: Parser, settings: dict[str, str]) -> None:
    """Flags that stand for keys of the schema: {"--lr": "train.lr"}."""
    for flag, key in settings.items():
        parser.add_argument(flag, metavar=flag.strip("-").replace("-", "_").upper(), dest=f"{_SETTING}{key}")


def overrides(args: argparse.Namespace, base: dict[str, Any] | None = None) -> list[str]:
    """All KEY=VALUE words, the later ones stronger: `base` (keys and values), those typed, those of settings' flags."""
    from anarchobot.config.loading import leaf_keys

    flags = []
    for name, value in vars(args).items():
        if name.startswith(_SETTING) and value is not None:
            key = name.removeprefix(_SETTING)
            is_text = leaf_keys()[key].annotation in (str, str | None)  # taken as typed, whatever YAML would make of it
            flags.append(f"{key}={json.dumps(value) if is_text else value}")
    words = [f"{key}={json.dumps(value)}" for key, value in (base or {}).items()]
    return [*words, *getattr(args, "overrides", []), *flags]
