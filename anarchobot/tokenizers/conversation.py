"""What every dataset for tuning comes down to: conversations, and pairs of answers of which one is preferred."""

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

# The roles of all datasets by the names that chat templates give them.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class Message(NamedTuple):
    """`role`: system, user or assistant; or text, which is a document by itself and goes through no template."""

    role: str
    content: str


Conversation = tuple[Message, ...]


class Pair(NamedTuple):
    """Two answers to the same prompt, which ends with the user's turn."""

    prompt: Conversation
    chosen: str
    rejected: str


class InvalidRow(ValueError):
    """A row that can't be used: `reason` is what it is counted by, `detail` what is told of the first one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def message(role: Any, content: Any, place: str) -> Message:
    """Raises InvalidRow for a role that is not known and a content that is no text or blank; `place` names the turn."""
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRow("unknown role", f"{role!r} in {place}; known are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise InvalidRow("content is no text", f"{type(content).__name__} in {place}")
    if not content.strip():
        raise InvalidRow("empty content", place)
    check_encodable(content, place)
    return Message(ROLES[role], content)


def check_encodable(text: str, place: str) -> None:
    """Raises InvalidRow for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRow("not UTF-8", f"half of a surrogate pair in {place}") from error


def in_order(messages: Iterable[Message], last: str = "assistant") -> Conversation:
    """The messages, when they are: perhaps a system's, then the user and the assistant in turn, up to `last`. Raises
    InvalidRow when not."""
    conversation = tuple(messages)
    if not conversation:
        raise InvalidRow("empty conversation")
    turns = conversation[1:] if conversation[0].role == "system" else conversation
    for i, turn in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if turn.role != expected:
            raise InvalidRow("roles out of order", f"turn {i + 1} is the {turn.role}'s and should be the {expected}'s")
    if conversation[-1].role != last:
        raise InvalidRow(f"does not end with the {last}", f"the last turn is the {conversation[-1].role}'s")
    return conversation


def key(conversation: Conversation) -> int:
    """64 bits of sha256 over the roles and contents, the same for the same conversation anywhere."""
    sha = hashlib.sha256()
    for role, content in conversation:
        raw = content.encode()
        sha.update(f"{role} {len(raw)}\n".encode())
        sha.update(raw)
    return int.from_bytes(sha.digest()[:8], "big")


def is_held_out(conversation: Conversation, val_fraction: float) -> bool:
    """Whether it belongs to validation: by its own hash, so that adding data moves none."""
    return key(conversation) < val_fraction * 2**64


def parted(chosen: Conversation, rejected: Conversation) -> Pair:
    """One prompt and two answers. Raises InvalidRow for other prompts, and for answers that only white space tells
    apart: templates trim it."""
    if chosen[:-1] != rejected[:-1]:
        raise InvalidRow("answers to different prompts", f"{len(chosen)} and {len(rejected)} turns")
    if chosen[-1].content.strip() == rejected[-1].content.strip():
        raise InvalidRow("equal answers")
    return Pair(chosen[:-1], chosen[-1].content, rejected[-1].content)
