"""OpenAI's answers: whole, and as a stream of server-sent events."""

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from anarchobot.inference.generation import Piece
from anarchobot.serving.refusals import ApiError
from anarchobot.serving.worker import Answer

Kind = Literal["text_completion", "chat.completion"]


@dataclass(frozen=True)
class Form:
    """How one answer looks. `prompt_tokens`: of the request."""

    kind: Kind
    model: str
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """Raises ApiError when there was a fault."""
        texts, last = [], None
        async for last in self._pieces(answer):
            texts.append(last.text)
        assert last is not None  # the last one says how it ended
        text = "".join(texts)
        said = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        return self._head(self.kind) | {"choices": [_choice(said, last.end)], "usage": self._usage(last.tokens)}

    async def stream(self, answer: Answer, usage: bool) -> AsyncIterator[bytes]:
        """Chunk by chunk, with `usage` in the last one if it is wanted. A fault is told as OpenAI's own servers do it
        when the status is already sent: an event with `error`, and then no [DONE]."""
        head = self._head("chat.completion.chunk" if self._is_chat else self.kind)
        none = {"usage": None} if usage else {}

        def chunk(text: str | None, end: str | None, **delta: str) -> bytes:
            content = delta if text is None else delta | {"content": text}
            said = {"delta": content} if self._is_chat else {"text": text or ""}
            return _event(head | {"choices": [_choice(said, end)]} | none)

        tokens = 0
        try:
            if self._is_chat:
                yield chunk("", None, role="assistant")
            async for piece in self._pieces(answer):
                tokens = piece.tokens
                if piece.text:
                    yield chunk(piece.text, None)
                if piece.end is not None:
                    yield chunk(None, piece.end)
        except ApiError as error:
            yield _event(error.body())
            return
        if usage:
            yield _event(head | {"choices": [], "usage": self._usage(tokens)})
        yield b"data: [DONE]\n\n"

    @property
    def _is_chat(self) -> bool:
        return self.kind == "chat.completion"

    async def _pieces(self, answer: Answer) -> AsyncIterator[Piece]:
        """White space before what is said in a chat is left out, as `chat` does."""
        said = not self._is_chat
        async for piece in answer:
            text = piece.text if said else piece.text.lstrip()
            said = said or bool(text)
            yield piece._replace(text=text)

    def _head(self, name: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        return {"id": f"{prefix}-{self.number}", "object": name, "created": self.created, "model": self.model}

    def _usage(self, tokens: int) -> dict[str, int]:
        both = self.prompt_tokens + tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": both}


def _choice(said: dict[str, Any], end: str | None) -> dict[str, Any]:
    return {"index": 0, **said, "logprobs": None, "finish_reason": end}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"
