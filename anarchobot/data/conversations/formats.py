"""Rows of instruction and chat datasets, told apart by their fields, to conversations."""

from collections.abc import Callable
from typing import Any, NamedTuple

from anarchobot.data.sources.rows import Row
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Message, check_encodable, in_order, message


class Format(NamedTuple):
    """`fits` looks at the fields' names alone; `read` raises InvalidRow for a row that has them wrong."""

    fits: Callable[[Row], bool]
    read: Callable[[Row], Conversation]


def field(row: Row, *names: str) -> Any:
    """The first of these fields that the row has. Raises InvalidRow when it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise InvalidRow(
        "field missing", f"no {' or '.join(map(repr, names))}; it has {', '.join(sorted(row)) or 'nothing'}"
    )


def messages(items: Any, name: str, system: Any = None) -> list[Message]:
    """A list of {role, content}, or ShareGPT's {from, value}, behind the row's own system prompt if it has one and the
    list does not begin with another. A system prompt that is blank is none."""
    if not isinstance(items, list):
        raise InvalidRow("field is no list", f"{type(items).__name__} in '{name}'")
    found: list[Message] = []
    for i, item in enumerate(items):
        place = f"'{name}', turn {i + 1}"
        if not isinstance(item, dict):
            raise InvalidRow("turn is no object", f"{type(item).__name__} in {place}")
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if role == "system" and isinstance(content, str) and not content.strip():
            continue
        found.append(message(role, content, place))
    if isinstance(system, str) and system.strip() and not (found and found[0].role == "system"):
        found.insert(0, Message("system", system))
    return found


def _of_messages(row: Row) -> Conversation:
    return in_order(messages(field(row, "messages"), "messages", row.get("system")))


def _of_sharegpt(row: Row) -> Conversation:
    return in_order(messages(field(row, "conversations"), "conversations", row.get("system")))


def _of_alpaca(row: Row) -> Conversation:
    """Of dolly too: its context is the input, its response the output. `history`: earlier [user, assistant] turns."""
    question = [field(row, "instruction"), row.get("input") or row.get("context") or ""]
    if not all(isinstance(part, str) for part in question):
        raise InvalidRow("content is no text", "'instruction' or 'input'")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise InvalidRow("field is no list", "'history' is to be a list of [user, assistant]")
    asked = "\n".join(part for part in question if part.strip())
    before = [content for exchange in history for content in exchange]
    return _exchanges(row.get("system"), [*before, asked, field(row, "output", "response")])


def _of_prompt_completion(row: Row) -> Conversation:
    asked, answer = field(row, "prompt", "question"), field(row, "completion", "answer")
    if isinstance(asked, list) or isinstance(answer, list):  # of messages
        return in_order([*messages(asked, "prompt", row.get("system")), *messages(answer, "completion")])
    return _exchanges(row.get("system"), [asked, answer])


def _exchanges(system: Any, contents: list[Any]) -> Conversation:
    turns = [message(("user", "assistant")[i % 2], content, f"turn {i + 1}") for i, content in enumerate(contents)]
    return in_order([*messages([], "", system), *turns])


def of_text(row: Row, text_field: str) -> Conversation:
    """A document: one message of the role text."""
    text = field(row, text_field)
    if not isinstance(text, str):
        raise InvalidRow("content is no text", f"{type(text).__name__} in '{text_field}'")
    if not text.strip():
        raise InvalidRow("empty content", f"'{text_field}'")
    check_encodable(text, f"'{text_field}'")
    return (Message("text", text),)


# In the order in which a row is tried: UltraChat's rows have a prompt beside their messages.
FORMATS = {
    "messages": Format(lambda row: "messages" in row, _of_messages),
    "sharegpt": Format(lambda row: "conversations" in row, _of_sharegpt),
    "alpaca": Format(lambda row: "instruction" in row and ("output" in row or "response" in row), _of_alpaca),
    "prompt_completion": Format(
        lambda row: ("prompt" in row and "completion" in row) or ("question" in row and "answer" in row),
        _of_prompt_completion,
    ),
}
EXPECTED = "messages, conversations, instruction and output, prompt and completion, OASST's message trees, or a text"
