"""Conversations and preference pairs: the common form of all tuning datasets."""

import hashlib
from collections.abc import Iterable
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
}


class Message(NamedTuple):
    """`role` is system, user or assistant; or text, for a document that is not rendered by a template."""

    role: str
    content: str


Conversation = tuple[Message, ...]


class PreferencePair(NamedTuple):
    """Two answers to the same prompt, which ends with a user turn."""

    prompt: Conversation
    chosen: str
    rejected: str


class InvalidRow(ValueError):
    """A row that cannot be used. Rows are counted by `reason`; `detail` is shown for the first of each."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def parse_message(role: Any, content: Any, place: str) -> Message:
    """`role` in any letter case; `content` is a text or a list of OpenAI's text parts, which are joined.

    Raises InvalidRow for an unknown role and for content that is blank or not text; `place` names the turn.
    """
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise InvalidRow("unknown role", f"{role!r} in {place}; expected one of {', '.join(ROLES)}")
    text = join_parts(content)
    if not isinstance(text, str):
        raise InvalidRow("content is not text", f"{_describe(content)} in {place}")
    if not text.strip():
        raise InvalidRow("empty content", place)
    check_encodable(text, place)
    return Message(known, text)


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


def check_turns(messages: Iterable[Message]) -> Conversation:
    """Returns the messages as a conversation. Raises InvalidRow unless they are an optional system message, then user
    and assistant turns in alternation, ending with the assistant."""
    conversation = tuple(messages)
    if not conversation:
        raise InvalidRow("empty conversation")
    turns = conversation[1:] if conversation[0].role == "system" else conversation
    for i, turn in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if turn.role != expected:
            raise InvalidRow("roles out of order", f"turn {i + 1} has role {turn.role}, expected {expected}")
    if conversation[-1].role != "assistant":
        raise InvalidRow("does not end with the assistant", f"the last turn has role {conversation[-1].role}")
    return conversation


def is_held_out(conversation: Conversation, val_fraction: float) -> bool:
    """Whether it belongs to the validation split. Decided by 64 bits of its hash, so that adding data moves nothing
    between splits."""
    sha = hashlib.sha256()
    for role, content in conversation:
        raw = content.encode()
        sha.update(f"{role} {len(raw)}\n".encode())
        sha.update(raw)
    return int.from_bytes(sha.digest()[:8], "big") < val_fraction * 2**64


def make_pair(chosen: Conversation, rejected: Conversation) -> PreferencePair:
    """Raises InvalidRow for different prompts, and for answers that differ only in surrounding whitespace, which
    templates trim."""
    if chosen[:-1] != rejected[:-1]:
        raise InvalidRow("answers to different prompts", f"{len(chosen)} and {len(rejected)} turns")
    if chosen[-1].content.strip() == rejected[-1].content.strip():
        raise InvalidRow("identical answers")
    return PreferencePair(chosen[:-1], chosen[-1].content, rejected[-1].content)
