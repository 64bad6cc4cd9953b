"""What answers consist of, whatever the form of the response: text, reasoning, calls of tools, and why they end."""

import secrets
import string
from collections.abc import AsyncIterator, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from anarchobot.inference.call_syntax import CallSyntax
from anarchobot.inference.generation import ScoredToken, TextChunk
from anarchobot.inference.harmony import HarmonyParser, Reasoning
from anarchobot.inference.tool_calls import CallParser, Functions, ToolCall
from anarchobot.serving.errors import ApiError
from anarchobot.serving.request_log import Usage
from anarchobot.serving.worker import GenerationStream

EndReason = Literal["stop", "length", "tool_calls"]


class Part(NamedTuple):
    """The next text, reasoning or call of an answer. `end` is set in the last part of an answer."""

    answer: int
    text: str = ""
    reasoning: str = ""
    call: ToolCall | None = None
    scored: tuple[ScoredToken, ...] = ()
    end: EndReason | None = None
    stop_string: str | None = None


class AnswerForm(NamedTuple):
    """How an answer is written: the calls of `functions`, several if `parallel`, and whether it is in channels."""

    syntax: CallSyntax | None = None
    functions: Functions = MappingProxyType({})
    parallel: bool = True
    has_channels: bool = False

    def parser(self) -> CallParser | HarmonyParser | None:
        if self.has_channels:
            return HarmonyParser(self.functions)
        return CallParser(self.syntax, self.functions) if self.syntax and self.functions else None


PLAIN = AnswerForm()


async def answer_parts(
    generation: GenerationStream, usage: Usage, answers: int, is_chat: bool, form: AnswerForm
) -> AsyncIterator[Part]:
    """The parts of all answers, as they are generated, and counts their tokens in `usage`. Chat answers lose leading
    whitespace, as with `anarchobot chat`. Raises ApiError if generation fails."""
    parsers = [form.parser() for _ in range(answers)]
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
            part = _part(i, piece)
            called[i] = called[i] or part.call is not None
            yield part._replace(scored=scored)
            scored = ()
            if part.call is not None and not form.parallel:
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


def _pieces(
    parser: CallParser | HarmonyParser | None, text: str, chunk: TextChunk
) -> Sequence[str | Reasoning | ToolCall]:
    if parser is None:
        return [text] if text else []
    return [*parser.add(text), *(parser.finish() if chunk.finish_reason else [])]


def _part(answer: int, piece: str | Reasoning | ToolCall) -> Part:
    if isinstance(piece, ToolCall):
        return Part(answer, call=piece)
    return Part(answer, reasoning=piece.text) if isinstance(piece, Reasoning) else Part(answer, piece)


def new_call_id() -> str:
    """Nine letters and digits, as Mistral's templates require."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
