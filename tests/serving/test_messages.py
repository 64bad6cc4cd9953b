"""/v1/messages in Anthropic's form, over plain HTTP, and through Anthropic's official client where it is installed."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from anarchobot.inference.model import Model
from anarchobot.serving.prompts import PromptEncoder
from tests.serving.conftest import KEY, RunningServer
from tests.serving.scripted import script
from tests.serving.test_tools import CALL, PARIS, ROME, TWO
from tests.serving.test_tools import tool_model as tool_model
from tests.serving.test_tools import tool_server as tool_server
from tests.tokenizers.tool_templates import PARAMETERS

PATH = "/v1/messages"
ASK = {"model": "tiny", "max_tokens": 200, "messages": [{"role": "user", "content": "Rain?"}]}
TOOL = {"name": "weather", "description": "Forecast.", "input_schema": PARAMETERS}
EVENTS = {"message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta"}


def events(server: RunningServer, fields: Any) -> list[dict[str, Any]]:
    """The events of a stream; the name of each is the type of its data."""
    status, headers, body = server.request("POST", PATH, json.dumps(ASK | fields | {"stream": True}).encode())
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    found = []
    for block in body.decode().strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def message_of(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """Puts a stream together, as a client does, and checks the order of its events."""
    first, *rest, last = stream
    message: dict[str, Any] = first["message"]
    assert (first["type"], last["type"]) == ("message_start", "message_stop") and message["content"] == []
    inputs: dict[int, str] = {}
    is_open = False
    for event in rest:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"]) and not is_open
            message["content"].append(dict(event["content_block"]))
            is_open = True
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(message["content"]) - 1 and is_open
            delta = event["delta"]
            if delta["type"] in ("text_delta", "thinking_delta"):
                kind = delta["type"].removesuffix("_delta")
                message["content"][-1][kind] += delta[kind]
            else:
                inputs[event["index"]] = inputs.get(event["index"], "") + delta["partial_json"]
        elif event["type"] == "content_block_stop":
            assert is_open
            is_open = False
        else:
            assert event["type"] == "message_delta" and event is rest[-1] and not is_open
            message |= event["delta"]
            message["usage"] |= event["usage"]
    for index, text in inputs.items():
        message["content"][index]["input"] = json.loads(text)
    return message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [{key: value for key, value in block.items() if key != "id"} for block in message["content"]]
    usage = {key: value for key, value in message["usage"].items() if key == "output_tokens"}
    return {key: value for key, value in message.items() if key != "id"} | {"content": content, "usage": usage}


def use(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "name": "weather", "input": arguments}


@pytest.mark.parametrize(
    ("answer", "fields", "content", "end"),
    [
        ("No rain.", {}, [{"type": "text", "text": "No rain."}], ("end_turn", None)),
        ("", {}, [], ("end_turn", None)),
        (CALL, {"tools": [TOOL]}, [use(PARIS)], ("tool_use", None)),
        (f"Let me see.\n{TWO}", {"tools": [TOOL]},
         [{"type": "text", "text": "Let me see."}, use(PARIS), use(ROME)], ("tool_use", None)),
        (TWO, {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
         [use(PARIS)], ("tool_use", None)),
        (CALL, {}, [{"type": "text", "text": CALL}], ("end_turn", None)),
        ("one END two", {"stop_sequences": ["STOP", "END"]}, [{"type": "text", "text": "one "}],
         ("stop_sequence", "END")),
    ],
)  # fmt: skip
def test_answers(
    tool_server: RunningServer, tool_model: Model, monkeypatch: pytest.MonkeyPatch, answer: str, fields: Any,
    content: Any, end: Any,
) -> None:  # fmt: skip
    script(monkeypatch, tool_model.tokenizer, answer)
    status, message = tool_server.post(PATH, ASK | fields)
    assert status == 200 and (message["type"], message["role"], message["model"]) == ("message", "assistant", "tiny")
    assert without_ids(message)["content"] == content
    assert (message["stop_reason"], message["stop_sequence"]) == end
    assert without_ids(message_of(events(tool_server, fields))) == without_ids(message)
    usage = message["usage"]
    assert usage["cache_creation_input_tokens"] == 0
    prompt = tool_server.post(f"{PATH}/count_tokens", {k: v for k, v in (ASK | fields).items() if k in COUNTED})[1]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == prompt["input_tokens"]


COUNTED = ("model", "messages", "system", "tools", "tool_choice")


def test_max_tokens(tool_server: RunningServer, tool_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, tool_model.tokenizer, "a long answer")
    _, message = tool_server.post(PATH, ASK | {"max_tokens": 2})
    assert (message["stop_reason"], message["usage"]["output_tokens"]) == ("max_tokens", 2)


def test_the_conversation_is_that_of_openai(tool_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same conversation in both forms has the same tokens."""
    prompts: list[list[int]] = []
    encode = PromptEncoder.encode

    def noted(self: PromptEncoder, parsed: Any, *rest: Any) -> Any:
        encoded = encode(self, parsed, *rest)
        prompts.append(encoded.prompt.ids)
        return encoded

    monkeypatch.setattr(PromptEncoder, "encode", noted)
    text = {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
    uses = [
        {"type": "tool_use", "id": f"abcdefg{i:02d}", "name": "weather", "input": x}
        for i, x in enumerate((PARIS, ROME))
    ]
    ours = {
        "system": [text],
        "messages": [
            {"role": "user", "content": "Rain in Paris"},
            {"role": "user", "content": [{"type": "text", "text": "or Rome?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, *uses]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "abcdefg00", "content": "sun"},
                {"type": "tool_result", "tool_use_id": "abcdefg01", "content": [text], "is_error": True},
                {"type": "text", "text": "Well?"}]},
        ],
        "tools": [TOOL],
    }  # fmt: skip
    calls = [
        {"id": u["id"], "type": "function", "function": {"name": u["name"], "arguments": json.dumps(u["input"])}}
        for u in uses
    ]
    theirs = {
        "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain in Paris\nor Rome?"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "abcdefg00", "content": "sun"},
            {"role": "tool", "tool_call_id": "abcdefg01", "content": "Error: Be brief."},
            {"role": "user", "content": "Well?"},
        ],
        "tools": [{"type": "function", "function": {
            "name": "weather", "description": "Forecast.", "parameters": PARAMETERS}}],
    }  # fmt: skip
    for path, fields in ((PATH, ours), ("/v1/chat/completions", theirs)):
        assert tool_server.post(path, {"model": "tiny", "max_tokens": 1, **fields})[0] == 200
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"), ({"temperature": 1.5}, "temperature"), ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"messages": [*ASK["messages"], {"role": "assistant", "content": "No"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "messages"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"), ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"), ({"temprature": 1}, "temprature"),
        ({"tools": [TOOL, TOOL]}, "tools"), ({"n": 2}, "n"), ({"max_tokens": 10**6}, "max_tokens"),
    ],
)  # fmt: skip
def test_bad_requests_are_named(tool_server: RunningServer, fields: Any, param: str) -> None:
    status, answer = tool_server.post(PATH, ASK | fields)
    assert (status, answer["type"], answer["error"]["param"]) == (400, "error", param), answer
    assert answer["error"]["type"] == "invalid_request_error" and "\n" not in answer["error"]["message"]


