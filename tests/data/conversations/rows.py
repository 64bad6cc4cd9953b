"""What tests of the readers share."""

import json
from pathlib import Path
from typing import Any

from anarchobot.data.conversations.tally import Tally

from anarchobot.config.schema import DataConfig
from anarchobot.data.conversations.reading import conversations, pairs
from anarchobot.tokenizers.conversation import Conversation, Pair

# A row of each form as its dataset has it, and what comes of it.
QUESTION, ANSWER = "Why?", "Because."
TWO = (("user", QUESTION), ("assistant", ANSWER))
MESSAGES = [{"content": QUESTION, "role": "user"}, {"content": ANSWER, "role": "assistant"}]


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def read(*names: Path | str, form: str = "auto", language: str | None = None) -> tuple[list[Conversation], Tally]:
    tally = Tally()
    found = [c for _, c in conversations(DataConfig(dataset=[str(n) for n in names]), tally, form, language)]
    check(tally, len(found))
    return found, tally


def read_pairs(*names: Path | str) -> tuple[list[Pair], Tally]:
    tally = Tally()
    found = [pair for _, pair in pairs(DataConfig(dataset=[str(n) for n in names]), tally)]
    check(tally, len(found))
    return found, tally


def check(tally: Tally, kept: int) -> None:
    assert tally.kept == kept and tally.read == kept + tally.left_out.total()
    assert set(tally.first) == set(tally.left_out)
