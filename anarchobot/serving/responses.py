"""Responses in OpenAI's format: complete, or as a stream of server-sent events."""

import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from anarchobot.inference.generation import ScoredToken
from anarchobot.inference.tool_calls import ToolCall
from anarchobot.serving.answers import PLAIN, AnswerForm, Part, answer_parts, new_call_id
from anarchobot.serving.errors import ApiError
from anarchobot.serving.logprobs import chat_logprobs, completion_logprobs, text_length
from anarchobot.serving.request_log import Usage
from anarchobot.serving.worker import GenerationStream
from anarchobot.tokenizers.canonical_tokens import token_bytes
from anarchobot.tokenizers.tokenizer import ChatTokenizer

Kind = Literal["text_completion", "chat.completion"]


@dataclass
class _Choice:
    """One of the answers. `offset`: where the next token begins in its text, in characters."""

    offset: int
    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    end: str | None = None


@dataclass(frozen=True)
class ResponseWriter:
    """Formats one response, and counts its tokens in `usage`. `with_usage`: a stream ends with the counts.
    `after_space`: the prompt's last space is that of the first token. `extra_fields` are added to the response, or to
    the first chunk."""

    kind: Kind
    model: str
    usage: Usage
    tokenizer: ChatTokenizer
    choices: int = 1
    form: AnswerForm = PLAIN
    scores: bool = False
    after_space: bool = False
    with_usage: bool = False
    extra_fields: Mapping[str, object] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    async def complete(self, generation: GenerationStream) -> dict[str, Any]:
        """The whole response. Raises ApiError if generation fails."""
        answers = self._answers()
        async for part in self._parts(generation):
            answer = answers[part.answer]
            answer.texts.append(part.text)
            answer.reasoning.append(part.reasoning)
            answer.scored += part.scored
            answer.calls += [_call(part.call)] if part.call else []
            answer.end = part.end or answer.end
        choices = [
            self._choice(i, self._content(answer), self._logprobs(answer, answer.scored), answer.end)
            for i, answer in enumerate(answers)
        ]
        return self._head(self.kind) | {"choices": choices, "usage": self._usage()} | dict(self.extra_fields)

    def _content(self, answer: _Choice) -> dict[str, Any]:
        text = "".join(answer.texts)
        if not self._is_chat:
            return {"text": text}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if reasoning := "".join(answer.reasoning):
            message["reasoning_content"] = reasoning
        if answer.calls:
            message |= {"content": text or None, "tool_calls": answer.calls}
        return {"message": message}

    async def stream(self, generation: GenerationStream) -> AsyncIterator[bytes]:
        """Chunk by chunk. The status is already sent when generation fails, so the error is reported as OpenAI does:
        an event with `error`, without a [DONE] after it."""
        answers = self._answers()
        try:
            if self._is_chat:
                for i in range(self.choices):
                    extra = self.extra_fields if i == 0 else None
                    yield self._event(i, {"delta": {"role": "assistant", "content": ""}}, extra=extra)
            async for part in self._parts(generation):
                answer = answers[part.answer]
                if part.text or part.reasoning or part.call or part.scored:
                    logprobs = self._logprobs(answer, part.scored) if part.scored else None
                    yield self._event(part.answer, self._delta(answer, part), logprobs)
                if part.end:
                    yield self._event(part.answer, {"delta": {}} if self._is_chat else {"text": ""}, end=part.end)
        except ApiError as error:
            yield _event(error.body())
            return
        if self.with_usage:
            yield _event(self._head(self._chunk_kind) | {"choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _delta(self, answer: _Choice, part: Part) -> dict[str, Any]:
        if not self._is_chat:
            return {"text": part.text}
        if part.reasoning:
            return {"delta": {"reasoning_content": part.reasoning}}
        if part.call is None:
            return {"delta": {"content": part.text}}
        call = {"index": len(answer.calls), **_call(part.call)}
        answer.calls.append(call)
        return {"delta": {"tool_calls": [call]}}

    def _event(
        self,
        i: int,
        content: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        end: str | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> bytes:
        no_usage = {"usage": None} if self.with_usage else {}
        choices = [self._choice(i, content, logprobs, end)]
        return _event(self._head(self._chunk_kind) | {"choices": choices} | no_usage | dict(extra or {}))

    @staticmethod
    def _choice(i: int, content: dict[str, Any], logprobs: dict[str, Any] | None, end: str | None) -> dict[str, Any]:
        return {"index": i, **content, "logprobs": logprobs, "finish_reason": end}

    def _answers(self) -> list[_Choice]:
        return [_Choice(-1 if self.after_space else 0) for _ in range(self.choices)]

    def _parts(self, generation: GenerationStream) -> AsyncIterator[Part]:
        return answer_parts(generation, self.usage, self.choices, self._is_chat, self.form)

    def _logprobs(
        self, answer: _Choice, scored: "list[ScoredToken] | tuple[ScoredToken, ...]"
    ) -> dict[str, Any] | None:
        if not self.scores:
            return None
        if self._is_chat:
            return chat_logprobs(scored, self.tokenizer)
        start = answer.offset
        raws = token_bytes(self.tokenizer)
        answer.offset += sum(text_length(raws[item.token]) for item in scored)
        return completion_logprobs(scored, self.tokenizer, start)

    @property
    def _is_chat(self) -> bool:
        return self.kind == "chat.completion"

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._is_chat else self.kind

    def _head(self, name: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        return {"id": f"{prefix}-{self.number}", "object": name, "created": self.created, "model": self.model}

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self.usage.prompt_tokens, self.usage.completion_tokens
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return counts | {"prompt_tokens_details": {"cached_tokens": self.usage.cached_tokens}}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": new_call_id(), "type": "function", "function": function}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"