def test_an_image_is_a_bad_request(tool_server: RunningServer) -> None:
    image = {"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}}
    status, answer = tool_server.post(PATH, ASK | {"messages": [{"role": "user", "content": [image]}]})
    assert status == 400 and "tool_result" in answer["error"]["message"]


def test_the_key_of_anthropics_clients(locked_server: RunningServer) -> None:
    for key, expected in ((KEY, 200), (KEY + "x", 401), ("", 401)):
        status, _ = locked_server.post(PATH, ASK | {"max_tokens": 1}, {"x-api-key": key})
        assert status == expected


@pytest.fixture
def client(tool_server: RunningServer) -> Iterator[Any]:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=tool_server.url, api_key="none", max_retries=0, timeout=60) as found:
        yield found


def test_the_official_client(client: Any, tool_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, tool_model.tokenizer, f"Let me see.\n{CALL}")
    message = client.messages.create(**ASK, tools=[TOOL])
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert (message.content[1].input, message.stop_reason) == (PARIS, "tool_use")
    with client.messages.stream(**ASK, tools=[TOOL]) as stream:
        assert "".join(stream.text_stream) == "Let me see."
        final = stream.get_final_message()
    assert final.content[1].input == PARIS and final.usage.output_tokens == message.usage.output_tokens
    result = {"type": "tool_result", "tool_use_id": message.content[1].id, "content": "sun"}
    script(monkeypatch, tool_model.tokenizer, "No.")
    turns = [*ASK["messages"], {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]  # type: ignore[misc]
    last = client.messages.create(**ASK | {"messages": turns}, tools=[TOOL])
    assert last.content[0].text == "No." and last.usage.cache_read_input_tokens > 0
    assert client.messages.count_tokens(model="tiny", messages=ASK["messages"]).input_tokens > 0
    anthropic = pytest.importorskip("anthropic")
    with pytest.raises(anthropic.BadRequestError) as raised:
        client.messages.create(**ASK, thinking={"type": "enabled", "budget_tokens": 1024})
    assert "thinking" in raised.value.message
