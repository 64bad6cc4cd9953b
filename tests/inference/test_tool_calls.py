"""How templates write calls, and calls found in streamed text."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anarchobot.inference.tool_calls import CallParser, CallSyntax, ToolCall, call_syntax
from anarchobot.tokenizers.chat_template import CHATML, PLAIN, ChatTemplate
from anarchobot.tokenizers.token_pattern import TokenPattern
from tests.tokenizers.tool_templates import TOOL_TEMPLATES

CONTROLS = TokenPattern(
    tuple({"content": name} for name in ("<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|end|>", "</s>"))
)
HERMES = CallSyntax("<tool_call>\n", "\n</tool_call>", "arguments", False, "<tool_call>", "</tool_call>")
LLAMA = CallSyntax("", "", "parameters", False, "", "")
MISTRAL = CallSyntax("<|system|>", "", "arguments", True, "", "")
PARIS = ToolCall("weather", '{"city": "Paris"}')
ROME = ToolCall("weather", '{"city": "</tool_call> \\"}{", "x": [1, {"y": null}]}')


def syntax_of(source: str) -> CallSyntax | None:
    return call_syntax(ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, "template"), CONTROLS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3 tools", HERMES), ("qwen3 tools marked", HERMES), ("llama tools", LLAMA), ("mistral tools", MISTRAL),
        ("qwen3.5 tools", None), ("deepseek tools", None), ("harmony", None),
    ],
)  # fmt: skip
def test_syntax_of_templates(name: str, expected: CallSyntax | None) -> None:
    assert syntax_of(TOOL_TEMPLATES[name]) == expected


def test_syntax_of_templates_without_tools_or_tokens_for_them() -> None:
    assert syntax_of(CHATML) is syntax_of(PLAIN) is syntax_of("{{ raise_exception('no') }}") is None
    assert syntax_of(TOOL_TEMPLATES["llama tools"].replace('\'{"name"', '\'{"function": {"name"')) is None
    text = syntax_of(TOOL_TEMPLATES["mistral tools"].replace("<|system|>[", "[TOOL_CALLS]["))
    assert text == CallSyntax("[TOOL_CALLS]", "", "arguments", True, "[TOOL_CALLS]", "")


def written(syntax: CallSyntax, *calls: ToolCall) -> str:
    """The decoded text of calls."""
    objects = [f'{{"name": "{c.name}", "{syntax.arguments_field}": {c.arguments}}}' for c in calls]
    if syntax.is_list:
        return f"{syntax.opening}[{', '.join(objects)}]"
    return "\n".join(f"{syntax.opening}\n{one}\n{syntax.closing}".strip() for one in objects)


def parse(syntax: CallSyntax, text: str, cuts: list[int]) -> list[str | ToolCall]:
    """The parts of a text that arrives in pieces, with texts joined."""
    parser = CallParser(syntax, ["weather"])
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    parts = [part for a, b in pairwise(bounds) for part in parser.add(text[a:b])]
    joined: list[str | ToolCall] = []
    for part in [*parts, *parser.finish()]:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


NAN = 'weather", "arguments": {"x": NaN}}'
ANSWERS: list[tuple[CallSyntax, str, list[str | ToolCall]]] = [
    (HERMES, "", []),
    (HERMES, "No <tool> here. ", ["No <tool> here. "]),
    (HERMES, "A <tool_call", ["A <tool_call"]),
    (HERMES, written(HERMES, PARIS), [PARIS]),
    (HERMES, "Let me see.\n\n" + written(HERMES, PARIS, ROME) + "\n", ["Let me see.", PARIS, ROME]),
    (HERMES, written(HERMES, PARIS) + "\nDone.", [PARIS, "Done."]),
    (HERMES, written(HERMES, PARIS).removesuffix("</tool_call>"), [PARIS]),
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
    parser = CallParser(HERMES, ["weather"])
    assert parser.add("Hello <") == ["Hello"]
    assert parser.add("b> <tool") == [" <b>"]
    assert parser.add("_bar>") == [" <tool_bar>"]
    assert CallParser(LLAMA, ["weather"]).add("Hello ") == ["Hello "]


@given(st.text(alphabet='<tool_call>/{}[]"name:weatherguments ,\n', max_size=60))
def test_nothing_is_lost(text: str) -> None:
    """Without a call, the text is what it was."""
    for syntax in (HERMES, LLAMA, MISTRAL):
        parts = parse(syntax, text, [3, 7, 20])
        if not any(isinstance(part, ToolCall) for part in parts):
            assert "".join(map(str, parts)) == text


def test_arguments_are_json() -> None:
    for call in (PARIS, ROME):
        assert isinstance(json.loads(call.arguments), dict)
