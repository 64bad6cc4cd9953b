"""Helpers for tests of dataset reading."""

import json
from pathlib import Path
from typing import Any

from anarchobot.config.schema import DataConfig
from anarchobot.data.conversations import reading
from anarchobot.data.conversations.reading import RowCounts
from anarchobot.tokenizers.conversation import Conversation, LabeledConversation, Message, PreferencePair

QUESTION, ANSWER = "Why?", "Because."
TWO = (("user", QUESTION), ("assistant", ANSWER))
MESSAGES = [{"content": QUESTION, "role": "user"}, {"content": ANSWER, "role": "assistant"}]


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def plain(conversation: Conversation) -> tuple[Any, ...]:
    """(role, content) of each message that has nothing else; the others as they are."""
    return tuple(
        message[:2] if message == Message(message.role, message.content) else message for message in conversation
    )


def read(*names: Path | str, format: str = "auto", language: str | None = None) -> tuple[list[Any], RowCounts]:
    counts = RowCounts()
    data = DataConfig(dataset=[str(n) for n in names])
    found = [plain(c) for _, c in reading.read_conversations(data, counts, format, language)]
    check(counts, len(found))
    return found, counts


def plain_pair(pair: PreferencePair) -> tuple[Any, ...]:
    """(prompt, chosen, rejected), with the text of answers that have nothing else."""
    answers = [answer.content if plain((answer,)) != (answer,) else answer for answer in (pair.chosen, pair.rejected)]
    return plain(pair.prompt), *answers


def read_pairs(*names: Path | str) -> tuple[list[Any], RowCounts]:
    counts = RowCounts()
    found = [plain_pair(p) for _, p in reading.read_pairs(DataConfig(dataset=[str(n) for n in names]), counts)]
    check(counts, len(found))
    return found, counts


def read_labeled(*names: Path | str) -> tuple[list[Any], RowCounts]:
    counts = RowCounts()
    found = [
        plain_pair(item) if isinstance(item, PreferencePair) else LabeledConversation(plain(item[0]), item.desirable)
        for _, item in reading.read_labeled(DataConfig(dataset=[str(n) for n in names]), counts)
    ]
    check(counts, len(found))
    return found, counts


def check(counts: RowCounts, kept: int) -> None:
    assert counts.kept == kept and counts.read == kept + counts.skipped.total()
    assert set(counts.first_skipped) == set(counts.skipped)
