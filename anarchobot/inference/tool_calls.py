"""Calls of tools in generated text."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from anarchobot.inference.call_syntax import ARGUMENT_FIELDS, CALL_ID, CallSyntax
from anarchobot.tokenizers.conversation import InvalidRow, check_encodable

_NAME = r"\s*([^\s<>\[\]{}\"`]+)"
_JSON_TYPES = {
    bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, type(None): {"null"}, list: {"array"},
    dict: {"object"},
}  # fmt: skip
_PYTHON_CONSTANTS = {"true": True, "false": False, "none": None}  # in lowercase; some templates print them

Functions = Mapping[str, Mapping[str, Any]]  # by name, the JSON schema of the parameters


class ToolCall(NamedTuple):
    """`arguments` are a JSON object as text."""

    name: str
    arguments: str


class CallParser:
    """Separates the calls of `functions` from the text of an answer, which arrives in pieces.

    Text that may become a call is held back. A call that is incomplete, or of another function, remains text.
    """

    def __init__(self, syntax: CallSyntax, functions: Functions) -> None:
        self._syntax, self._functions = syntax, functions
        # The first word of each opening begins a call; what follows it there is before the name or the object.
        head = (
            "" if syntax.form == "object" else _NAME + r"\s*" + _pattern(syntax.separator).replace(CALL_ID, r"[\w-]+")
        )
        openings = [text.split() for text in syntax.openings]
        self._heads = {words[0]: re.compile(r"\s*" + _pattern(" ".join(words[1:])) + head) for words in openings}
        self._heads = self._heads or {"": re.compile(head)}
        self._closings = [("".join(text.split()), re.compile(r"\s*" + _pattern(text))) for text in syntax.closings]
        self._held = ""
        self._opening, self._space = "", ""  # of the call that is held, and the space before it
        self._is_call = self._is_closing = False  # whether what is held follows an opening, or a call
        self._has_text = self._follows_call = False  # whether there was text, and whether the next one follows a call

    def add(self, text: str) -> list[str | ToolCall]:
        """Text and calls that are now complete."""
        self._held += text
        if self._is_call and not any(bracket in text for bracket in "}]>"):
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
            calls, end = self._read_calls()
            if end < 0 and not is_end:
                return
            taken = end if end >= 0 else len(self._held)
            text = self._space + self._opening + self._held[:taken]
            self._space, self._held, self._is_call = "", self._held[taken:], False
            if calls is None:
                self._has_text = True
                yield text
            else:
                self._follows_call = self._is_closing = True
                yield from calls

    def _skip_closing(self, is_end: bool) -> bool:
        """Removes the closing after a call. False if it may still be incomplete."""
        held = "".join(self._held.split())
        for closing, pattern in self._closings:
            if found := pattern.match(self._held):
                self._held = self._held[found.end() :]
                break
            if closing.startswith(held):
                if not is_end:
                    return False
                self._held = ""
        self._is_closing = False
        return True

    def _take_text(self, is_end: bool) -> str:
        """Removes text before a call from what is held; `_is_call` becomes true where a call may start."""
        held = self._held
        openings = [word for word in self._heads if word]
        if places := [(at, -len(word), word) for word in openings if (at := held.find(word)) >= 0]:
            at, _, self._opening = min(places)
            text = held[:at].rstrip()
            self._space, self._held, self._is_call = held[len(text) : at], held[at + len(self._opening) :], True
            return text
        if is_end or (self._has_text and not openings):
            end = len(held)
        elif openings:
            partial = max(n for word in openings for n in range(len(word)) if held.endswith(word[:n]))
            end = len(held[: len(held) - partial].rstrip())
        else:
            start = held.lstrip()
            self._is_call = start.startswith("[" if self._syntax.is_list else "{")
            end = len(held) if start and not self._is_call else 0
        self._held = held[end:]
        return held[:end]

    def _read_calls(self) -> tuple[list[ToolCall] | None, int]:
        """The calls at the start of what is held, and where they end: -1 if they are incomplete. None if they are no
        calls."""
        head = self._heads[self._opening].match(self._held)
        if head is None:
            return None, -1
        if self._syntax.form == "parameters":
            texts, end = self._read_parameters(head.end())
            calls = [read_call(head[1], self._typed(head[1], texts), self._functions)] if end >= 0 else []
        else:
            value, end = _read_json(self._held, head.end())
            if self._syntax.form == "json":
                calls = [read_call(head[1], value, self._functions)]
            else:
                calls = [_read_object(one, self._functions) for one in (value if isinstance(value, list) else [value])]
        found = [call for call in calls if call is not None]
        return (found if found and len(found) == len(calls) else None), end

    def _read_parameters(self, at: int) -> tuple[dict[str, str], int]:
        """The values by name, and where they end; -1 if the closing does not follow yet."""
        before, middle, after = self._syntax.parameter
        end = _pattern(self._syntax.suffix.split()[0])
        line = r"\n?"  # templates put a value between two newlines
        name = re.compile(rf"\s*{_pattern(before)}\s*([^<>\s]+?)\s*{_pattern(middle)}{line}")
        close = re.compile(rf"{line}{_pattern(after)}(?=\s*(?:{_pattern(before)}|{end}))")
        values = {}
        while found := name.match(self._held, at):
            closing = close.search(self._held, found.end())
            if closing is None:
                return {}, -1
            values[found[1]] = self._held[found.end() : closing.start()]
            at = closing.end()
        return values, at if re.compile(rf"\s*{end}").match(self._held, at) else -1

    def _typed(self, name: str, values: dict[str, str]) -> dict[str, Any]:
        properties = self._functions.get(name, {}).get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        return {key: _typed(text, properties[key]) if key in properties else text for key, text in values.items()}


def read_call(name: object, arguments: object, functions: Functions) -> ToolCall | None:
    """A call with these arguments, which may also be a JSON object as text. None if it is not one of `functions`."""
    if isinstance(arguments, str):
        arguments, _ = _read_json(arguments)
    if not isinstance(name, str) or name not in functions or not isinstance(arguments, dict):
        return None
    try:
        # Python reads 1e999 as infinity, which JSON has not.
        check_encodable(text := json.dumps(arguments, ensure_ascii=False, allow_nan=False), "arguments")
    except (InvalidRow, ValueError):
        return None
    return ToolCall(name, text)


def _read_object(value: object, functions: Functions) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    arguments = next((value[field] for field in ARGUMENT_FIELDS if field in value), None)
    return read_call(value.get("name"), arguments, functions)


def _pattern(text: str) -> str:
    """A regular expression for `text` with any whitespace between its words."""
    return r"\s*".join(map(re.escape, text.split()))


def _typed(text: str, schema: Any) -> Any:
    """The value of a parameter, whose type is in its schema only: a text, or anything else as JSON."""
    types = value_types(schema)
    value, end = _read_json(text)
    if end < 0 or text[end:].strip():
        value = _PYTHON_CONSTANTS.get(text.strip().lower(), text)
    if isinstance(value, float) and "integer" in types and value.is_integer():
        value = int(value)
    fits = _JSON_TYPES.get(type(value), set()) & (types or {"array", "object"})
    return value if fits or (types and "string" not in types) else text


def value_types(schema: Any) -> set[str]:
    """The JSON types that a schema names."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    types = {one for one in (named if isinstance(named, list) else [named]) if isinstance(one, str)}
    for alternatives in (schema.get("anyOf"), schema.get("oneOf")):
        types = types.union(*map(value_types, alternatives if isinstance(alternatives, list) else []))
    return types


def _read_json(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value in text[start:], and where it ends; -1 if there is none."""
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, -1


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant, strict=False)
