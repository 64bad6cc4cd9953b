"""Answers of gpt-oss (https://github.com/openai/harmony): messages in channels, for reasoning, calls and the answer.

<|channel|>analysis<|message|>REASONING<|end|><|start|>assistant<|channel|>final<|message|>ANSWER
<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGUMENTS
"""

import re
from typing import NamedTuple

from anarchobot.inference.tool_calls import Functions, ToolCall, read_call
from anarchobot.tokenizers.chat_template import TRAINING_DAY, ChatTemplate
from anarchobot.tokenizers.conversation import Message

MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>")
FINAL, END_OF_CALL = "<|channel|>final<|message|>", "<|call|>"
_MESSAGE, _ENDS = "<|message|>", ("<|end|>", "<|start|>")
_PROBE = (Message("user", "Hi"), Message("assistant", "Hi"))
_RECIPIENT = re.compile(r"\bto=functions\.([\w.-]+)")


class Reasoning(NamedTuple):
    """Text that is not part of the answer."""

    text: str


def has_channels(template: ChatTemplate) -> bool:
    return f"{FINAL}Hi" in template.render(_PROBE, day=TRAINING_DAY)


class HarmonyParser:
    """Separates an answer, which arrives in pieces, with MARKS as text. See CallParser.

    A call without JSON arguments or of a function that is not in `functions` remains text.
    """

    def __init__(self, functions: Functions) -> None:
        self._functions = functions
        self._held = ""
        self._header: str | None = None  # of the message whose content is next

    def add(self, text: str) -> list[str | Reasoning | ToolCall]:
        """Pieces that are now complete."""
        self._held += text
        return self._parse(is_end=False)

    def finish(self) -> list[str | Reasoning | ToolCall]:
        """What was held back, at the end of the answer."""
        return self._parse(is_end=True)

    def _parse(self, is_end: bool) -> list[str | Reasoning | ToolCall]:
        pieces: list[str | Reasoning | ToolCall] = []
        while True:
            if self._header is None:
                header, mark, rest = self._held.partition(_MESSAGE)
                if not mark:
                    is_text = is_end and self._held and not any(mark in self._held for mark in MARKS)
                    return [*pieces, self._held] if is_text else pieces
                self._header, self._held = header, rest
            ends = [(at, end) for end in _ENDS if (at := self._held.find(end)) >= 0]
            at, end = min(ends, default=(len(self._held), ""))
            is_complete = bool(ends) or is_end
            if is_complete or not self._is_call:
                pieces += self._content(self._held[:at])
                self._held = self._held[at + len(end) :]
            if not ends:
                return pieces
            self._header = None

    @property
    def _is_call(self) -> bool:
        return self._header is not None and _RECIPIENT.search(self._header) is not None

    def _content(self, text: str) -> list[str | Reasoning | ToolCall]:
        recipient = _RECIPIENT.search(self._header or "")
        call = None if recipient is None else read_call(recipient[1], text, self._functions)
        if call is not None or not text:
            return [] if call is None else [call]
        return [Reasoning(text) if "<|channel|>analysis" in (self._header or "") else text]
