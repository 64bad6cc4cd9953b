"""How templates write calls, and calls found in streamed text; mlx-lm's parsers find the same calls."""

import importlib
import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anarchobot.inference.call_syntax import CallSyntax, call_syntax
from anarchobot.inference.tool_calls import CallParser, ToolCall
from anarchobot.tokenizers.chat_template import CHATML, PLAIN, ChatTemplate
from tests.tokenizers.call_templates import CALL_TEMPLATES
from tests.tokenizers.tool_templates import TOOL_TEMPLATES

TEMPLATES = TOOL_TEMPLATES | CALL_TEMPLATES
ENDS = ("<|im_end|>", "<|eot_id|>", "</s>", "<｜end▁of▁sentence｜>", "<|call|>", "<|return|>", "<|user|>")
HERMES = CallSyntax("object", "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", "arguments")
LLAMA = CallSyntax("object", "", None, "", "parameters")
MISTRAL = CallSyntax("object", "<|system|>[", ", ", "]", "arguments")
MISTRAL_ARGS = CallSyntax("json", "[TOOL_CALLS]", "[TOOL_CALLS]", "", separator="[ARGS]")
MISTRAL_IDS = MISTRAL_ARGS._replace(separator="[CALL_ID]call00000[ARGS]")
DEEPSEEK = CallSyntax(
    "json", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>", separator="\n```json\n",
)  # fmt: skip
DEEPSEEK_31 = CallSyntax(
    "json", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "<｜tool▁call▁end｜><｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>", separator="<｜tool▁sep｜>",
)  # fmt: skip
HARMONY = CallSyntax("json", " to=functions.", None, "", separator="<|channel|>commentary json<|message|>")
CODER = CallSyntax(
    "parameters", "<tool_call>\n<function=", "\n</function>\n</tool_call>\n<tool_call>\n<function=",
    "\n</function>\n</tool_call>", separator=">", parameter=("\n<parameter=", ">\n", "\n</parameter>"),
)  # fmt: skip
GLM = CallSyntax(
    "parameters", "\n\n<tool_call>", "\n</tool_call>\n<tool_call>", "\n</tool_call>",
    parameter=("\n<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>"),
)  # fmt: skip
SYNTAXES = {
    "qwen3 tools": HERMES, "qwen3 tools marked": HERMES, "llama tools": LLAMA, "mistral tools": MISTRAL,
    "qwen3.5 tools": CODER, "qwen3.5 tools marked": CODER, "mistral args": MISTRAL_ARGS, "mistral ids": MISTRAL_IDS,
    "deepseek v3": DEEPSEEK, "deepseek v3.1": DEEPSEEK_31, "gpt-oss": HARMONY, "glm": GLM,
    "deepseek tools": None, "harmony": None,
}  # fmt: skip
# The last parameters of `weather` are of all kinds of types.
TYPES: dict[str, Any] = {
    "city": {"type": "string"}, "days": {"type": "integer"}, "x": {"type": "number"}, "wet": {"type": "boolean"},
    "tags": {"type": "array"}, "at": {"type": "object"}, "any": {"title": "T"}, "maybe": {"type": ["string", "null"]},
    "count": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
}  # fmt: skip
FUNCTIONS = {"weather": {"type": "object", "properties": TYPES}}
PARIS = ToolCall("weather", '{"city": "Paris"}')
ROME = ToolCall("weather", '{"city": "</tool_call> \\"}{", "x": [1, {"y": null}]}')


def syntax_of(source: str) -> CallSyntax | None:
    return call_syntax(ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, "template"), ENDS)


@pytest.mark.parametrize("name", SYNTAXES)
def test_syntax_of_templates(name: str) -> None:
    assert syntax_of(TEMPLATES[name]) == SYNTAXES[name]


def test_syntax_of_templates_without_tools_or_with_other_calls() -> None:
    assert syntax_of(CHATML) is syntax_of(PLAIN) is syntax_of("{{ raise_exception('no') }}") is None
    assert syntax_of(TOOL_TEMPLATES["llama tools"].replace('\'{"name"', '\'{"function": {"name"')) is None
    assert syntax_of(TOOL_TEMPLATES["qwen3.5 tools"].replace("value | tojson }}", "value | string }}")) == CODER
    assert syntax_of(TOOL_TEMPLATES["qwen3.5 tools"].replace("value if value is string", "'x' if value")) is None


def written(syntax: CallSyntax, *calls: ToolCall) -> str:
    """The text of calls."""
    return f"{syntax.prefix}{(syntax.between or '').join(_body(syntax, call) for call in calls)}{syntax.suffix}"


def _body(syntax: CallSyntax, call: ToolCall) -> str:
    if syntax.form == "object":
        return f'{{"name": "{call.name}", "{syntax.arguments_field}": {call.arguments}}}'
    if syntax.form == "json":
        return f"{call.name}{syntax.separator}{call.arguments}"
    before, middle, after = syntax.parameter
    values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in json.loads(call.arguments).items()}
    items = "".join(f"{before}{key}{middle}{value}{after}" for key, value in values.items())
    return f"{call.name}{syntax.separator}{items}"


def parse(syntax: CallSyntax, text: str, cuts: list[int]) -> list[str | ToolCall]:
    """The parts of a text that arrives in pieces, with texts joined."""
    parser = CallParser(syntax, FUNCTIONS)
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    parts = [part for a, b in pairwise(bounds) for part in parser.add(text[a:b])]
    joined: list[str | ToolCall] = []
    for part in [*parts, *parser.finish()]:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


NAMED = (MISTRAL_ARGS, MISTRAL_IDS, DEEPSEEK, DEEPSEEK_31, CODER, GLM)
OTHER, EMPTY = ToolCall("other", "{}"), ToolCall("weather", "{}")
TYPED = ToolCall("weather", '{"city": "Rome", "days": 3, "wet": true, "at": {"y": [null]}}')


NAN = 'weather", "arguments": {"x": NaN}}'
ANSWERS: list[tuple[CallSyntax, str, list[str | ToolCall]]] = [
    (HERMES, "", []),
    (HERMES, "No <tool> here. ", ["No <tool> here. "]),
    (HERMES, "A <tool_call", ["A <tool_call"]),
    (HERMES, written(HERMES, PARIS), [PARIS]),
    (HERMES, "Let me see.\n\n" + written(HERMES, PARIS, ROME) + "\n", ["Let me see.", PARIS, ROME]),
    (HERMES, written(HERMES, PARIS) + "\nDone.", [PARIS, "Done."]),
    (HERMES, written(HERMES, PARIS).removesuffix("</tool_call>"), [PARIS]),
    (HERMES, written(HERMES, PARIS).removesuffix("call>"), [PARIS]),
    (HERMES, "<tool_call>\nnot JSON\n</tool_call>", ["<tool_call>\nnot JSON\n</tool_call>"]),
    (HERMES, '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
     ['<tool_call>{"name": "other", "arguments": {}}</tool_call>']),
    (HERMES, '<tool_call>{"name": "' + NAN, ['<tool_call>{"name": "' + NAN]),
    (HERMES, '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', [PARIS]),
    (HERMES, '<tool_call>{"name": "weather", "arguments": {"city": "\\ud800"}}</tool_call>',
     ['<tool_call>{"name": "weather", "arguments": {"city": "\\ud800"}}</tool_call>']),
    (LLAMA, written(LLAMA, PARIS), [PARIS]),
    (LLAMA, written(LLAMA, ROME), [ROME]),
    (LLAMA, "It is " + written(LLAMA, PARIS), ["It is " + written(LLAMA, PARIS)]),
    (LLAMA, '{"a": 1} is JSON', ['{"a": 1} is JSON']),
    (LLAMA, '{"name": "weather"', ['{"name": "weather"']),
    (LLAMA, "{" * 2000, ["{" * 2000]),
    (MISTRAL, written(MISTRAL, PARIS, ROME), [PARIS, ROME]),
    (MISTRAL, "[1, 2]", ["[1, 2]"]),
    (MISTRAL, "[]", ["[]"]),
    (MISTRAL, "[" * 5000 + "]", ["[" * 5000 + "]"]),
    (MISTRAL, "<|system|>" + "[" * 5000 + "]", ["<|system|>" + "[" * 5000 + "]"]),
    *((syntax, f"Let me see. {written(syntax, PARIS, ROME)}\n", ["Let me see.", PARIS, ROME]) for syntax in NAMED),
    *((syntax, written(syntax, PARIS) + "Done.", [PARIS, "Done."]) for syntax in NAMED),
    (MISTRAL_ARGS, written(MISTRAL_ARGS, OTHER, PARIS), ["[TOOL_CALLS]other[ARGS]{}", PARIS]),
    (CODER, written(CODER, OTHER) + written(CODER, PARIS), [written(CODER, OTHER), PARIS]),
    *((syntax, written(syntax, EMPTY), [EMPTY]) for syntax in NAMED),
    (MISTRAL_IDS, '[TOOL_CALLS] weather[CALL_ID]aB3dE6gH9[ARGS] {"city": "Paris"}', [PARIS]),
    (MISTRAL_ARGS, "[TOOL_CALLS]weather[ARGS]Paris", ["[TOOL_CALLS]weather[ARGS]Paris"]),
    (MISTRAL_ARGS, '[TOOL_CALLS]weather{"city": "Paris"}', ['[TOOL_CALLS]weather{"city": "Paris"}']),
    (DEEPSEEK, written(DEEPSEEK, PARIS).removesuffix("<｜tool▁calls▁end｜>"), [PARIS]),
    (CODER, "<tool_call><function=weather><parameter=city>Paris</parameter></function></tool_call>", [PARIS]),
    (CODER, written(CODER, PARIS).partition("</function>")[0], [written(CODER, PARIS).partition("</function>")[0]]),
    (CODER, "<tool_call>\n{}\n</tool_call>", ["<tool_call>\n{}\n</tool_call>"]),
]  # fmt: skip


@pytest.mark.parametrize(("syntax", "text", "expected"), ANSWERS, ids=range(len(ANSWERS)))
@settings(max_examples=20)
@given(cuts=st.lists(st.integers(0, 10_000), max_size=8))
def test_calls_are_found_however_the_text_arrives(
    syntax: CallSyntax, text: str, expected: list[str | ToolCall], cuts: list[int]
) -> None:
    assert parse(syntax, text, cuts) == expected
    if len(text) < 300:
        assert parse(syntax, text, list(range(len(text)))) == expected


def test_text_is_held_back_only_while_it_may_become_a_call() -> None:
    parser = CallParser(HERMES, FUNCTIONS)
    assert parser.add("Hello <") == ["Hello"]
    assert parser.add("b> <tool") == [" <b>"]
    assert parser.add("_bar>") == [" <tool_bar>"]
    assert CallParser(LLAMA, FUNCTIONS).add("Hello ") == ["Hello "]


@given(st.text(alphabet='<tool_call>/{}[]"name:weatherguments= ,\n', max_size=60))
def test_nothing_is_lost(text: str) -> None:
    """Without a call, the text is what it was."""
    for syntax in (HERMES, LLAMA, MISTRAL, CODER):
        parts = parse(syntax, text, [3, 7, 20])
        if not any(isinstance(part, ToolCall) for part in parts):
            assert "".join(map(str, parts)) == text


def test_arguments_are_json() -> None:
    for call in (PARIS, ROME):
        assert isinstance(json.loads(call.arguments), dict)


VALUES = {
    "city": ["Paris", "5", "true", " two\n  lines\n", '{"a": 1}', "a </parameter> b", "<x>&amp;</x>", ""],
    "days": ["3", "-1", "3.0", "three"], "x": ["1.5", "2"], "wet": ["true", "False", "True"],
    "tags": ['["a", "ü"]', "[]"], "at": ['{"b": [1, null]}', '{"b": "two\nlines"}'],
    "any": ["text", "5", "[1]", '{"a": true}'], "unknown": ["text", "5", "[1]"],
    "maybe": ["null", "5", "text"], "count": ["5", "null"],
}  # fmt: skip
# mlx-lm raises for the first, and takes the others literally: it does not know unions of types.
DIFFERENT: dict[tuple[str, str], Any] = {
    ("days", "three"): "three", ("city", "a </parameter> b"): "a </parameter> b", ("maybe", "5"): "5",
    ("count", "5"): 5,
}  # fmt: skip


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, texts in VALUES.items() for text in texts])
def test_parameters_have_the_types_of_their_schema(key: str, text: str) -> None:
    body = f"<function=weather>\n<parameter={key}>\n{text}\n</parameter>\n</function>"
    (found,) = parse(CODER, f"<tool_call>\n{body}\n</tool_call>", [20, 41, 60])
    assert isinstance(found, ToolCall)
    value = json.loads(found.arguments)[key]
    if (key, text) in DIFFERENT:
        assert value == DIFFERENT[key, text]
    else:
        assert json.dumps({key: value}) == json.dumps(theirs("qwen3_coder", body)[0]["arguments"])  # 3.0 is not 3


def theirs(parser: str, text: str) -> list[dict[str, Any]]:
    """The calls that mlx-lm finds."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    found = module.parse_tool_call(
        text, [{"type": "function", "function": {"name": "weather", "parameters": FUNCTIONS["weather"]}}]
    )
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize(
    ("parser", "syntax", "calls"),
    [
        ("json_tools", HERMES, [ROME]), ("qwen3_coder", CODER, [TYPED]), ("glm47", GLM, [TYPED]),
        ("mistral", MISTRAL, [PARIS, ROME]), ("mistral", MISTRAL_ARGS, [PARIS, ROME, EMPTY]),
    ],
)  # fmt: skip
def test_mlx_lm_finds_the_same_calls(parser: str, syntax: CallSyntax, calls: list[ToolCall]) -> None:
    text = written(syntax, *calls)
    found = [call for call in parse(syntax, text, [5, 50]) if isinstance(call, ToolCall)]
    marks = r"^\s*<tool_call>|</tool_call>$|^<\|system\|>"  # what mlx-lm's server removes
    expected = theirs(parser, re.sub(marks, "", text))
    assert [(call.name, json.loads(call.arguments)) for call in found] == [
        (c["name"], c["arguments"]) for c in expected
    ]
    assert len(found) == len(calls)
