"""Tools and calls in datasets to OpenAI's form, which chat templates expect.

Datasets have them as objects or as JSON text, in a list or alone, with {"type": "function", "function": ...} around
them or without.
"""

from typing import Any

import orjson

from anarchobot.data.sources.rows import Row
from anarchobot.tokenizers.conversation import InvalidRow, check_json

CALL_ROLES = ("function_call", "tool_call")  # of ShareGPT; such a message is a call as JSON
_FIELDS = ("id", "type", "function", "name", "arguments")  # of a call


def parse_tools(value: Any, place: str) -> list[Row]:
    """[{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}]. Raises InvalidRow."""
    tools = []
    for item in _list(value, place):
        tool, function = _parsed(item, place), _function(item, place)
        bare = {name: value for name, value in function.items() if name != "type"}
        tools.append(tool if function is not tool else {"type": "function", "function": bare})
    check_json(tools, place)
    return tools


def parse_calls(value: Any, place: str) -> list[Row]:
    """[{"type": "function", "function": {"name": ..., "arguments": {...}}}], with an `id` if there is one. Raises
    InvalidRow."""
    calls = []
    for item in _list(value, place):
        function = _function(item, place)
        arguments = _parsed(function.get("arguments"), place) or {}
        if not isinstance(arguments, dict):
            raise InvalidRow("malformed tool call", f"'arguments' in {place}: expected an object")
        identity = {"id": item["id"]} if isinstance(item, dict) and isinstance(item.get("id"), str) else {}
        named = {"name": function["name"], "arguments": arguments}
        calls.append({"type": "function", **identity, "function": named})
    check_json(calls, place)
    return calls


def unused_fields(value: Any) -> set[str]:
    """The names of fields of calls that are not used."""
    try:
        calls = [_parsed(item, "") for item in _list(value, "")]
    except InvalidRow:  # in a field that is not used
        return set()
    objects = [call for call in calls if isinstance(call, dict)]
    objects += [call["function"] for call in objects if isinstance(call.get("function"), dict)]
    return {name for one in objects for name in one if name not in _FIELDS}


def _list(value: Any, place: str) -> list[Any]:
    parsed = _parsed(value, place)
    return parsed if isinstance(parsed, list) else [] if parsed in (None, "") else [parsed]


def _function(item: Any, place: str) -> Row:
    parsed = _parsed(item, place)
    function = parsed.get("function", parsed) if isinstance(parsed, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InvalidRow("malformed tool call", f"{place}: expected an object with a name, got {str(item)[:80]!r}")
    return function


def _parsed(value: Any, place: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return None if value == "" else value
    try:
        return orjson.loads(value)
    except ValueError as error:
        raise InvalidRow("malformed tool call", f"{place}: not JSON: {error}") from error
