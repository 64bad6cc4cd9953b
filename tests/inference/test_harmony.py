"""Answers of gpt-oss: channels of streamed text."""

import io
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anarchobot.cli.main import main
from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.chat import ChatSession
from anarchobot.inference.harmony import MARKS, HarmonyParser, Reasoning, has_channels
from anarchobot.inference.tool_calls import ToolCall
from anarchobot.tokenizers.chat_template import CHATML, ChatTemplate
from tests.serving.scripted import chat_model, script
from tests.tokenizers.call_templates import CALL_TEMPLATES

FUNCTIONS = {"get.weather": {"type": "object"}}
PARIS = ToolCall("get.weather", '{"city": "Paris"}')
THOUGHT = "<|channel|>analysis<|message|>They ask about Paris.<|end|>"
CALL = '<|start|>assistant<|channel|>commentary to=functions.get.weather <|constrain|>json<|message|>{"city": "Paris"}'
FINAL = "<|start|>assistant<|channel|>final<|message|>It rains <b>."

# As in https://cookbook.openai.com/articles/openai-harmony: reasoning, then a call or an answer; a preamble; a
# recipient before the channel, as in the template.
ANSWERS: list[tuple[str, list[str | Reasoning | ToolCall]]] = [
    (THOUGHT + FINAL, [Reasoning("They ask about Paris."), "It rains <b>."]),
    (FINAL.removeprefix("<|start|>assistant"), ["It rains <b>."]),
    (THOUGHT.removesuffix("<|end|>") + FINAL, [Reasoning("They ask about Paris."), "It rains <b>."]),
    (THOUGHT + CALL, [Reasoning("They ask about Paris."), PARIS]),
    (THOUGHT + CALL + "<|end|>" + CALL, [Reasoning("They ask about Paris."), PARIS, PARIS]),
    (' to=functions.get.weather<|channel|>commentary json<|message|>{"city": "Paris"}', [PARIS]),
    ("<|channel|>commentary<|message|>Let me see.<|end|>" + CALL, ["Let me see.", PARIS]),
    (THOUGHT.removesuffix("Paris.<|end|>"), [Reasoning("They ask about ")]),
    (THOUGHT + "<|start|>assistant<|channel|>fi", [Reasoning("They ask about Paris.")]),
    (CALL.removesuffix("}"), ['{"city": "Paris"']),
    (CALL.replace("get.weather", "other"), ['{"city": "Paris"}']),
    ("No channel.", ["No channel."]),
    ("", []),
]


def parse(text: str, cuts: list[int]) -> list[str | Reasoning | ToolCall]:
    """The pieces of a text that arrives in pieces, with neighbors of one kind joined. Marks arrive whole."""
    parser = HarmonyParser(FUNCTIONS)
    inside = {
        i
        for mark in MARKS
        for at in range(len(text))
        if text.startswith(mark, at)
        for i in range(at + 1, at + len(mark))
    }
    bounds = [0, *sorted({cut % (len(text) + 1) for cut in cuts} - inside), len(text)]
    pieces = [piece for a, b in pairwise(bounds) for piece in parser.add(text[a:b])]
    joined: list[str | Reasoning | ToolCall] = []
    for piece in [*pieces, *parser.finish()]:
        last = joined[-1] if joined else None
        if isinstance(piece, str) and isinstance(last, str):
            joined[-1] = last + piece
        elif isinstance(piece, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + piece.text)
        else:
            joined.append(piece)
    return joined


@pytest.mark.parametrize(("text", "expected"), ANSWERS, ids=range(len(ANSWERS)))
@settings(max_examples=20)
@given(cuts=st.lists(st.integers(0, 10_000), max_size=8))
def test_pieces_however_the_text_arrives(text: str, expected: list[str], cuts: list[int]) -> None:
    assert parse(text, cuts) == parse(text, list(range(len(text)))) == expected


def test_text_and_reasoning_are_streamed() -> None:
    parser = HarmonyParser(FUNCTIONS)
    assert parser.add("<|channel|>analysis<|message|>Th") == [Reasoning("Th")]
    assert parser.add("ey") == [Reasoning("ey")]
    assert parser.add("<|end|><|start|>assistant<|channel|>final<|message|>") == []
    assert parser.add("It") == ["It"]


def test_templates_with_channels() -> None:
    assert [has_channels(ChatTemplate(source, {}, "")) for source in (CALL_TEMPLATES["gpt-oss"], CHATML)] == [
        True,
        False,
    ]


def test_a_chat_shows_answers_without_channels(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reasoning goes to stderr, and is not in the next prompt. The tokens that end a message, a call and an answer end
    generation or are not shown."""
    controls = [*MARKS, "<|return|>", "<|call|>"]
    model = chat_model(tmp_path / "run", next(tiny_shards.glob("*.model")), CALL_TEMPLATES["gpt-oss"], controls)
    script(monkeypatch, model.tokenizer, THOUGHT + FINAL, THOUGHT + FINAL + "<|call|> No.", end="<|return|>")
    session, reasoning = ChatSession(model, GenerationConfig(max_new_tokens=200, seed=0)), list[str]()
    for _ in range(2):
        assert session.answer("Rain?", on_reasoning=reasoning.append) == "It rains <b>."
    assert "".join(reasoning) == 2 * "They ask about Paris."
    assert [message.content for message in session.turns] == ["Rain?", "It rains <b>."] * 2
    monkeypatch.setattr("sys.stdin", io.StringIO("Rain?\n"))
    words = ["chat", "--checkpoint", str(tmp_path / "run"), "--max-new-tokens", "200", "--seed", "0"]
    assert main(words) == 0
    found = capsys.readouterr()
    assert (found.out, found.err) == ("It rains <b>.\n", "They ask about Paris.\n\n")
