#!/usr/bin/env python
"""Writes docs/configuration.md from the schema; `--check` writes nothing and exits with 1 when the page is stale."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from anarchobot.cli import corpus, generating, training
from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.loading import expectation, leaf_keys
from anarchobot.config.schema import Config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by scripts/write_config_docs.py from anarchobot/config/schema.py and adapt_schema.py: change it there. -->

A configuration is one YAML file, named on the command line: `anarchobot pretrain configs/quickstart.yaml`. No other
place is searched. Any section and any key may be left out. Any key can be set on the command line as well,
`SECTION.KEY=VALUE` before or behind the flags, and the common ones by a flag of their own:

    anarchobot pretrain configs/quickstart.yaml train.lr=1e-3 data.seq_len=256 --batch-size 4

The command line is stronger than the file, and the file is stronger than the default; a flag is stronger than
`KEY=VALUE`. A run length (`train.total_steps`, `train.epochs`, `train.token_budget`) on the command line replaces the
one in the file; two in the same place are a mistake.

- `anarchobot config show [CONFIG] [KEY=VALUE ...]` prints every setting and where it comes from.
- `anarchobot config schema [CONFIG]` prints a JSON Schema for editors.

Both know adapt-vocab's configurations by their sections.

Numbers, `true`, `false` and `null` are written as in YAML 1.2: `3e-4` is a number, `yes` and `0123` are text. `5e4` is
taken where a whole number is wanted, and `50_000` too. Aliases, tags and keys given twice are refused. A mistake is
told in one line, with the file, its line, the key and what was expected; the exit code is 2.
"""

ADAPT_VOCAB = """\
# Settings of adapt-vocab

A file of its own, read by the same rules. A key of three parts stands two sections deep: `embedding.fasttext.epochs`.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, _flags(), *_sections(Config), ADAPT_VOCAB, *_sections(AdaptConfig)])


def _sections(schema: type[BaseModel]) -> Iterator[str]:
    for section, info in schema.model_fields.items():
        rows = [
            f"| `{key.partition('.')[2]}` | {_default(leaf)} | {_cell(expectation(leaf))} "
            f"| {_cell(leaf.description or '')} |"
            for key, leaf in leaf_keys(schema).items()
            if key.startswith(f"{section}.")
        ]
        summary = (info.annotation.__doc__ or "") if info.annotation else ""
        head = ["| key | default | takes | meaning |", "| --- | --- | --- | --- |"]
        yield "\n".join([f"## {section}", "", summary, "", *head, *rows, ""])


def _default(leaf: FieldInfo) -> str:
    return "must be set" if leaf.is_required() else f"`{json.dumps(leaf.default)}`"


def _flags() -> str:
    commands = {
        "tokenizer train": corpus.TOKENIZER_SETTINGS,
        "pretokenize": corpus.PRETOKENIZE_SETTINGS,
        "pretrain": training.SETTINGS,
        "generate": generating.SETTINGS,
    }
    rows = [
        f"| `{flag}` | `{command}` | `{key}` |" for command, flags in commands.items() for flag, key in flags.items()
    ]
    return "\n".join(["## Flags", "", "| flag | of | sets |", "| --- | --- | --- |", *rows, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(argv: list[str]) -> int:
    if argv == ["--check"]:
        fresh = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        if not fresh:
            print(f"{PAGE.name} is stale: run scripts/write_config_docs.py", file=sys.stderr)
        return 0 if fresh else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
