"""Calls and reasoning in the forms of several model families, through OpenAI's official client and Anthropic's form."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anarchobot.inference.model import Model
from anarchobot.inference.tool_calls import ToolCall
from anarchobot.serving.prompts import PromptEncoder
from tests.inference.test_tool_calls import CODER, DEEPSEEK_31, MISTRAL_IDS, written
from tests.serving.conftest import RunningServer, run_server
from tests.serving.scripted import chat_model, script
from tests.serving.test_messages import ASK as MESSAGES_ASK
from tests.serving.test_messages import TOOL as MESSAGES_TOOL
from tests.serving.test_messages import events, message_of, without_ids
from tests.serving.test_openai_client import client_of
from tests.serving.test_tools import ASK, ask, streamed
from tests.tokenizers.call_templates import CALL_TEMPLATES
from tests.tokenizers.tool_templates import TOOL, TOOL_TEMPLATES

pytest.importorskip("openai")

PARIS, ROME = {"city": "Paris"}, {"city": "Rome", "days": 2}
HARMONY_MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
DEEPSEEK_MARKS = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    "<｜end▁of▁sentence｜>",
)  # fmt: skip
THOUGHT = "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Paris"}'
FORMS: dict[str, tuple[str, tuple[str, ...], str]] = {  # template, control tokens, end of turn
    "qwen3.5": (TOOL_TEMPLATES["qwen3.5 tools"], (), "<|im_end|>"),
    "mistral": (CALL_TEMPLATES["mistral ids"], ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[INST]", "[/INST]"), "</s>"),
    "deepseek": (CALL_TEMPLATES["deepseek v3.1"], DEEPSEEK_MARKS, "<｜end▁of▁sentence｜>"),
    "gpt-oss": (CALL_TEMPLATES["gpt-oss"], HARMONY_MARKS, "<|return|>"),
}


def model_of(name: str, folder: Path, shards: Path) -> Model:
    template, controls, _ = FORMS[name]
    return chat_model(folder / "run", next(shards.glob("*.model")), template, controls)


@pytest.mark.parametrize(("name", "syntax"), [("qwen3.5", CODER), ("mistral", MISTRAL_IDS), ("deepseek", DEEPSEEK_31)])
def test_calls(name: str, syntax: Any, tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name, tmp_path, tiny_shards)
    calls = [ToolCall("weather", json.dumps(one)) for one in (PARIS, ROME)]
    script(monkeypatch, model.tokenizer, f"Let me see. {written(syntax, *calls)}", end=FORMS[name][2])
    with run_server(model) as server, client_of(server) as client:
        choice = ask(client).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
        assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [PARIS, ROME]
        text, found, reason = streamed(ask(client, stream=True))
        assert (text, reason) == ("Let me see.", "tool_calls")
        assert [json.loads(arguments) for _, _, arguments in found] == [PARIS, ROME]
        sent = choice.message.model_dump(exclude_none=True)
        results = [{"role": "tool", "tool_call_id": call.id, "content": "sun"} for call in choice.message.tool_calls]
        again = ask(client, messages=[*ASK, sent, *results], max_tokens=1)
        assert again.usage.prompt_tokens > ask(client, max_tokens=1).usage.prompt_tokens


@pytest.fixture(scope="module")
def oss_model(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Model:
    return model_of("gpt-oss", tmp_path_factory.mktemp("oss"), tiny_shards)


@pytest.fixture(scope="module")
def oss_server(oss_model: Model) -> Iterator[RunningServer]:
    with run_server(oss_model) as server:
        yield server


@pytest.fixture(scope="module")
def client(oss_server: RunningServer) -> Iterator[Any]:
    with client_of(oss_server) as found:
        yield found


def reasoning(message: Any) -> str:
    return str(getattr(message, "reasoning_content", ""))


def test_reasoning_is_apart(client: Any, oss_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, oss_model.tokenizer, f"{THOUGHT}<|channel|>final<|message|>No rain.", end="<|return|>")
    message = client.chat.completions.create(model="tiny", messages=ASK, seed=0, max_tokens=200).choices[0].message
    assert (reasoning(message), message.content) == ("They ask.", "No rain.")
    chunks = list(client.chat.completions.create(model="tiny", messages=ASK, seed=0, max_tokens=200, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(map(reasoning, deltas)) == "They ask."
    assert "".join(delta.content or "" for delta in deltas) == "No rain."


def test_reasoning_before_a_call_is_sent_back(client: Any, oss_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []
    render = PromptEncoder.encode

    def noted(self: PromptEncoder, parsed: Any, *rest: Any) -> Any:
        prompts.append(self._encoder.template.render(tuple(parsed.conversation()), add_generation_prompt=True))
        return render(self, parsed, *rest)

    monkeypatch.setattr(PromptEncoder, "encode", noted)
    script(monkeypatch, oss_model.tokenizer, THOUGHT + CALL, end="<|call|>")
    choice = ask(client).choices[0]
    (call,) = choice.message.tool_calls
    assert (reasoning(choice.message), call.function.arguments) == ("They ask.", json.dumps(PARIS))
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    sent = choice.message.model_dump(exclude_none=True)
    ask(client, messages=[*ASK, sent, {"role": "tool", "tool_call_id": call.id, "content": "sun"}])
    assert f"<|start|>assistant{THOUGHT} to=functions.weather" in prompts[1]


def test_thinking_blocks(oss_server: RunningServer, oss_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    thinking = {"type": "thinking", "thinking": "They ask.", "signature": ""}
    answers = {
        f"{THOUGHT}<|channel|>final<|message|>No rain.": {"type": "text", "text": "No rain."},
        THOUGHT + CALL: {"type": "tool_use", "name": "weather", "input": PARIS},
    }
    for answer, last in answers.items():
        script(monkeypatch, oss_model.tokenizer, answer, end="<|call|>")
        status, message = oss_server.post("/v1/messages", MESSAGES_ASK | {"tools": [MESSAGES_TOOL]})
        assert (status, without_ids(message)["content"]) == (200, [thinking, last])
        assert without_ids(message_of(events(oss_server, {"tools": [MESSAGES_TOOL]}))) == without_ids(message)
    use = message["content"][1]
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use["id"], "content": "sun"}]}
    turns = [*ASK, {"role": "assistant", "content": message["content"]}, result]
    counted = [
        oss_server.post("/v1/messages/count_tokens", {"model": "tiny", "messages": messages, "tools": [MESSAGES_TOOL]})
        for messages in (turns, [turns[0], {"role": "assistant", "content": [use]}, result])
    ]
    assert [status for status, _ in counted] == [200, 200]
    assert counted[0][1]["input_tokens"] > counted[1][1]["input_tokens"]
    wrong = [{"role": "user", "content": [thinking]}]
    status, error = oss_server.post("/v1/messages", MESSAGES_ASK | {"messages": wrong})
    assert (status, error["error"]["param"]) == (400, "messages")


def test_formats_and_required_calls_are_in_their_channels(client: Any) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    chunks = client.chat.completions.create(
        model="tiny", messages=ASK, seed=1, max_tokens=50, response_format=schema, temperature=1, stream=True
    )
    texts = [text for chunk in chunks if (text := chunk.choices[0].delta.content)]
    assert json.loads("".join(texts)) in ("yes", "no") and len(texts) > 1  # what has no channel is not streamed
    strict = {"type": "object", "properties": {"wet": {"type": "boolean"}}, "required": ["wet"],
              "additionalProperties": False}  # fmt: skip
    tools = [{"type": "function", "function": {"name": "weather", "parameters": strict}}]
    choice = ask(client, tools=tools, tool_choice="required", temperature=1).choices[0]
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments)["wet"] in (True, False) and choice.finish_reason == "tool_calls"


def test_calls_of_other_forms_reject_tools(tmp_path: Path, tiny_shards: Path) -> None:
    source = TOOL_TEMPLATES["qwen3.5 tools"].replace("<parameter=' + name", "<parameter=' + 'x'")
    model = chat_model(tmp_path / "run", next(tiny_shards.glob("*.model")), source)
    with run_server(model) as server:
        status, answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": ASK, "tools": [TOOL]})
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "tools", "unsupported_parameter")
