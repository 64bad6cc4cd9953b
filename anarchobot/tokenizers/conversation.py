"""Conversations and preference pairs: the common form of all tuning datasets."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# Role names in datasets, in lower case, to role names in chat templates.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    **dict.fromkeys(("gpt", "chatgpt", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "tool_response"), "tool"),
}
MAX_DEPTH = 50  # of tools and of the arguments of a call


class Message(NamedTuple):
    """`role` is system, user, assistant, or tool, for the result of a call. The first message may have the role tools:
    it declares the functions of the conversation. A message with the role text is a document that is not rendered by a
    template.

    `fields` are passed to the template as they are: `tool_calls` of an assistant, `name` and `tool_call_id` of a
    result, and `tools`, all in OpenAI's form, with the arguments of a call as an object. `in_loss` is whether an
    assistant's message is trained on.
    """

    role: str
    content: str
    reasoning: str = ""
    fields: Mapping[str, Any] = MappingProxyType({})
    in_loss: bool = True

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = self.fields.get("tool_calls", [])
        return calls


Conversation = tuple[Message, ...]


class PreferencePair(NamedTuple):
    """Two answers to the same prompt, which ends with a turn of the user or with the result of a call."""

    prompt: Conversation
    chosen: Message
    rejected: Message


class LabeledConversation(NamedTuple):
    """A conversation, and whether its last answer is desirable."""

    conversation: Conversation
    desirable: bool


class Question(NamedTuple):
    """A prompt, which ends with a turn of the user or with the result of a call, and the answer that completions are
    compared with, in any type of JSON; None if the data has none."""

    prompt: Conversation
    answer: Any


class InvalidRow(ValueError):
    """A row that cannot be used. Rows are counted by `reason`; `detail` is shown for the first of each."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def parse_message(role: Any, content: Any, place: str) -> Message:
    """`role` in any letter case; `content` is a text or a list of OpenAI's text parts, which are joined.

    Raises InvalidRow for an unknown role and for content that is blank or not text; `place` names the turn.
    """
    message = Message(parse_role(role, place), parse_text(content, place))
    if not message.content.strip():
        raise InvalidRow("empty content", place)
    return message


def parse_role(role: Any, place: str) -> str:
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise InvalidRow("unknown role", f"{role!r} in {place}; expected one of {', '.join(ROLES)}")
    return known


def parse_text(content: Any, place: str) -> str:
    """The text of `content`, which may be blank. Raises InvalidRow if it is something else."""
    text = join_parts(content)
    if not isinstance(text, str):
        raise InvalidRow("content is not text", f"{_describe(content)} in {place}")
    check_encodable(text, place)
    return text


def join_parts(content: Any) -> Any:
    """The text of a list of {"type": "text", "text": ...}; anything else as it is."""
    if isinstance(content, list) and content and all(map(_is_text_part, content)):
        return "".join(part["text"] for part in content)
    return content


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _describe(content: Any) -> str:
    """The type, and of a list the first part that is not text."""
    other = next((part for part in content if not _is_text_part(part)), None) if isinstance(content, list) else None
    part = f" with a part of type {other['type']!r}" if isinstance(other, dict) and "type" in other else ""
    return type(content).__name__ + part


def check_encodable(text: str, place: str) -> None:
    """Raises InvalidRow for an unpaired surrogate, which tokenizers cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRow("not UTF-8", f"unpaired surrogate in {place}") from error


def check_json(value: Any, place: str) -> None:
    """Raises InvalidRow unless `value` is one of JSON: with other types, or nested more than MAX_DEPTH deep, templates
    can't write it."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        if not (level := [value for values in inner for value in values]):
            break
    else:
        raise InvalidRow("nested too deeply", f"{place}; at most {MAX_DEPTH} levels")
    try:
        check_encodable(json.dumps(value, ensure_ascii=False), place)
    except TypeError as error:  # a date in a Parquet file
        raise InvalidRow("not JSON", f"{error} in {place}") from error


def check_turns(messages: Iterable[Message]) -> Conversation:
    """Returns the messages as a conversation. Raises InvalidRow unless they are optional tools and an optional system
    message, then user and assistant turns in alternation, ending with the assistant. In an assistant's turn, a message
    with calls is followed by their results, and these by another message of the assistant."""
    conversation = tuple(messages)
    if not conversation:
        raise InvalidRow("empty conversation")
    turns = conversation[preamble(conversation) :]
    expected: tuple[str, ...] = ("user",)
    for i, turn in enumerate(turns):
        if turn.role not in expected:
            raise InvalidRow(
                "roles out of order", f"turn {i + 1} has role {turn.role}, expected {' or '.join(expected)}"
            )
        if turn.role == "assistant":
            expected = ("tool",) if turn.tool_calls else ("user",)
        else:
            expected = ("assistant",) if turn.role == "user" else ("assistant", "tool")
    if conversation[-1].role != "assistant":
        raise InvalidRow("does not end with the assistant", f"the last turn has role {conversation[-1].role}")
    return conversation


def preamble(conversation: Conversation) -> int:
    """The number of messages before the first turn of the user: tools and a system message."""
    roles = [message.role for message in conversation[:2]]
    return 2 if roles == ["tools", "system"] else int(roles[:1] in (["tools"], ["system"]))


def turn(conversation: Conversation, i: int) -> int:
    """The number of message i, from 1, as in the data, which has the tools elsewhere."""
    return i + (conversation[0].role != "tools")


def is_held_out(conversation: Conversation, val_fraction: float) -> bool:
    """Whether it belongs to the validation split. Decided by 64 bits of its hash, so that adding data moves nothing
    between splits."""
    sha = hashlib.sha256()
    for message in conversation:
        for text in (message.content, *([json.dumps(dict(message.fields))] if message.fields else [])):
            raw = text.encode()
            sha.update(f"{message.role} {len(raw)}\n".encode())
            sha.update(raw)
    return int.from_bytes(sha.digest()[:8], "big") < val_fraction * 2**64


def make_pair(chosen: Conversation, rejected: Conversation) -> PreferencePair:
    """Raises InvalidRow for different prompts, for answers that differ only in surrounding whitespace, which templates
    trim, and for an answer that the data excludes from the loss."""
    prompts = [tuple(message._replace(in_loss=True) for message in side[:-1]) for side in (chosen, rejected)]
    if prompts[0] != prompts[1]:
        raise InvalidRow("answers to different prompts", f"{len(chosen)} and {len(rejected)} turns")
    answers = [side[-1]._replace(content=side[-1].content.strip()) for side in (chosen, rejected)]
    if not all(answer.in_loss for answer in answers):
        raise InvalidRow("answer excluded from the loss", "of a pair")
    if answers[0] == answers[1]:
        raise InvalidRow("identical answers")
    return PreferencePair(prompts[0], chosen[-1], rejected[-1])
