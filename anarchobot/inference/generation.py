"""Text generation: prompts are encoded, tokens are sampled with a KV cache, and text is streamed."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import mlx.core as mx

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.inference import batching
from anarchobot.inference.batching import Batch, Constraint, FinishReason
from anarchobot.inference.model import Model
from anarchobot.inference.prefixes import KeptPrefixes
from anarchobot.inference.sampling import TokenScores
from anarchobot.inference.speculative import Draft, SpeculativeBatch
from anarchobot.model.gradient_accumulator import Params
from anarchobot.tokenizers.canonical_tokens import token_bytes
from anarchobot.tokenizers.decoding import TextStream
from anarchobot.tokenizers.tokenizer import ChatTokenizer, text_start
from anarchobot.tokenizers.trailing_space import split_trailing_space, starts_with_space

NUM_SEEDS = 2**32


class ScoredToken(NamedTuple):
    """A token of a text, its log-probability, and those of the most likely tokens at its position, by id."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class TextChunk(NamedTuple):
    """New text of a request. `tokens` counts all tokens generated so far. `finish_reason` is set in the last chunk: a
    stop token or string ("stop"), a limit ("length"), or a constraint that failed ("error"). `stop_string` is the one
    that was found. `scored` are the tokens since the last chunk, if requested; `reused` is how many tokens of the
    prompt were not prefilled."""

    request: int
    text: str
    tokens: int
    finish_reason: FinishReason | None
    stop_string: str | None = None
    scored: tuple[ScoredToken, ...] = ()
    reused: int = 0


@dataclass
class _Text:
    """The text of a request. `scored` are the tokens that were in no chunk yet."""

    stream: TextStream
    tokens: int = 0
    scored: list[ScoredToken] = field(default_factory=list)


class TextBatch:
    """A `Batch` whose requests produce text and also end at a string in settings.stop."""

    def __init__(
        self,
        model: Model,
        max_rows: int | None = None,
        *,
        prefixes: KeptPrefixes | None = None,
        draft: Draft | None = None,
    ) -> None:
        """`prefixes`: see `Batch`; `draft`: see `SpeculativeBatch`."""
        self._tokenizer = model.tokenizer
        rows = max_rows or batching.MAX_ROWS
        if draft is None:
            self._batch = Batch(model.params, model.config, rows, prefixes=prefixes)
        else:
            self._batch = SpeculativeBatch(model.params, model.config, rows, prefixes=prefixes, draft=draft)
        self._texts: dict[int, _Text] = {}

    def __len__(self) -> int:
        return len(self._batch)

    def insert(
        self,
        context: list[int],
        settings: GenerationConfig,
        stop: Collection[int],
        *,
        after_space: bool = False,
        constraint: Constraint | None = None,
        top_logprobs: int | None = None,
        shown: Mapping[int, str] = MappingProxyType({}),
    ) -> int:
        """Adds a request like `Batch.insert`. A string in settings.stop that names a control token ends it at that
        token: decoded text does not contain it. `after_space`: the prompt ended in a space that is not in `context`
        (tokenizers/trailing_space.py). `shown`: control tokens that are part of the text, by id."""
        controls = self._tokenizer.control_tokens
        stop = {*stop, *(controls[text] for text in settings.stop if text in controls)}
        first = mx.array(starts_with_space(self._tokenizer)) if after_space else None
        request = self._batch.insert(context, settings, stop, first, constraint=constraint, top_logprobs=top_logprobs)
        stream = TextStream(self._tokenizer, context, settings.stop, drop_space=after_space, shown=shown)
        self._texts[request] = _Text(stream)
        return request

    def remove(self, request: int) -> None:
        self._batch.remove(request)
        self._texts.pop(request, None)

    def step(self) -> list[TextChunk]:
        """Generates one token per request and returns the text that is final; requests without new text are omitted."""
        chunks = []
        for request, token, finish_reason, scores, reused in self._batch.step():
            text, new = self._texts[request], ""
            if token is not None:
                text.tokens += 1
                new = text.stream.add(token)
                if scores is not None:
                    text.scored.append(_scored(token, scores))
            if finish_reason is not None:
                new += text.stream.finish()
            if text.stream.stop_string is not None and finish_reason != "error":
                finish_reason = "stop"
            if new or finish_reason:
                scored = _in_text(text.scored, new, self._tokenizer) if text.stream.stop_string else text.scored
                stop_string = text.stream.stop_string
                chunks.append(TextChunk(request, new, text.tokens, finish_reason, stop_string, tuple(scored), reused))
                text.scored = []
            if finish_reason is not None:
                self.remove(request)
        return chunks


