"""Rows of preference datasets to pairs: UltraFeedback, HH-RLHF, ShareGPT's form and what is built like them."""

import re
from typing import Any

from anarchobot.data.conversations.formats import field, messages
from anarchobot.data.sources.rows import Row
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Message, Pair, in_order, message, parted

EXPECTED = "chosen and rejected, and beside them a prompt, or the whole dialogue in each; or OpenAssistant's trees"
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def fits(row: Row) -> bool:
    return "chosen" in row and "rejected" in row


def pair(row: Row) -> Pair:
    """Raises InvalidRow for a row that is none: a field missing, no answer or no prompt, equal answers.

    Each answer is a text, a message, or a list of messages. What both lists begin with is the prompt, behind that of
    the row (`prompt`, `question` or `conversations`) when they don't begin with it themselves. Without a prompt, two
    texts are HH-RLHF's transcripts.
    """
    answers = [field(row, name) for name in ("chosen", "rejected")]
    kinds = {type(answer) for answer in answers}
    if len(kinds) > 1 or not kinds <= {str, dict, list}:
        raise InvalidRow("answers of different kinds", " and ".join(type(answer).__name__ for answer in answers))
    names = [name for name in ("prompt", "question", "conversations") if row.get(name) is not None]
    if kinds == {str} and not names:
        chosen, rejected = (
            _transcript(answer, name) for answer, name in zip(answers, ("chosen", "rejected"), strict=True)
        )
    else:
        prompt = _prompt(row[names[0]], names[0], row.get("system")) if names else []
        chosen, rejected = (
            _dialogue(prompt, answer, name) for answer, name in zip(answers, ("chosen", "rejected"), strict=True)
        )
    return parted(chosen, rejected)


def _prompt(value: Any, name: str, system: Any) -> list[Message]:
    items = value if isinstance(value, list) else [{"role": "user", "content": value}]
    return messages(items, name, system)


def _dialogue(prompt: list[Message], answer: Any, name: str) -> Conversation:
    """The prompt and the answer to it."""
    if isinstance(answer, str):
        return in_order([*prompt, message("assistant", answer, f"'{name}'")])
    turns = messages(answer if isinstance(answer, list) else [answer], name)
    return in_order(turns if turns and turns[0].role != "assistant" else [*prompt, *turns])


def _transcript(text: str, name: str) -> Conversation:
    """Of "\\n\\nHuman: ...\\n\\nAssistant: ..."; white space around a turn is none of it."""
    before, *parts = _HH_TURN.split(text)
    if before.strip() or not parts:
        raise InvalidRow("no prompt", f"'{name}' does not begin with a turn of Human, and the row has no 'prompt'")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return in_order(
        message(_HH_ROLES[who], content.strip(), f"'{name}', turn {i + 1}") for i, (who, content) in enumerate(turns)
    )
