"""Tools through the official OpenAI client: the model's template renders them, and its calls come back in OpenAI's
form."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anarchobot.inference.model import Model
from anarchobot.serving.prompts import PromptEncoder
from tests.serving.conftest import RunningServer, run_server
from tests.serving.scripted import chat_model, script
from tests.serving.test_openai_client import client_of
from tests.tokenizers.tool_templates import TOOL, TOOL_TEMPLATES

openai = pytest.importorskip("openai")

PARIS, ROME = {"city": "Paris"}, {"city": "Rome", "days": 2}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TWO = CALL + '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
ASK = [{"role": "user", "content": "Rain?"}]


@pytest.fixture(scope="module")
def tool_model(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Model:
    folder = tmp_path_factory.mktemp("tools") / "run"
    return chat_model(folder, next(tiny_shards.glob("*.model")), TOOL_TEMPLATES["qwen3 tools"])


@pytest.fixture(scope="module")
def tool_server(tool_model: Model) -> Iterator[RunningServer]:
    with run_server(tool_model) as server:
        yield server


@pytest.fixture(scope="module")
def client(tool_server: RunningServer) -> Iterator[Any]:
    with client_of(tool_server) as found:
        yield found


def ask(client: Any, **fields: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "tiny", "messages": ASK, "tools": [TOOL], "seed": 0, "max_tokens": 200} | fields
    )


def streamed(chunks: Any) -> tuple[str, list[tuple[str, str, str]], str]:
    """Text, calls and reason of a streamed answer, as a client puts its deltas together."""
    text, calls, reasons = "", {}, []
    for chunk in chunks:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        for delta in choice.delta.tool_calls or ():
            known = calls.setdefault(delta.index, [delta.id, "", ""])
            known[1] += delta.function.name or ""
            known[2] += delta.function.arguments or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
    (reason,) = reasons
    return text, [tuple(calls[i]) for i in sorted(calls)], reason


@pytest.mark.parametrize(
    ("answer", "content", "arguments"),
    [
        (CALL, None, [PARIS]), (TWO, None, [PARIS, ROME]), (f"Let me see.\n{CALL}", "Let me see.", [PARIS]),
        ("No rain.", "No rain.", []), ("<tool_call>\nno\n</tool_call>", "<tool_call>\nno\n</tool_call>", []),
    ],
)  # fmt: skip
def test_calls(
    client: Any, tool_model: Model, monkeypatch: pytest.MonkeyPatch, answer: str, content: Any, arguments: Any
) -> None:
    script(monkeypatch, tool_model.tokenizer, answer)
    choice = ask(client).choices[0]
    calls = choice.message.tool_calls or []
    assert (choice.message.content, [json.loads(call.function.arguments) for call in calls]) == (content, arguments)
    assert all((call.type, call.function.name, len(call.id)) == ("function", "weather", 9) for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    assert choice.finish_reason == ("tool_calls" if arguments else "stop")
    text, found, reason = streamed(ask(client, stream=True))
    assert (text, reason) == (content or "", choice.finish_reason)
    assert [(name, json.loads(given)) for _, name, given in found] == [("weather", one) for one in arguments]


def test_the_template_renders_tools_calls_and_results(
    client: Any, tool_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    encode = PromptEncoder.encode

    def noted(self: PromptEncoder, parsed: Any, *rest: Any) -> Any:
        encoded = encode(self, parsed, *rest)
        prompts.append(self._model.tokenizer.decode(encoded.prompt.ids))
        return encoded

    monkeypatch.setattr(PromptEncoder, "encode", noted)
    script(monkeypatch, tool_model.tokenizer, CALL, "No.")
    reply = ask(client).choices[0].message
    result = {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": "sun"}
    last = ask(client, messages=[*ASK, reply.model_dump(exclude_none=True), result], seed=1).choices[0]
    assert (last.message.content, last.finish_reason) == ("No.", "stop")
    rendered = json.dumps(TOOL)
    assert all(rendered in prompt for prompt in prompts) and CALL in prompts[1]
    assert "<tool_response>\nsun\n</tool_response>" in prompts[1]
    ask(client, tool_choice="none")
    assert "weather" not in prompts[2]


def test_one_call_if_calls_are_not_parallel(client: Any, tool_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, tool_model.tokenizer, TWO)
    choice = ask(client, parallel_tool_calls=False).choices[0]
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [PARIS]
    assert choice.finish_reason == "tool_calls"
    _, calls, reason = streamed(ask(client, parallel_tool_calls=False, stream=True))
    assert len(calls) == 1 and reason == "tool_calls"


def test_each_choice_has_its_calls(client: Any, tool_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, tool_model.tokenizer, CALL, "No.", TWO)
    choices = ask(client, n=3).choices
    assert [(c.index, c.message.content, len(c.message.tool_calls or ())) for c in choices] == [
        (0, None, 1), (1, "No.", 0), (2, None, 2),
    ]  # fmt: skip
    assert [c.finish_reason for c in choices] == ["tool_calls", "stop", "tool_calls"]


def test_a_call_that_is_cut_off_is_text(client: Any, tool_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, tool_model.tokenizer, CALL)
    choice = ask(client, max_tokens=12).choices[0]
    assert choice.finish_reason == "length" and choice.message.tool_calls is None
    assert choice.message.content.startswith("<tool_call>")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"), ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools"), ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name"),
        ({"messages": [*ASK, {"role": "tool", "tool_call_id": "x", "content": "sun"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [
            {"id": "x", "type": "function", "function": {"name": "f", "arguments": "["}}]}]}, "messages"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)  # fmt: skip
def test_bad_tools_are_named(client: Any, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, **fields)
    assert raised.value.param == param and "\n" not in raised.value.message


def test_a_template_without_tools_rejects_them(server: RunningServer) -> None:
    status, answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": ASK, "tools": [TOOL]})
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "tools", "unsupported_parameter")
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    status, answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": messages})
    assert (status, answer["error"]["param"]) == (400, "messages")