def _scored(token: int, scores: TokenScores) -> ScoredToken:
    top = zip(scores.top_ids.tolist(), scores.top_logprobs.tolist(), strict=True)  # type: ignore[arg-type]
    return ScoredToken(token, scores.logprob.item(), list(top))  # type: ignore[arg-type]


def _in_text(scored: list[ScoredToken], text: str, tokenizer: ChatTokenizer) -> list[ScoredToken]:
    """The tokens that are in `text`, which ends before a stop string, at least in part."""
    kept, left = [], len(text.encode())
    for token in scored:
        if left <= 0:
            break
        kept.append(token)
        left -= len(token_bytes(tokenizer)[token.token])
    return kept


def generate(
    model: Model,
    settings: GenerationConfig,
    on_text: Callable[[str], None] = lambda text: None,
    on_end: Callable[[TextChunk], None] = lambda chunk: None,
    *,
    draft: Draft | None = None,
) -> str:
    """Returns the continuation of settings.prompt; `on_text` receives it in pieces as it is generated, and `on_end` its
    last chunk. `draft` proposes tokens; the text is the same without it.

    Generation ends at max_new_tokens, at the model's end tokens, before the first stop string, or at max_seq_len. Equal
    settings give equal text. Raises UserError if the prompt leaves no room within max_seq_len.
    """
    batch = TextBatch(model, draft=draft)
    _insert_prompt(batch, model, settings)
    parts = []
    while batch:
        for chunk in batch.step():
            if chunk.text:
                on_text(chunk.text)
                parts.append(chunk.text)
            if chunk.finish_reason is not None:
                on_end(chunk)
    return "".join(parts)


def generate_batch(
    model: Model, prompts: Sequence[str], settings: GenerationConfig, *, draft: Draft | None = None
) -> Iterator[str]:
    """Yields the continuation of each prompt, in order; prompts are batched.

    Prompt i uses the seed settings.seed + i and gets the same text as without batching. Raises UserError, before
    generating anything, if a prompt leaves no room within max_seq_len.
    """
    batch = TextBatch(model, draft=draft)
    texts: dict[int, list[str]] = {}
    for i, prompt in enumerate(prompts):
        row_settings = settings.model_copy(update={"prompt": prompt, "seed": (settings.seed + i) % NUM_SEEDS})
        try:
            texts[_insert_prompt(batch, model, row_settings)] = []
        except UserError as error:
            raise UserError(f"prompt {i + 1}: {error}") from error
    finished = set()
    for request in list(texts):
        while request not in finished:
            for chunk in batch.step():
                texts[chunk.request].append(chunk.text)
                if chunk.finish_reason is not None:
                    finished.add(chunk.request)
        yield "".join(texts.pop(request))


def _insert_prompt(batch: TextBatch, model: Model, settings: GenerationConfig) -> int:
    prompt, after_space = split_trailing_space(settings.prompt, model.tokenizer)
    return batch.insert(prompt_ids(model, prompt), settings, model.tokenizer.stop_ids, after_space=after_space)


def stream_token_ids(
    params: Params, model: ModelConfig, context: list[int], settings: GenerationConfig, stop: Collection[int]
) -> Iterator[int]:
    """Yields token ids that continue `context`, up to but not including an id in `stop`.

    Raises UserError if the context leaves no room within max_seq_len.
    """
    batch = Batch(params, model)
    batch.insert(context, settings, stop)
    while batch:
        for output in batch.step():
            if output.token is not None:
                yield output.token


def prompt_ids(model: Model, prompt: str) -> list[int]:
    """Encodes a prompt, after the token that starts a text, if the model has one. Never empty."""
    ids = model.tokenizer.encode_batch([prompt])[0].tolist()
    return [*text_start(model.tokenizer, model.config.bos_id), *ids] or [model.bos_id]
