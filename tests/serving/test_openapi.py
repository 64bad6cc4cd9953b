"""Responses are as the OpenAPI description says, and it has every field that requests accept."""

from typing import Any

import jsonschema
import pytest

from anarchobot.serving.chat_schema import ChatRequest
from anarchobot.serving.embeddings import EmbeddingsRequest
from anarchobot.serving.messages_schema import CountRequest, MessagesRequest
from anarchobot.serving.schema import CompletionRequest
from tests.fuzz.openapi import description
from tests.serving.conftest import RunningServer
from tests.serving.scripted import script
from tests.serving.test_tools import TWO
from tests.serving.test_tools import tool_model as tool_model
from tests.serving.test_tools import tool_server as tool_server
from tests.tokenizers.tool_templates import PARAMETERS, TOOL

ASK = [{"role": "user", "content": "Rain?"}]
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "Hi", "logprobs": 2, "n": 2}),
    ("/v1/completions", {"prompt": "Hi"}),
    ("/v1/chat/completions", {"messages": ASK, "logprobs": True, "top_logprobs": 3, "n": 2}),
    ("/v1/chat/completions", {"messages": ASK, "tools": [TOOL]}),
    ("/v1/messages", {"messages": ASK}),
    ("/v1/messages", {"messages": ASK, "tools": [{"name": "weather", "input_schema": PARAMETERS}]}),
    ("/v1/messages", {"messages": ASK, "stop_sequences": ["name"]}),
    ("/v1/messages/count_tokens", {"messages": ASK}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/messages", {"messages": []}),
]


@pytest.mark.parametrize(("path", "fields"), REQUESTS, ids=str)
def test_responses(
    tool_server: RunningServer, tool_model: Any, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any]
) -> None:
    script(monkeypatch, tool_model.tokenizer, TWO)
    limit = {} if path.endswith("count_tokens") else {"max_tokens": 200}
    body = {"model": "tiny", **limit, **fields}
    status, answer = tool_server.post(path, body)
    described = description()
    operation = described["paths"][path]["post"]
    assert status == (400 if fields.get("messages") == [] else 200), answer
    response = operation["responses"]["200" if status == 200 else "4XX"]
    jsonschema.validate(answer, response["content"]["application/json"]["schema"])
    if status == 200:
        request = operation["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.validate(body, request | {"components": described["components"]})


def test_every_field_is_described() -> None:
    paths = description()["paths"]
    for path, request in (
        ("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest),
        ("/v1/embeddings", EmbeddingsRequest),
        ("/v1/messages", MessagesRequest), ("/v1/messages/count_tokens", CountRequest),
    ):  # fmt: skip
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(schema["properties"]) == set(request.model_fields)
