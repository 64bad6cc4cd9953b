"""`anarchobot config show | schema`."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from anarchobot.cli.parser import add_command, add_config, overrides


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("config", help="show the effective settings, or their JSON Schema")
    parts = parser.add_subparsers(metavar="show|schema", required=True, parser_class=type(parser))
    show = add_command(parts, "show", _show, "the effective configuration, and where each value comes from")
    add_config(show, optional=True)
    schema = add_command(parts, "schema", _schema, "the JSON Schema of a configuration, for editors")
    add_config(schema, optional=True)


def _show(args: argparse.Namespace) -> None:
    from anarchobot.config.loading import load, load_config
    from anarchobot.config.strict_yaml import dump

    loaded: Any
    if _is_adaptation(args):
        from anarchobot.config.adapt_schema import AdaptConfig

        loaded = load(args.config, overrides(args), AdaptConfig)
    else:
        loaded = load_config(args.config, overrides(args))
    values = loaded.config.model_dump()
    sources = {key: loaded.sources.get(key, "default") for key, value in _keys(values) if not isinstance(value, dict)}
    if args.json:
        print(json.dumps({"config": values, "sources": sources}, indent=1))
        return
    for key, value in _keys(values):
        indent, name = "  " * key.count("."), key.rpartition(".")[2]
        if isinstance(value, dict):
            print(f"{indent}{name}:")
        else:
            line = indent + dump({name: value}, flow=True).strip()[1:-1]
            print(f"{line:<42} # {sources[key]}")


def _schema(args: argparse.Namespace) -> None:
    from anarchobot.config.adapt_schema import AdaptConfig
    from anarchobot.config.schema import Config

    json.dump((AdaptConfig if _is_adaptation(args) else Config).model_json_schema(), sys.stdout, indent=1)
    print()


def _is_adaptation(args: argparse.Namespace) -> bool:
    """Whether file and words speak of adapt-vocab's sections, and of no other command's."""
    from anarchobot.config.adapt_schema import AdaptConfig
    from anarchobot.config.loading import sections
    from anarchobot.config.schema import Config

    given = sections(args.config, args.settings)
    return bool(given & AdaptConfig.model_fields.keys()) and not given & Config.model_fields.keys()


def _keys(values: dict[str, Any], parents: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key and its value, a section before its keys."""
    for name, value in values.items():
        yield f"{parents}{name}", value
        if isinstance(value, dict):
            yield from _keys(value, f"{parents}{name}.")
