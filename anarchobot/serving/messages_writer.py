"""Responses of /v1/messages, in Anthropic's form: complete, or as a stream of server-sent events."""

import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from anarchobot.inference.tool_calls import ToolCall
from anarchobot.serving.answers import PLAIN, AnswerForm, Part, answer_parts, new_call_id
from anarchobot.serving.errors import ApiError
from anarchobot.serving.request_log import Usage
from anarchobot.serving.worker import GenerationStream

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@dataclass(frozen=True)
class MessagesWriter:
    """Formats one response, and counts its tokens in `usage`. `extra_fields` are added to the message, which a stream
    starts with."""

    model: str
    usage: Usage
    form: AnswerForm = PLAIN
    extra_fields: Mapping[str, object] = field(default_factory=dict)
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    async def complete(self, generation: GenerationStream) -> dict[str, Any]:
        """The whole response. Raises ApiError if generation fails."""
        content: list[dict[str, Any]] = []
        end = None
        async for part in self._parts(generation):
            kind = _kind(part)
            if part.call is not None:
                content.append(_tool_use(part.call) | {"input": orjson.loads(part.call.arguments)})
            elif kind is not None:
                if not content or content[-1]["type"] != kind:
                    content.append(_empty(kind))
                content[-1][kind] += part.text + part.reasoning
            end = part if part.end else end
        assert end is not None  # the last part
        return self._message(content) | _end(end) | {"usage": self._usage()}

    async def stream(self, generation: GenerationStream) -> AsyncIterator[bytes]:
        """Event by event: each text, reasoning and call is a content block. The first one waits for the first token,
        because it has the counts of the prompt."""
        blocks, is_open, started = 0, "", False
        try:
            async for part in self._parts(generation):
                if not started:
                    started = True
                    yield _event("message_start", message=self._message([]) | _NO_END | {"usage": self._usage()})
                kind = _kind(part)
                if is_open and (part.call is not None or part.end or kind not in (None, is_open)):
                    is_open = ""
                    yield _event("content_block_stop", index=blocks - 1)
                if kind is not None:
                    if not is_open:
                        is_open, blocks = kind, blocks + 1
                        yield _event("content_block_start", index=blocks - 1, content_block=_empty(kind))
                    delta = {"type": f"{kind}_delta", kind: part.text + part.reasoning}
                    yield _event("content_block_delta", index=blocks - 1, delta=delta)
                if part.call is not None:
                    block = _tool_use(part.call) | {"input": {}}
                    yield _event("content_block_start", index=blocks, content_block=block)
                    delta = {"type": "input_json_delta", "partial_json": part.call.arguments}
                    yield _event("content_block_delta", index=blocks, delta=delta)
                    yield _event("content_block_stop", index=blocks)
                    blocks += 1
                if part.end:
                    usage = {"output_tokens": self.usage.completion_tokens}
                    yield _event("message_delta", delta=_end(part), usage=usage)
        except ApiError as error:
            yield _event("error", **error.body())
            return
        yield _event("message_stop")

    def _parts(self, generation: GenerationStream) -> AsyncIterator[Part]:
        return answer_parts(generation, self.usage, 1, True, self.form)

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": f"msg_{self.number}", "type": "message", "role": "assistant", "model": self.model}
        return {**head, "content": content, **self.extra_fields}

    def _usage(self) -> dict[str, int]:
        cached = self.usage.cached_tokens
        return {
            "input_tokens": self.usage.prompt_tokens - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": self.usage.completion_tokens,
        }


_NO_END: dict[str, str | None] = {"stop_reason": None, "stop_sequence": None}


def _end(part: Part) -> dict[str, str | None]:
    reason = "stop_sequence" if part.stop_string is not None else _STOP_REASONS[part.end or "stop"]
    return {"stop_reason": reason, "stop_sequence": part.stop_string}


def _kind(part: Part) -> str | None:
    """The type of block, and its field, that the text or the reasoning of a part is in."""
    return "text" if part.text else "thinking" if part.reasoning else None


def _empty(kind: str) -> dict[str, Any]:
    """The signature is how Anthropic's server recognizes its own reasoning."""
    return {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})


def _tool_use(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": new_call_id(), "name": call.name}


def _event(kind: str, **content: Any) -> bytes:
    return f"event: {kind}\n".encode() + b"data: " + orjson.dumps({"type": kind, **content}) + b"\n\n"
