"""Calls of tools in generated text.

A model writes calls as its chat template does, so the form is read from a rendered call. Supported are the forms whose
calls are JSON: in <tool_call> tags (Hermes, Qwen), as a list after a token (Mistral), or alone as the whole answer
(Llama 3).
"""

import json
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from anarchobot.tokenizers.chat_template import TRAINING_DAY, ChatTemplate
from anarchobot.tokenizers.conversation import InvalidRow, Message, check_encodable
from anarchobot.tokenizers.token_pattern import TokenPattern

OPEN_TAG, CLOSE_TAG = "<tool_call>", "</tool_call>"
_QUESTION, _NAME, _ARGUMENTS = "Which question?", "probe_function", {"x": "y"}
_ARGUMENT_FIELDS = ("arguments", "parameters")


class ToolCall(NamedTuple):
    """`arguments` are a JSON object as text."""

    name: str
    arguments: str


class CallSyntax(NamedTuple):
    """What a model writes for calls: `prefix`, with control tokens, then a JSON object with the fields name and
    `arguments_field`, or a list of such objects, then `suffix`. `opening` and `closing` are what of prefix and suffix
    is in decoded text; without an opening, calls are only at the start of an answer."""

    prefix: str
    suffix: str
    arguments_field: str
    is_list: bool
    opening: str
    closing: str


def call_syntax(template: ChatTemplate, controls: TokenPattern) -> CallSyntax | None:
    """How the template writes calls; None if it has no tools, or calls of another form."""
    function = {"name": _NAME, "description": "A function.", "parameters": {"type": "object", "properties": {}}}
    call = {"type": "function", "id": "call00000", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    messages = (
        Message("tools", "", fields={"tools": [{"type": "function", "function": function}]}),
        Message("user", _QUESTION),
        Message("assistant", "", fields={"tool_calls": [call]}),
    )
    try:
        prompt = template.render(messages[:2], add_generation_prompt=True, day=TRAINING_DAY)
        rendered = template.render(messages, day=TRAINING_DAY)
    except InvalidRow:
        return None
    turn = rendered.rpartition(_QUESTION)[2].removeprefix(prompt.rpartition(_QUESTION)[2])
    start = turn.rfind("{", 0, turn.find(f'"{_NAME}"') + 1)
    if prompt.count(_NAME) == 0 or start < 0:
        return None
    try:
        value, end = json.JSONDecoder().raw_decode(turn, start)
    except ValueError:
        return None
    field = next((name for name in _ARGUMENT_FIELDS if value.get(name) == _ARGUMENTS), None)
    if field is None or value.get("name") != _NAME:
        return None
    before, after = turn[:start], turn[end:]
    if before.rstrip().endswith(OPEN_TAG):
        close = after.find(CLOSE_TAG)
        prefix, suffix = before[before.rindex(OPEN_TAG) :], after[: close + len(CLOSE_TAG)] if close >= 0 else ""
        return CallSyntax(prefix, suffix, field, False, _visible(OPEN_TAG, controls), _visible(suffix, controls))
    is_list = before.rstrip().endswith("[")
    prefix = before.rstrip()[:-1] if is_list else before
    opening = _visible(prefix, controls)
    return None if "{" in opening else CallSyntax(prefix, "", field, is_list, opening, "")


def _visible(text: str, controls: TokenPattern) -> str:
    """What remains of `text` in decoded text, without whitespace around it."""
    position, parts = 0, []
    for match in controls.finditer(text):
        parts.append(text[position : match.start])
        position = match.end
    return "".join([*parts, text[position:]]).strip()


class CallParser:
    """Separates the calls of the functions `names` from the text of an answer, which arrives in pieces.

    Text that may become a call is held back. A call that is not JSON, or of another function, remains text.
    """

    def __init__(self, syntax: CallSyntax, names: Collection[str]) -> None:
        self._syntax, self._names = syntax, names
        self._held = ""
        self._space = ""  # between the text and the opening after it
        self._is_call = self._is_closing = False  # whether what is held follows an opening, or a call
        self._has_text = self._follows_call = False  # whether there was text, and whether the next one follows a call

    def add(self, text: str) -> list[str | ToolCall]:
        """Text and calls that are now complete."""
        self._held += text
        if self._is_call and not any(bracket in text for bracket in "}]"):
            return []
        return list(self._parse(is_end=False))

    def finish(self) -> list[str | ToolCall]:
        """What was held back, at the end of the answer."""
        return list(self._parse(is_end=True))

    def _parse(self, is_end: bool) -> Iterator[str | ToolCall]:
        while True:
            if self._is_closing and not self._skip_closing(is_end):
                return
            if not self._is_call:
                text = self._take_text(is_end)
                if text := text.lstrip() if self._follows_call else text:
                    self._has_text, self._follows_call = True, False
                    yield text
                if not self._is_call:
                    return
            value, end = _read_json(self._held)
            if end < 0 and not is_end:
                return
            calls = self._calls(value) if end >= 0 else None
            taken = end if end >= 0 else len(self._held)
            text = self._space + self._syntax.opening + self._held[:taken]
            self._space, self._held, self._is_call = "", self._held[taken:], False
            if calls is None:
                self._has_text = True
                yield text
            else:
                self._follows_call = self._is_closing = True
                yield from calls

    def _skip_closing(self, is_end: bool) -> bool:
        """Removes the closing after a call. False if it may still be incomplete."""
        rest, closing = self._held.lstrip(), self._syntax.closing
        if not is_end and len(rest) < len(closing) and closing.startswith(rest):
            return False
        if rest.startswith(closing):
            self._held = rest[len(closing) :]
        self._is_closing = False
        return True

    def _take_text(self, is_end: bool) -> str:
        """Removes text before a call from what is held; `_is_call` becomes true where a call may start."""
        held, opening = self._held, self._syntax.opening
        if opening and (at := held.find(opening)) >= 0:
            text = held[:at].rstrip()
            self._space, self._held, self._is_call = held[len(text) : at], held[at + len(opening) :], True
            return text
        if is_end or (self._has_text and not opening):
            end = len(held)
        elif opening:
            partial = max((n for n in range(len(opening)) if held.endswith(opening[:n])), default=0)
            end = len(held[: len(held) - partial].rstrip())
        else:
            start = held.lstrip()
            self._is_call = start.startswith("[" if self._syntax.is_list else "{")
            end = len(held) if start and not self._is_call else 0
        self._held = held[end:]
        return held[:end]

    def _calls(self, value: Any) -> list[ToolCall] | None:
        """None if it is not a call, or a list of calls."""
        calls = []
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict) or item.get("name") not in self._names:
                return None
            arguments = next((item[field] for field in _ARGUMENT_FIELDS if field in item), None)
            if isinstance(arguments, str):
                arguments, _ = _read_json(arguments)
            if not isinstance(arguments, dict):
                return None
            try:
                # Python reads 1e999 as infinity, which JSON has not.
                check_encodable(text := json.dumps(arguments, ensure_ascii=False, allow_nan=False), "arguments")
            except (InvalidRow, ValueError):
                return None
            calls.append(ToolCall(item["name"], text))
        return calls or None


def _read_json(text: str) -> tuple[Any, int]:
    """The JSON value at the start of `text`, and where it ends; -1 if there is none."""
    start = len(text) - len(text.lstrip())
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, -1


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
