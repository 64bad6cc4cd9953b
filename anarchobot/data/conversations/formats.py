"""Rows of instruction, chat and preference datasets to conversations and preference pairs.

A row's format is detected from its field names. OpenAssistant's message trees, which span rows, are in oasst.py.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from anarchobot.data.sources.rows import Row
from anarchobot.tokenizers.conversation import (
    Conversation,
    InvalidRow,
    Message,
    PreferencePair,
    check_encodable,
    check_turns,
    make_pair,
    parse_message,
)


class Format(NamedTuple):
    """`matches` looks only at field names; `parse` raises InvalidRow when the values are wrong."""

    matches: Callable[[Row], bool]
    parse: Callable[[Row], Conversation]


def get_field(row: Row, *names: str) -> Any:
    """The first of these fields that is present and not null. Raises InvalidRow if there is none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise InvalidRow(
        "missing field", f"no {' or '.join(map(repr, names))}; the row has {', '.join(sorted(row)) or 'no fields'}"
    )


def parse_messages(items: Any, name: str, system: Any = None) -> list[Message]:
    """Messages from a list of {role, content} or ShareGPT's {from, value}.

    The row's own `system` prompt goes first unless the list starts with one. Blank system prompts are ignored.
    """
    if not isinstance(items, list):
        raise InvalidRow("field is not a list", f"{type(items).__name__} in '{name}'")
    messages: list[Message] = []
    for i, item in enumerate(items):
        place = f"'{name}', turn {i + 1}"
        if not isinstance(item, dict):
            raise InvalidRow("turn is not an object", f"{type(item).__name__} in {place}")
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if role == "system" and isinstance(content, str) and not content.strip():
            continue
        messages.append(parse_message(role, content, place))
    if isinstance(system, str) and system.strip() and not (messages and messages[0].role == "system"):
        messages.insert(0, Message("system", system))
    return messages


def _from_list(row: Row, name: str) -> Conversation:
    return check_turns(parse_messages(get_field(row, name), name, row.get("system")))


def _from_alpaca(row: Row) -> Conversation:
    """Alpaca, or Dolly with its `context` and `response`. `history` holds earlier [user, assistant] turns."""
    parts = [get_field(row, "instruction"), row.get("input") or row.get("context") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise InvalidRow("content is not text", "'instruction' or 'input'")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turns, list) and len(turns) == 2 for turns in history):
        raise InvalidRow("field is not a list", "'history' must be a list of [user, assistant]")
    question = "\n".join(part for part in parts if part.strip())
    earlier = [content for exchange in history for content in exchange]
    return _alternating(row.get("system"), [*earlier, question, get_field(row, "output", "response")])


def _from_prompt_completion(row: Row) -> Conversation:
    prompt, completion = get_field(row, "prompt", "question"), get_field(row, "completion", "answer")
    if isinstance(prompt, list) or isinstance(completion, list):  # of messages
        return check_turns(
            [*parse_messages(prompt, "prompt", row.get("system")), *parse_messages(completion, "completion")]
        )
    return _alternating(row.get("system"), [prompt, completion])


def _alternating(system: Any, contents: list[Any]) -> Conversation:
    turns = [parse_message(("user", "assistant")[i % 2], text, f"turn {i + 1}") for i, text in enumerate(contents)]
    return check_turns([*parse_messages([], "", system), *turns])


def from_text(row: Row, text_field: str) -> Conversation:
    """A document: a single message with the role "text"."""
    text = get_field(row, text_field)
    if not isinstance(text, str):
        raise InvalidRow("content is not text", f"{type(text).__name__} in '{text_field}'")
    if not text.strip():
        raise InvalidRow("empty content", f"'{text_field}'")
    check_encodable(text, f"'{text_field}'")
    return (Message("text", text),)


# Tried in this order: UltraChat's rows have a prompt as well as messages.
FORMATS = {
    "messages": Format(lambda row: "messages" in row, lambda row: _from_list(row, "messages")),
    "sharegpt": Format(lambda row: "conversations" in row, lambda row: _from_list(row, "conversations")),
    "alpaca": Format(lambda row: "instruction" in row and ("output" in row or "response" in row), _from_alpaca),
    "prompt_completion": Format(
        lambda row: ("prompt" in row and "completion" in row) or ("question" in row and "answer" in row),
        _from_prompt_completion,
    ),
}
EXPECTED = "messages, conversations, instruction and output, prompt and completion, OASST message trees, or text"

# Preferences: UltraFeedback, HH-RLHF, ShareGPT and similar.

EXPECTED_PAIRS = (
    "chosen and rejected, with a separate prompt or the whole dialogue in each; or OpenAssistant message trees"
)
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_preference_row(row: Row) -> bool:
    return "chosen" in row and "rejected" in row


def parse_pair(row: Row) -> PreferencePair:
    """Raises InvalidRow for a missing field, a missing prompt or answer, or identical answers.

    Each answer is a string, a message or a list of messages. The prompt is what both lists start with, preceded by the
    row's `prompt`, `question` or `conversations` unless the lists repeat it. Two strings without a prompt are
    HH-RLHF transcripts.
    """
    answers = {name: get_field(row, name) for name in ("chosen", "rejected")}
    types = {type(answer) for answer in answers.values()}
    if len(types) > 1 or not types <= {str, dict, list}:
        raise InvalidRow(
            "answers have different types", " and ".join(type(answer).__name__ for answer in answers.values())
        )
    prompt_fields = [name for name in ("prompt", "question", "conversations") if row.get(name) is not None]
    if types == {str} and not prompt_fields:
        sides = [_parse_transcript(answer, name) for name, answer in answers.items()]
    else:
        prompt = _parse_prompt(row[prompt_fields[0]], prompt_fields[0], row.get("system")) if prompt_fields else []
        sides = [_parse_dialogue(prompt, answer, name) for name, answer in answers.items()]
    return make_pair(*sides)


def _parse_prompt(value: Any, name: str, system: Any) -> list[Message]:
    items = value if isinstance(value, list) else [{"role": "user", "content": value}]
    return parse_messages(items, name, system)


def _parse_dialogue(prompt: list[Message], answer: Any, name: str) -> Conversation:
    """The prompt followed by the answer."""
    if isinstance(answer, str):
        return check_turns([*prompt, parse_message("assistant", answer, f"'{name}'")])
    turns = parse_messages(answer if isinstance(answer, list) else [answer], name)
    return check_turns(turns if turns and turns[0].role != "assistant" else [*prompt, *turns])


def _parse_transcript(text: str, name: str) -> Conversation:
    """Parses "\\n\\nHuman: ...\\n\\nAssistant: ..."; whitespace around turns is stripped."""
    before, *parts = _HH_TURN.split(text)
    if before.strip() or not parts:
        raise InvalidRow("missing prompt", f"'{name}' does not start with a Human turn, and the row has no 'prompt'")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return check_turns(
        parse_message(_HH_ROLES[speaker], content.strip(), f"'{name}', turn {i + 1}")
        for i, (speaker, content) in enumerate(turns)
    )
