"""Text generation: prompts are encoded, tokens are sampled with a KV cache, and text is streamed."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.inference import batching
from anarchobot.inference.batching import Batch, FinishReason
from anarchobot.inference.model import Model
from anarchobot.model.gradient_accumulator import Params
from anarchobot.tokenizers.decoding import TextStream
from anarchobot.tokenizers.tokenizer import text_start
from anarchobot.tokenizers.trailing_space import split_trailing_space, starts_with_space

NUM_SEEDS = 2**32


class TextChunk(NamedTuple):
    """New text of a request. `tokens` counts all tokens generated so far. `finish_reason` is set in the last chunk: a
    stop token or string ("stop") or a limit ("length")."""

    request: int
    text: str
    tokens: int
    finish_reason: FinishReason | None


class TextBatch:
    """A `Batch` whose requests produce text and also end at a string in settings.stop."""

    def __init__(self, model: Model, max_rows: int | None = None) -> None:
        self._tokenizer = model.tokenizer
        self._batch = Batch(model.params, model.config, max_rows or batching.MAX_ROWS)
        self._streams: dict[int, TextStream] = {}
        self._counts: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._batch)

    def insert(
        self, context: list[int], settings: GenerationConfig, stop: Collection[int], *, after_space: bool = False
    ) -> int:
        """Adds a request like `Batch.insert`. A string in settings.stop that names a control token ends it at that
        token: decoded text does not contain it. `after_space`: the prompt ended in a space that is not in `context`
        (tokenizers/trailing_space.py)."""
        controls = self._tokenizer.control_tokens
        stop = {*stop, *(controls[text] for text in settings.stop if text in controls)}
        first = mx.array(starts_with_space(self._tokenizer)) if after_space else None
        request = self._batch.insert(context, settings, stop, first)
        self._streams[request] = TextStream(self._tokenizer, context, settings.stop, drop_space=after_space)
        self._counts[request] = 0
        return request

    def remove(self, request: int) -> None:
        self._batch.remove(request)
        self._streams.pop(request, None)
        self._counts.pop(request, None)

    def step(self) -> list[TextChunk]:
        """Generates one token per request and returns the text that is final; requests without new text are omitted."""
        chunks = []
        for request, token, finish_reason in self._batch.step():
            stream, text = self._streams[request], ""
            if token is not None:
                self._counts[request] += 1
                text = stream.add(token)
            if finish_reason is not None:
                text += stream.finish()
            if stream.stopped:
                finish_reason = "stop"
            if text or finish_reason:
                chunks.append(TextChunk(request, text, self._counts[request], finish_reason))
            if finish_reason is not None:
                self.remove(request)
        return chunks


def generate(
    model: Model,
    settings: GenerationConfig,
    on_text: Callable[[str], None] = lambda text: None,
    on_end: Callable[[TextChunk], None] = lambda chunk: None,
) -> str:
    """Returns the continuation of settings.prompt; `on_text` receives it in pieces as it is generated, and `on_end` its
    last chunk.

    Generation ends at max_new_tokens, at the model's end tokens, before the first stop string, or at max_seq_len. Equal
    settings give equal text. Raises UserError if the prompt leaves no room within max_seq_len.
    """
    batch = TextBatch(model)
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


def generate_batch(model: Model, prompts: Sequence[str], settings: GenerationConfig) -> Iterator[str]:
    """Yields the continuation of each prompt, in order; prompts are batched.

    Prompt i uses the seed settings.seed + i and gets the same text as without batching. Raises UserError, before
    generating anything, if a prompt leaves no room within max_seq_len.
    """
    batch = TextBatch(model)
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
