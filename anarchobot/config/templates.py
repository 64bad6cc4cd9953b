"""Configurations to start from: those in configs/, by name, and the commented ones of `anarchobot config init`."""

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.errors import UserError
from anarchobot.config.loading import Loaded, Override, leaf_keys, load, load_config
from anarchobot.config.schema import Config, Section
from anarchobot.config.strict_yaml import dump

_PACKAGE = Path(__file__).parents[1]
FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # of an installed package, and of a source checkout
# Settings of the commands without CONFIG.
DEFAULT_CONFIGS = {
    command: str(Path(__file__).with_name(f"default_{command}.yaml")) for command in ("sft", "dpo", "grpo")
}
WIDTH = 110


@dataclass(frozen=True)
class Purpose:
    """What `config init` writes: the shipped `config` with `settings`; `asks` are keys without a useful default,
    with an example of each."""

    config: str
    command: str
    asks: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    schema: type[Section] = Config


_MODEL = {"train.init_from": "ORG/NAME"}
PURPOSES = {
    "pretrain": Purpose(
        "tiny",
        "anarchobot tokenizer train {file}, then pretokenize, verify and pretrain",
        {"data.dataset": "notes/"},
        {
            "data.shard_dir": "shards/mine", "train.tokenizer_path": "shards/mine/tokenizer.model",
            "train.save_dir": "runs/mine", "train.epochs": 4, "generation.prompt": "The",
        },
    ),
    "sft": Purpose("tuning/sft", "anarchobot sft {file}", _MODEL | {"data.dataset": "chats.jsonl"}),
    "lora": Purpose("tuning/lora_balanced", "anarchobot sft {file}", _MODEL | {"data.dataset": "chats.jsonl"}),
    "dpo": Purpose("tuning/dpo", "anarchobot dpo {file}", _MODEL | {"data.dataset": "pairs.jsonl"}),
    "grpo": Purpose("tuning/grpo", "anarchobot grpo {file}", _MODEL | {"data.dataset": "questions.jsonl"}),
    "adapt-vocab": Purpose(
        "adapt_stable",
        "anarchobot adapt-vocab {file}",
        {"models.source_model": "ORG/NAME", "corpus.domain": "notes/"},
        {"pipeline.run_root": "runs/adapt"},
        AdaptConfig,
    ),
}  # fmt: skip


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with AnarchoBot, by name, such as "quickstart" and "tuning/sft"."""
    folder = next(folder for folder in FOLDERS if folder.is_dir())
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def required_keys(purpose: str) -> dict[str, str]:
    """Keys without a useful default, with their descriptions."""
    keys = leaf_keys(PURPOSES[purpose].schema)
    return {key: str(keys[key].description) for key in PURPOSES[purpose].asks}


def next_command(purpose: str, file: Path) -> str:
    return PURPOSES[purpose].command.format(file=file)


def write_template(purpose: str, settings: Sequence[str], file: Path) -> None:
    """Writes a configuration in which each key has a comment that describes it. `settings` are KEY=VALUE overrides.

    Raises UserError if a required key is missing, a setting is invalid, or the file exists.
    """
    wanted = PURPOSES[purpose]
    given = {word.partition("=")[0] for word in settings}
    if missing := [key for key in wanted.asks if key not in given]:
        descriptions = required_keys(purpose)
        wanted_keys = " and ".join(f"{key}=VALUE ({descriptions[key]})" for key in missing)
        example = shlex.join([*settings, *(f"{key}={wanted.asks[key]}" for key in missing)])
        raise UserError(f"missing {wanted_keys}; for example: anarchobot config init {purpose} {example}")
    if file.exists():
        raise UserError(f"{file}: exists already: choose another name with --output")
    path = shipped_configs()[wanted.config]
    overrides: list[Override] = [*wanted.settings.items(), *settings]
    loaded: Loaded[Any] = (
        load_config(path, overrides) if wanted.schema is Config else load(path, overrides, AdaptConfig)
    )
    file.write_text("\n".join(_lines(wanted, loaded)) + "\n", encoding="utf-8")


def _lines(purpose: Purpose, loaded: Loaded[Any]) -> list[str]:
    """Keys that have a value, in the order of the schema."""
    lines = [f"# {purpose.command.format(file='FILE')}", "# All keys and their defaults: docs/configuration.md"]
    values, shown = loaded.config.model_dump(), list[str]()
    for key, info in leaf_keys(purpose.schema).items():
        if key not in loaded.sources:
            continue
        *parents, leaf = key.split(".")
        value = values
        for depth, parent in enumerate(parents):
            value = value[parent]
            if (section := ".".join(parents[: depth + 1])) not in shown:
                shown.append(section)
                lines.append(f"{'  ' * depth}{parent}:")
        indent = "  " * len(parents)
        lines += textwrap.wrap(
            str(info.description), WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        lines += textwrap.indent(dump({leaf: value[leaf]}).rstrip(), indent).split("\n")
    return lines
