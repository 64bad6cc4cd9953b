"""An OpenAPI description of the server: requests as pydantic describes them, responses as OpenAI documents them."""

from typing import Any

from anarchobot.serving.schema import ChatRequest, CompletionRequest

_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
_ERROR = {"message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}
_USAGE = {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT}
_REASON = {"enum": ["stop", "length"]}
_MESSAGE = {"role": {"const": "assistant"}, "content": _TEXT}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _completion(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    choices = {"type": "array", "minItems": 1, "maxItems": 1, "items": _object({**choice, "finish_reason": _REASON})}
    fields = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "choices": choices, "usage": _object(_USAGE)}
    return _object({"object": {"const": kind}, **fields})


def _responses(schema: dict[str, Any], stream: bool = False) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}} | ({"text/event-stream": {}} if stream else {})
    error = {"description": "error", "content": {"application/json": {"schema": _object({"error": _object(_ERROR)})}}}
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
        ("/v1/completions", CompletionRequest, _completion("text_completion", {"text": _TEXT})),
        ("/v1/chat/completions", ChatRequest, _completion("chat.completion", {"message": _object(_MESSAGE)})),
    ):
        schema = request.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"requestBody": body, "responses": _responses(response, stream=True)}}
    info = {"title": "AnarchoBot", "version": "1"}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}
