"""Responses in OpenAI's format: complete, or as a stream of server-sent events."""

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from anarchobot.inference.generation import TextChunk
from anarchobot.serving.errors import ApiError
from anarchobot.serving.request_log import Usage
from anarchobot.serving.worker import GenerationStream

Kind = Literal["text_completion", "chat.completion"]


@dataclass(frozen=True)
class ResponseWriter:
    """Formats one response, and counts its tokens in `usage`."""

    kind: Kind
    model: str
    usage: Usage
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    async def complete(self, generation: GenerationStream) -> dict[str, Any]:
        """The whole response. Raises ApiError if generation fails."""
        texts, last = [], None
        async for last in self._chunks(generation):
            texts.append(last.text)
        assert last is not None  # the last chunk has the finish reason
        text = "".join(texts)
        content = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        choices = [_choice(content, last.finish_reason)]
        return self._head(self.kind) | {"choices": choices, "usage": self._usage()}

    async def stream(self, generation: GenerationStream, usage: bool) -> AsyncIterator[bytes]:
        """Chunk by chunk; with `usage`, a last chunk has the token counts. The status is already sent when generation
        fails, so the error is reported as OpenAI does: an event with `error`, without a [DONE] after it."""
        head = self._head("chat.completion.chunk" if self._is_chat else self.kind)
        no_usage = {"usage": None} if usage else {}

        def event(text: str | None, finish_reason: str | None, **delta: str) -> bytes:
            full_delta = delta if text is None else delta | {"content": text}
            content = {"delta": full_delta} if self._is_chat else {"text": text or ""}
            return _event(head | {"choices": [_choice(content, finish_reason)]} | no_usage)

        try:
            if self._is_chat:
                yield event("", None, role="assistant")
            async for chunk in self._chunks(generation):
                if chunk.text:
                    yield event(chunk.text, None)
                if chunk.finish_reason is not None:
                    yield event(None, chunk.finish_reason)
        except ApiError as error:
            yield _event(error.body())
            return
        if usage:
            yield _event(head | {"choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    @property
    def _is_chat(self) -> bool:
        return self.kind == "chat.completion"

    async def _chunks(self, generation: GenerationStream) -> AsyncIterator[TextChunk]:
        """Strips leading whitespace from chat answers, like `anarchobot chat`."""
        started = not self._is_chat
        async for chunk in generation:
            self.usage.completion_tokens = chunk.tokens
            text = chunk.text if started else chunk.text.lstrip()
            started = started or bool(text)
            yield chunk._replace(text=text)

    def _head(self, name: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        return {"id": f"{prefix}-{self.number}", "object": name, "created": self.created, "model": self.model}

    def _usage(self) -> dict[str, int]:
        prompt, completion = self.usage.prompt_tokens, self.usage.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _choice(content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"
