"""An OpenAPI description of the server: requests as pydantic describes them, responses as OpenAI and Anthropic document
them."""

from typing import Any

from anarchobot.serving.chat_schema import ChatRequest
from anarchobot.serving.embeddings import EmbeddingsRequest
from anarchobot.serving.messages_schema import CountRequest, MessagesRequest
from anarchobot.serving.schema import MAX_CHOICES, CompletionRequest

_TEXT, _COUNT, _NUMBER = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "number"}
_BYTES = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}}


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "required": required, "properties": properties}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_ERROR = {"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _or_null(_TEXT)}
_DETAILS = _object({"cached_tokens": _COUNT})
_USAGE = {
    "prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT, "prompt_tokens_details": _DETAILS,
}  # fmt: skip
_REASON = {"enum": ["stop", "length", "tool_calls"]}
_FUNCTION = _object({"name": _TEXT, "arguments": _TEXT})
_CALLS = _list(_object({"id": _TEXT, "type": {"const": "function"}, "function": _FUNCTION}))
_MESSAGE = _object(
    {"role": {"const": "assistant"}, "content": _or_null(_TEXT), "reasoning_content": _TEXT, "tool_calls": _CALLS},
    ("reasoning_content", "tool_calls"),
)
_TOKEN = {"token": _TEXT, "logprob": _NUMBER, "bytes": _BYTES}
_CHAT_LOGPROBS = _object({"content": _list(_object({**_TOKEN, "top_logprobs": _list(_object(_TOKEN))}))})
_TEXT_LOGPROBS = _object(
    {
        "tokens": _list(_TEXT), "token_logprobs": _list(_NUMBER), "text_offset": _list(_COUNT),
        "top_logprobs": _list({"type": "object", "additionalProperties": _NUMBER}),
    }
)  # fmt: skip
_MESSAGES_USAGE = (
    "input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens",
)  # fmt: skip
_TEXT_BLOCK = _object({"type": {"const": "text"}, "text": _TEXT})
_THINKING_BLOCK = _object({"type": {"const": "thinking"}, "thinking": _TEXT, "signature": _TEXT})
_USE_BLOCK = _object({"type": {"const": "tool_use"}, "id": _TEXT, "name": _TEXT, "input": {"type": "object"}})
_STOP_REASON = {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]}
_ANSWER = _object(
    {
        "id": _TEXT, "type": {"const": "message"}, "role": {"const": "assistant"}, "model": _TEXT,
        "content": _list({"anyOf": [_TEXT_BLOCK, _THINKING_BLOCK, _USE_BLOCK]}), "stop_reason": _STOP_REASON,
        "stop_sequence": _or_null(_TEXT), "usage": _object(dict.fromkeys(_MESSAGES_USAGE, _COUNT)),
    }
)  # fmt: skip
_EMBEDDING = {"anyOf": [_list(_NUMBER), _TEXT]}
_EMBEDDINGS = _object(
    {
        "object": {"const": "list"}, "model": _TEXT,
        "data": _list(_object({"object": {"const": "embedding"}, "index": _COUNT, "embedding": _EMBEDDING})),
        "usage": _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
    }
)  # fmt: skip


def _completion(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    item = _object({"index": _COUNT, **choice, "finish_reason": _REASON})
    choices = {**_list(item), "minItems": 1, "maxItems": MAX_CHOICES}
    fields = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "choices": choices, "usage": _object(_USAGE)}
    return _object({"object": {"const": kind}, **fields})


def _responses(schema: dict[str, Any], stream: bool = False) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}} | ({"text/event-stream": {}} if stream else {})
    error = {
        "description": "error",
        "content": {"application/json": {"schema": _object({"type": {"const": "error"}, "error": _object(_ERROR)})}},
    }
    headers = {"X-Warning": {"schema": _TEXT, "description": "the model that answered, if another one was named"}}
    return {"200": {"description": "success", "headers": headers, "content": content}, "4XX": error}


def description() -> dict[str, Any]:
    model = _object({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT})
    models = _object({"object": {"const": "list"}, "data": {"type": "array", "items": model}})
    health = _object({"status": {"const": "ok"}, "under_way": _COUNT})
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    paths: dict[str, Any] = {
        "/health": {"get": {"responses": _responses(health)}},
        "/v1/models": {"get": {"responses": _responses(models)}},
        "/v1/models/{name}": {"get": {"parameters": [name], "responses": _responses(model)}},
    }
    schemas: dict[str, Any] = {}
    for path, request, response in (
        ("/v1/completions", CompletionRequest, _completion("text_completion", {
            "text": _TEXT, "logprobs": _or_null(_TEXT_LOGPROBS)})),
        ("/v1/chat/completions", ChatRequest, _completion("chat.completion", {
            "message": _MESSAGE, "logprobs": _or_null(_CHAT_LOGPROBS)})),
        ("/v1/embeddings", EmbeddingsRequest, _EMBEDDINGS),
        ("/v1/messages", MessagesRequest, _ANSWER),
        ("/v1/messages/count_tokens", CountRequest, _object({"input_tokens": _COUNT})),
    ):  # fmt: skip
        schema = request.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"requestBody": body, "responses": _responses(response, stream=True)}}
    info = {"title": "AnarchoBot", "version": "1"}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}
