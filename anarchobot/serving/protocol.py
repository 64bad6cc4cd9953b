"""OpenAI's requests: what a client may ask for, checked field by field.

A field that would change the answer and can't be obeyed is refused, one that changes nothing is passed over, and one
that OpenAI does not know is refused as OpenAI does.
"""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from anarchobot.config.errors import did_you_mean
from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.generation import SEEDS
from anarchobot.serving.refusals import ApiError
from anarchobot.tokenizers.conversation import Message

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
COLDEST = 1e-3  # a temperature below this is meant as 0

# Asked for, these can't be had. Their values that ask for nothing are taken, and so is null.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False,), "top_logprobs": (0,), "suffix": ("",),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "modalities": (["text"],),
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (),
    "web_search_options": (), "moderation": (),
}  # fmt: skip
_PASSED_OVER = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "parallel_tool_calls",
})  # fmt: skip


def _one_prompt(value: object) -> object:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError("expected one text; several prompts, or token ids, can't be had: ask once for each text")
    return value


def _stops(value: object) -> object:
    return [value] if isinstance(value, str) else [] if value is None else value


def _text(value: object) -> object:
    """A content: a text, or a list of parts that are text."""
    if isinstance(value, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in value):
            raise ValueError('expected parts {"type": "text", "text": ...}: this model reads nothing but text')
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise ValueError("expected a text")
    return value


def _role(value: object) -> object:
    if not isinstance(value, str) or value not in ROLES:
        raise ValueError(f"expected one of {', '.join(ROLES)}")
    return ROLES[value]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(_Form):
    include_usage: bool = False
    include_obfuscation: bool = False  # passed over: there is none


class ChatMessage(_Form):
    """What else an answer's message has (`refusal`, `annotations` and so on) comes back from clients: passed over."""

    model_config = ConfigDict(strict=True, extra="ignore")
    role: Annotated[str, BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_text)]


class _Request(_Form):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=4), BeforeValidator(_stops)
    ] = []

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    def settings(self, trained: GenerationConfig, most_tokens: int) -> GenerationConfig:
        """What is left out is as the model was trained; but the seed is another one each time. Raises ApiError (400)
        for more than `most_tokens`."""
        tokens = self.wanted_tokens()
        if tokens is not None and tokens > most_tokens:
            raise ApiError(400, f"max_tokens: {tokens}, and the server's limit is {most_tokens}", "max_tokens")
        seed = secrets.randbelow(SEEDS) if self.seed is None else self.seed % SEEDS
        limit = min(trained.max_new_tokens, most_tokens) if tokens is None else tokens
        update: dict[str, Any] = {"seed": seed, "max_new_tokens": limit, **self._draw(trained.method)}
        if self.stop:
            update["stop"] = self.stop
        return trained.model_copy(update=update)

    def _draw(self, method: str) -> dict[str, Any]:
        top_p = self.top_p
        if (self.temperature is not None and self.temperature < COLDEST) or top_p == 0:
            return {"method": "greedy"}
        update: dict[str, Any] = {}
        if self.temperature is not None:
            update |= {"temperature": self.temperature, "method": "random" if method == "greedy" else method}
        if top_p is not None:
            update |= {"top_p": top_p, "method": "nucleus"}
        return update


class CompletionRequest(_Request):
    prompt: Annotated[str, BeforeValidator(_one_prompt)]


class ChatRequest(_Request):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def conversation(self) -> list[Message]:
        return [Message(message.role, message.content) for message in self.messages]


R = TypeVar("R", CompletionRequest, ChatRequest)


def parse(body: bytes, form: type[R]) -> R:
    """Raises ApiError (400) that names the field."""
    try:
        fields = orjson.loads(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object")
    for name, neutral in _NEUTRAL.items():
        value = fields.pop(name, None)
        if value is not None and not any(_same(value, one) for one in neutral):
            raise ApiError(400, f"{name}: this server can't do that: leave it out", name, "unsupported_parameter")
    try:
        request = form.model_validate({name: value for name, value in fields.items() if name not in _PASSED_OVER})
    except ValidationError as error:
        raise _told(error, form) from error
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: only for stream: true", "stream_options")
    if isinstance(request, ChatRequest) and None not in (request.max_tokens, request.max_completion_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens: give one of them", "max_tokens")
    return request


def _same(value: object, neutral: object) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)  # True is 1 in Python


def _told(error: ValidationError, form: type[BaseModel]) -> ApiError:
    """The first of the errors."""
    first = error.errors(include_url=False)[0]
    param = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        near = did_you_mean(param, [*form.model_fields])
        return ApiError(400, f"Unrecognized request argument supplied: {param}{near}", param, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param}: it is missing", param, "missing_required_parameter")
    return ApiError(400, f"{param}: {first['msg'].removeprefix('Value error, ')}", param)
