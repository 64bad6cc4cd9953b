"""Request schemas: the fields of OpenAI's API, and the sampling fields that vLLM, llama.cpp and mlx-lm add to them.

A field that would change the output but is not supported is rejected; a field that has no effect on the output is
ignored, and null means that a field is omitted; any other field is rejected with OpenAI's error.
"""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from anarchobot.config.errors import did_you_mean
from anarchobot.config.schema import GenerationConfig, Penalty
from anarchobot.inference.generation import NUM_SEEDS
from anarchobot.serving.errors import ApiError
from anarchobot.tokenizers.conversation import Message

MIN_TEMPERATURE = 1e-3  # below it, decoding is greedy
MAX_CHOICES = 16  # per request
MAX_TOP_LOGPROBS = 20
_FILTERS = ("top_k", "top_p", "min_p")  # in the order of GenerationConfig.filters
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")

# Unsupported fields, each with the values that are accepted because they have no effect.
Accepted = Mapping[str, tuple[object, ...]]
_UNSUPPORTED: Accepted = {
    "best_of": (1,), "echo": (False,), "suffix": ("",), "logit_bias": ({},), "modalities": (["text"],),
    "functions": ([],), "function_call": ("none", "auto"), "audio": (), "prediction": (), "reasoning_effort": (),
    "verbosity": (), "web_search_options": (), "moderation": (),
    # sampling fields of other servers
    "min_tokens": (0,), "min_length": (0,), "ignore_eos": (False,), "stop_token_ids": ([],), "bad_words": ([],),
    "prompt_logprobs": (0,), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "chat_template_kwargs": ({},), "use_beam_search": (False,), "length_penalty": (1,), "early_stopping": (False,),
    "typical_p": (1,), "tfs_z": (1,), "top_a": (0,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "mirostat": (0,),
    "mirostat_mode": (0,), "xtc_probability": (0,), "dry_multiplier": (0,), "dynatemp_range": (0,),
    "smoothing_factor": (0,), "no_repeat_ngram_size": (0,), "repeat_penalty": (1,), "grammar": ("",),
}  # fmt: skip
_IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "cache_prompt", "keep_alive",
})  # fmt: skip


def _one_prompt(value: object) -> object:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(
            "expected one string; token ids and multiple prompts are not supported: send one request per prompt"
        )
    return value


def _stops(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _no_logprobs(value: object) -> object:
    return None if value is False else value


class ToolUse(NamedTuple):
    """The functions that an answer may call, in OpenAI's form. It has to call one of those named in `required`, if any;
    with `parallel`, it may have several calls."""

    tools: list[dict[str, Any]]
    required: tuple[str, ...] = ()
    parallel: bool = True

    @property
    def functions(self) -> dict[str, Any]:
        """The JSON schema of the parameters, by name."""
        return {tool["function"]["name"]: tool["function"]["parameters"] for tool in self.tools}


class StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


StopString = Annotated[str, Field(min_length=1, max_length=200)]


class StreamOptions(StrictModel):
    include_usage: bool = False
    include_obfuscation: bool = False  # ignored: there is none


class BaseRequest(StrictModel):
    """What all requests have in common."""

    UNSUPPORTED: ClassVar[Accepted] = _UNSUPPORTED
    IGNORED: ClassVar[frozenset[str]] = _IGNORED

    model: str

    def check(self) -> None:
        """Raises ApiError (400) for fields that contradict each other."""


class Request(BaseRequest):
    """A request for generated text."""

    stream: bool | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=-1), AfterValidator(lambda top_k: max(top_k, 0))] | None = None  # vLLM's -1: all
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None

    def requested_tokens(self) -> int | None:
        return self.max_tokens

    def seed_and_stops(self) -> tuple[int | None, list[str]]:
        return None, []

    def choices(self) -> int:
        """How many answers to give."""
        return 1

    def scores(self) -> int | None:
        """How many log-probabilities to give at each position beside that of the token; None: not even that."""
        return None

    def tool_use(self) -> ToolUse | None:
        """None if the answer can call no functions."""
        return None

    def json_schema(self) -> dict[str, Any] | None:
        """The schema that the answer has to follow."""
        return None

    def settings(self, defaults: GenerationConfig, max_tokens: int) -> GenerationConfig:
        """Omitted fields take their value from `defaults`, except for the seed, which is random. Raises ApiError (400)
        if more than `max_tokens` are requested."""
        tokens = self.requested_tokens()
        if tokens is not None and tokens > max_tokens:
            raise ApiError(400, f"max_tokens: {tokens} exceeds the server's limit of {max_tokens}", "max_tokens")
        seed, stop = self.seed_and_stops()
        seed = secrets.randbelow(NUM_SEEDS) if seed is None else seed % NUM_SEEDS
        limit = min(defaults.max_new_tokens, max_tokens) if tokens is None else tokens
        update: dict[str, Any] = {"seed": seed, "max_new_tokens": limit, **self._sampling(defaults)}
        if stop:
            update["stop"] = stop
        return defaults.model_copy(update=update)

    def _sampling(self, defaults: GenerationConfig) -> dict[str, Any]:
        """The filters of the method in `defaults`, except for those that the request sets."""
        given = self.model_dump(include={"temperature", *_FILTERS, *_PENALTIES}, exclude_none=True)
        samples = defaults.method != "greedy" or not given.keys().isdisjoint(("temperature", *_FILTERS))
        if not samples or given.get("temperature", 1) < MIN_TEMPERATURE or self.top_p == 0:
            return given | {"method": "greedy"}
        return dict(zip(_FILTERS, defaults.filters, strict=True)) | given | {"method": "combined"}


