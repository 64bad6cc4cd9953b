"""What answers consist of, whatever the form of the response: text, calls of tools, and why they end."""

import secrets
import string
from collections.abc import AsyncIterator
from typing import Literal, NamedTuple

from anarchobot.inference.generation import ScoredToken, TextChunk
from anarchobot.inference.tool_calls import CallParser, CallSyntax, ToolCall
from anarchobot.serving.errors import ApiError
from anarchobot.serving.request_log import Usage
from anarchobot.serving.worker import GenerationStream

EndReason = Literal["stop", "length", "tool_calls"]


class Part(NamedTuple):
    """The next text or call of an answer. `end` is set in the last part of an answer."""

    answer: int
    text: str = ""
    call: ToolCall | None = None
    scored: tuple[ScoredToken, ...] = ()
    end: EndReason | None = None
    stop_string: str | None = None


class Calls(NamedTuple):
    """Which calls an answer may have."""

    syntax: CallSyntax
    names: list[str]
    parallel: bool


async def answer_parts(
    generation: GenerationStream, usage: Usage, answers: int, is_chat: bool, calls: Calls | None
) -> AsyncIterator[Part]:
    """The parts of all answers, as they are generated, and counts their tokens in `usage`. Chat answers lose leading
    whitespace, as with `anarchobot chat`. Raises ApiError if generation fails."""
    parsers = [CallParser(calls.syntax, calls.names) if calls else None for _ in range(answers)]
    started, called, ended = [not is_chat] * answers, [False] * answers, [False] * answers
    tokens = [0] * answers
    async for chunk in generation:
        i = chunk.request
        if ended[i]:
            continue
        if chunk.finish_reason == "error":
            message = "the answer could not be kept to its schema; simplify response_format or tools"
            raise ApiError(400, message, code="schema_failed")
        tokens[i] = chunk.tokens
        usage.completion_tokens = sum(tokens)
        if i == 0:
            usage.cached_tokens = chunk.reused
        text = chunk.text if started[i] else chunk.text.lstrip()
        started[i] = started[i] or bool(text)
        pieces = _pieces(parsers[i], text, chunk)
        scored = chunk.scored
        for piece in pieces:
            part = Part(i, call=piece) if isinstance(piece, ToolCall) else Part(i, piece)
            called[i] = called[i] or part.call is not None
            yield part._replace(scored=scored)
            scored = ()
            if part.call is not None and calls is not None and not calls.parallel:
                ended[i] = True
                generation.cancel(i)
                yield Part(i, end="tool_calls")
                break
        if chunk.finish_reason is not None and not ended[i]:
            ended[i] = True
            end: EndReason = "tool_calls" if called[i] and chunk.finish_reason == "stop" else chunk.finish_reason
            yield Part(i, scored=scored, end=end, stop_string=chunk.stop_string)
        elif scored:
            yield Part(i, scored=scored)


def _pieces(parser: CallParser | None, text: str, chunk: TextChunk) -> list[str | ToolCall]:
    if parser is None:
        return [text] if text else []
    return [*parser.add(text), *(parser.finish() if chunk.finish_reason else [])]


def new_call_id() -> str:
    """Nine letters and digits, as Mistral's templates require."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
