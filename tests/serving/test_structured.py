"""response_format and required calls: answers of a random model are what was asked for."""

import builtins
import json
from typing import Any

import jsonschema
import pytest

from anarchobot.inference import grammar
from tests.inference.test_grammar import PERSON
from tests.serving.conftest import RunningServer
from tests.serving.test_messages import TOOL as MESSAGES_TOOL
from tests.serving.test_tools import ASK, streamed
from tests.serving.test_tools import client as client
from tests.serving.test_tools import tool_model as tool_model
from tests.serving.test_tools import tool_server as tool_server
from tests.tokenizers.tool_templates import PARAMETERS, TOOL

pytest.importorskip("llguidance")

STRICT = PARAMETERS | {"required": ["city", "days"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": STRICT}} for name in ("weather", "climate")]
NAMED = {"type": "function", "function": {"name": "climate"}}


def formatted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}


def ask(client: Any, **fields: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=ASK, max_tokens=200, **fields)


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(client: Any, stream: bool) -> None:
    for seed in range(4):
        found = ask(client, response_format=formatted(PERSON), seed=seed, stream=stream)
        if stream:
            text, _, reason = streamed(found)
        else:
            text, reason = found.choices[0].message.content, found.choices[0].finish_reason
        if reason == "stop":
            jsonschema.validate(json.loads(text), PERSON)
        assert text.startswith("{")


def test_json_object(client: Any) -> None:
    answers = ask(client, response_format={"type": "json_object"}, n=6, seed=1, temperature=1.5).choices
    assert all(choice.message.content.startswith("{") for choice in answers)
    for choice in answers:
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_required_calls(client: Any, choice: Any) -> None:
    names = set()
    for seed in range(4):
        (answer,) = ask(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, seed=seed).choices
        if answer.finish_reason == "length":  # a long string
            continue
        (call,) = answer.message.tool_calls
        names.add(call.function.name)
        jsonschema.validate(json.loads(call.function.arguments), STRICT)
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    assert names and names <= ({"climate"} if choice == NAMED else {"weather", "climate"})


def test_any_tool_of_messages(tool_server: RunningServer) -> None:
    ask = {"model": "tiny", "max_tokens": 200, "messages": ASK, "tools": [MESSAGES_TOOL]}
    ask["tool_choice"] = {"type": "any", "disable_parallel_tool_use": True}
    status, message = tool_server.post("/v1/messages", ask)
    assert status == 200
    if message["stop_reason"] == "tool_use":
        assert [block["name"] for block in message["content"]] == ["weather"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "json_schema"}, {"type": "xml"}, {"type": "json_object", "json_schema": {"name": "x", "schema": {}}},
        formatted({"type": "nonsense"}), formatted({"$ref": "#/missing"}),
        formatted({"type": "string", "pattern": "("}),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_format_is_a_bad_request(tool_server: RunningServer, wrong: Any) -> None:
    status, answer = tool_server.post(
        "/v1/chat/completions", {"model": "tiny", "messages": ASK, "response_format": wrong}
    )
    assert status == 400 and answer["error"]["param"].startswith("response_format")
    assert "\n" not in answer["error"]["message"]


def test_a_deep_schema_is_a_bad_request(tool_server: RunningServer) -> None:
    schema: dict[str, Any] = {}
    for _ in range(60):
        schema = {"items": schema}
    body = {"model": "tiny", "messages": ASK, "response_format": formatted(schema)}
    status, answer = tool_server.post("/v1/chat/completions", body)
    assert (status, answer["error"]["param"]) == (400, "response_format")


def test_without_llguidance_the_field_is_named(tool_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "llguidance":
            raise ModuleNotFoundError("No module named 'llguidance'", name="llguidance")
        return imported(name, *rest, **more)

    grammar._make_vocabulary.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    for fields, param in (
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
    ):
        status, answer = tool_server.post("/v1/chat/completions", {"model": "tiny", "messages": ASK, **fields})
        assert (status, answer["error"]["param"]) == (400, param)
        assert "anarchobot[structured]" in answer["error"]["message"]
