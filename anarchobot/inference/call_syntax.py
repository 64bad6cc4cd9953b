"""How a chat template writes calls of tools, which is how its model writes them: read from rendered calls.

Three forms are supported: a JSON object with name and arguments (Hermes, Qwen3, Llama 3, Mistral until 2024), a name
followed by JSON (Mistral since, DeepSeek, gpt-oss), and a name followed by marked-up parameters (Qwen3-Coder, Qwen3.5).
"""

import json
import re
from collections.abc import Collection
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from anarchobot.tokenizers.chat_template import TRAINING_DAY, ChatTemplate
from anarchobot.tokenizers.conversation import InvalidRow, Message

CALL_ID = "call00000"
ARGUMENT_FIELDS = ("arguments", "parameters")
_QUESTION, _NAME = "Which question?", "probe_function"
_KEYS, _VALUES = ("probe_key", "probe_other"), ("probe_value", "probe_text")
_ARGUMENTS = dict(zip(_KEYS, _VALUES, strict=True))
_REASONING = re.compile(r".*?</think>\s*", re.DOTALL)
_SEGMENT = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\s+|[^<\[\s]+|.", re.DOTALL)


class CallSyntax(NamedTuple):
    """What a model writes for calls: `prefix`, calls with `between` between them (None: there can be only one), and
    `suffix`. Control tokens are written by name.

    A call is, by `form`: an "object" with the fields name and `arguments_field`; a name, `separator` and "json"; or a
    name, `separator` and "parameters". `parameter` is what is before the name of a parameter, after it, and after its
    value. In `separator`, CALL_ID stands for the identifier that some models write.
    """

    form: Literal["object", "json", "parameters"]
    prefix: str
    between: str | None
    suffix: str
    arguments_field: str = ""
    separator: str = ""
    parameter: tuple[str, str, str] = ("", "", "")

    @property
    def is_list(self) -> bool:
        return self.form == "object" and self.prefix.rstrip().endswith("[")

    @property
    def openings(self) -> tuple[str, ...]:
        """What may be before a call: what repeats before each, or also what is before the first. Empty if calls are
        only at the start of an answer."""
        prefix = self.prefix.rstrip()[:-1] if self.is_list else self.prefix
        again = "" if self.between is None or self.is_list else common_end(prefix, self.between)
        return tuple(dict.fromkeys(text for text in (prefix, again) if text.strip()))

    @property
    def closings(self) -> tuple[str, ...]:
        """What may be after a call, the longest first."""
        if self.is_list:
            return ()
        again = common_start(self.between or "", self.suffix)
        return tuple(dict.fromkeys(text for text in (self.suffix, again) if text.strip()))

    @property
    def marks(self) -> str:
        """All text that may have control tokens."""
        return "".join([self.prefix, self.between or "", self.suffix, self.separator, *self.parameter])


def call_syntax(template: ChatTemplate, ends: Collection[str]) -> CallSyntax | None:
    """How the template writes calls; None if it has no tools, or calls of another form. `ends`: the names of the tokens
    that end an answer."""
    one, two = _render_calls(template, 1), _render_calls(template, 2)
    call = _find_call(one)
    if call is None:
        return None
    start, end, syntax = call
    between, after, first = None, one[end:], _find_call(two)
    if two.count(_NAME) == 2 and first is not None:
        second = two.rindex(_NAME) - (one.index(_NAME) - start)
        between, after = two[first[1] : second], two[second + end - start :]
    suffix = after[: min((at for text in ends if (at := after.find(text)) >= 0), default=len(after))]
    if "{" in one[:start] or (syntax.form == "parameters" and not suffix.strip()):
        return None
    return syntax._replace(prefix=one[:start], between=between, suffix=suffix)


def _render_calls(template: ChatTemplate, count: int) -> str:
    """An answer of `count` calls without reasoning. Empty if the template rejects it, or leaves out tools."""
    function = {"name": _NAME, "description": "A function.", "parameters": {"type": "object", "properties": {}}}
    call = {"type": "function", "id": CALL_ID, "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    messages = (
        Message("tools", "", fields={"tools": [{"type": "function", "function": function}]}),
        Message("user", _QUESTION),
        Message("assistant", "", fields={"tool_calls": [call] * count}),
    )
    try:
        prompt = template.render(messages[:2], add_generation_prompt=True, day=TRAINING_DAY)
        rendered = template.render(messages, day=TRAINING_DAY)
    except InvalidRow:
        return ""
    answer, start = (text.rpartition(_QUESTION)[2] for text in (rendered, prompt))
    return _REASONING.sub("", answer.removeprefix(common_start(answer, start)), count=1) if _NAME in prompt else ""


def _find_call(text: str) -> tuple[int, int, CallSyntax] | None:
    """Where the first call starts and ends, and its syntax without what is around calls."""
    at = text.find(_NAME)
    after = at + len(_NAME)
    if at > 0 and text[at - 1] == '"':
        start = text.rfind("{", 0, at)
        value, end = _read_json(text, start)
        field = next((f for f in ARGUMENT_FIELDS if isinstance(value, dict) and value.get(f) == _ARGUMENTS), None)
        return None if field is None else (start, end, CallSyntax("object", "", None, "", field))
    if (brace := text.find("{", after)) >= 0:
        value, end = _read_json(text, brace)
        syntax = CallSyntax("json", "", None, "", separator=text[after:brace])
        return (at, end, syntax) if at >= 0 and value == _ARGUMENTS else None
    pattern = "(.+?)".join(map(re.escape, (_NAME, _KEYS[0], _VALUES[0], _KEYS[1], _VALUES[1])))
    found = re.compile(pattern, re.DOTALL).search(text)
    if found is None:
        return None
    before, middle, between, _ = found.groups()
    opening = common_end(before, between)
    closing = between.removesuffix(opening)
    if not (opening and closing and text.startswith(closing, found.end())):
        return None
    syntax = CallSyntax(
        "parameters", "", None, "", "", before.removesuffix(opening), parameter=(opening, middle, closing)
    )
    return at, found.end() + len(closing), syntax


def common_start(a: str, b: str) -> str:
    """What both texts start with, in whole tags and words."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(_SEGMENT.findall(a), _SEGMENT.findall(b), strict=False))
    return "".join(segment for segment, _ in same)


def common_end(a: str, b: str) -> str:
    """What both texts end with, in whole tags and words."""
    pairs = zip(_SEGMENT.findall(a)[::-1], _SEGMENT.findall(b)[::-1], strict=False)
    same = [segment for segment, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return "".join(same[::-1])


def _read_json(text: str, start: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except ValueError:
        return None, -1