class OpenAIRequest(Request):
    """What OpenAI's requests have in common."""

    stream_options: StreamOptions | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: Annotated[
        list[StopString],
        Field(max_length=4),
        BeforeValidator(_stops, json_schema_input_type=StopString | Annotated[list[StopString], Field(max_length=4)]),
    ] = Field([])

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def seed_and_stops(self) -> tuple[int | None, list[str]]:
        return self.seed, self.stop

    def choices(self) -> int:
        return self.n


class CompletionRequest(OpenAIRequest):
    UNSUPPORTED: ClassVar[Accepted] = {
        **_UNSUPPORTED, "top_logprobs": (0,), "response_format": ({"type": "text"},), "tools": ([],),
        "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
    }  # fmt: skip

    prompt: Annotated[
        str,
        BeforeValidator(
            _one_prompt, json_schema_input_type=str | Annotated[list[str], Field(min_length=1, max_length=1)]
        ),
    ]
    logprobs: Annotated[Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None, BeforeValidator(_no_logprobs)] = None

    def scores(self) -> int | None:
        return self.logprobs

    def text(self) -> str:
        return self.prompt


class ConversationRequest(Request):
    """A request whose prompt is a conversation."""

    def conversation(self) -> list[Message]:
        """Raises InvalidRow."""
        raise NotImplementedError


R = TypeVar("R", bound=BaseRequest)
T = TypeVar("T")
# Stops at the first invalid item: pydantic takes about 2 kB and 30 microseconds for each.
Items = Annotated[list[T], Field(fail_fast=True)]


def parse_request(body: bytes, schema: type[R]) -> R:
    """Raises ApiError (400) that names the invalid field."""
    try:
        fields = orjson.loads(body)
    except ValueError as error:
        raise ApiError(400, f"request body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "request body is not a JSON object")
    given = {name: value for name, value in fields.items() if value is not None and name not in schema.IGNORED}
    for name, accepted in schema.UNSUPPORTED.items():
        value = given.pop(name, None)
        if value is not None and not any(_equal(value, other) for other in accepted):
            raise ApiError(400, f"{name}: not supported; omit it", name, "unsupported_parameter")
    try:
        request = schema.model_validate(given)
    except ValidationError as error:
        raise _validation_error(error, schema) from error
    request.check()
    return request


def _equal(value: object, other: object) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)  # True == 1 in Python


def _validation_error(error: ValidationError, schema: type[BaseModel]) -> ApiError:
    """Reports the first error."""
    first = error.errors(include_url=False)[0]
    param = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        near = did_you_mean(param, [*schema.model_fields])
        return ApiError(400, f"Unrecognized request argument supplied: {param}{near}", param, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param}: missing required field", param, "missing_required_parameter")
    return ApiError(400, f"{param}: {first['msg'].removeprefix('Value error, ')}", param)
