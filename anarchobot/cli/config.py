"""`anarchobot config`: writes, shows and describes configurations."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from anarchobot.cli.parser import add_command, add_config, add_group, overrides
from anarchobot.config.errors import UserError, did_you_mean

PURPOSES = ("pretrain", "sft", "lora", "dpo", "grpo", "adapt-vocab")


def add_commands(commands: Any) -> None:
    config = add_group(commands, "config", "init|show|schema", "write, show or describe a configuration")
    init = add_command(config, "init", _config_init, "write a commented configuration to start from")
    init.add_argument("purpose", metavar="PURPOSE", help=f"what it is for: {', '.join(PURPOSES)}")
    init.add_argument(
        "assignments", nargs="*", default=[], metavar="KEY=VALUE", help="sets a key, such as data.dataset=notes/"
    )
    init.add_argument(
        "--output", type=Path, metavar="FILE", help="new file to write (default: PURPOSE.yaml in this folder)"
    )
    show = add_command(config, "show", _config_show, "show the effective configuration and the source of each value")
    add_config(show, optional=True)
    schema = add_command(config, "schema", _config_schema, "print the JSON Schema of a configuration, for editors")
    add_config(schema, optional=True)


def _config_init(args: argparse.Namespace) -> None:
    """Asks for the required keys that are not given, if a person is at the terminal."""
    from anarchobot.config.templates import next_command, required_keys, write_template

    if args.purpose not in PURPOSES:
        near = did_you_mean(args.purpose, PURPOSES) or f"; expected one of {', '.join(PURPOSES)}"
        raise UserError(f"unknown purpose '{args.purpose}'{near} (see anarchobot config init --help)")
    file = args.output or Path(f"{args.purpose}.yaml")
    settings = list(args.assignments)
    given = {word.partition("=")[0] for word in settings}
    for key, description in required_keys(args.purpose).items():
        if key not in given and sys.stdin.isatty() and (answer := input(f"{description} [{key}]: ").strip()):
            settings.append(f"{key}={answer}")
    write_template(args.purpose, settings, file)
    if args.json:
        print(json.dumps({"file": str(file), "purpose": args.purpose}))
    else:
        print(f"{file}: next: {next_command(args.purpose, file)}")


def _config_show(args: argparse.Namespace) -> None:
    from anarchobot.config.loading import dotted_items, load, load_config
    from anarchobot.config.strict_yaml import dump

    loaded: Any
    if _is_adapt_config(args):
        from anarchobot.config.adapt_schema import AdaptConfig

        loaded = load(args.config, overrides(args), AdaptConfig)
    else:
        loaded = load_config(args.config, overrides(args))
    values = loaded.config.model_dump()
    items = list(dotted_items(values))
    sources = {key: loaded.sources.get(key, "default") for key, value in items if not isinstance(value, dict)}
    if args.json:
        print(json.dumps({"config": values, "sources": sources}, indent=1))
        return
    for key, value in items:
        indent, name = "  " * key.count("."), key.rpartition(".")[2]
        if isinstance(value, dict):
            print(f"{indent}{name}:")
        else:
            line = indent + dump({name: value}, flow=True).strip()[1:-1]
            print(f"{line:<42} # {sources[key]}")


def _config_schema(args: argparse.Namespace) -> None:
    from anarchobot.config.adapt_schema import AdaptConfig
    from anarchobot.config.schema import Config

    json.dump((AdaptConfig if _is_adapt_config(args) else Config).model_json_schema(), sys.stdout, indent=1)
    print()


def _is_adapt_config(args: argparse.Namespace) -> bool:
    """Whether CONFIG and KEY=VALUE contain sections of adapt-vocab only."""
    from anarchobot.config.adapt_schema import AdaptConfig
    from anarchobot.config.loading import sections
    from anarchobot.config.schema import Config

    given = sections(args.config, args.settings)
    return bool(given & AdaptConfig.model_fields.keys()) and not given & Config.model_fields.keys()
