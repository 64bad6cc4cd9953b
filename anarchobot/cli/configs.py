"""`anarchobot config show | schema`."""

import argparse
import json
import sys
from typing import Any

from anarchobot.cli.parser import add_command, add_config, overrides


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("config", help="show the effective settings, or their JSON Schema")
    parts = parser.add_subparsers(metavar="show|schema", required=True, parser_class=type(parser))
    show = add_command(parts, "show", _show, "the effective configuration, and where each value comes from")
    add_config(show, optional=True)
    add_command(parts, "schema", _schema, "the JSON Schema of a configuration, for editors")


def _show(args: argparse.Namespace) -> None:
    from anarchobot.config.loading import load_config
    from anarchobot.config.yaml_tree import dump

    loaded = load_config(args.config, overrides(args))
    values = loaded.config.model_dump()
    sources = {
        f"{section}.{key}": loaded.sources.get(f"{section}.{key}", "default")
        for section, keys in values.items()
        for key in keys
    }
    if args.json:
        print(json.dumps({"config": values, "sources": sources}, indent=1))
        return
    for section, keys in values.items():
        print(f"{section}:")
        for key, value in keys.items():
            line = dump({key: value}, flow=True).strip()[1:-1]
            print(f"  {line:<40} # {sources[f'{section}.{key}']}")


def _schema(args: argparse.Namespace) -> None:
    from anarchobot.config.schema import Config

    json.dump(Config.model_json_schema(), sys.stdout, indent=1)
    print()
