"""Text from a model: prompts in, tokens drawn one by one with a KV cache, text out as it comes."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.inference.batching import ROWS, Batch, End
from anarchobot.inference.model import Model
from anarchobot.model.gradient_accumulator import Params
from anarchobot.tokenizers.decoding import TextStream

SEEDS = 2**32


class Piece(NamedTuple):
    """Some text of a request, of `tokens` tokens so far; with `end`, it is over: at a token or a text that stops it
    ("stop"), or at a limit ("length")."""

    request: int
    text: str
    tokens: int
    end: End | None


class TextBatch:
    """A Batch whose requests give text, and end at settings.stop too."""

    def __init__(self, model: Model, rows: int = ROWS) -> None:
        self._tokenizer, self._batch = model.tokenizer, Batch(model.params, model.shape, rows)
        self._streams: dict[int, TextStream] = {}
        self._counts: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._batch)

    def insert(self, context: list[int], settings: GenerationConfig, stop: Collection[int]) -> int:
        """As Batch.insert; `context` also says what the text goes on from."""
        request = self._batch.insert(context, settings, stop)
        self._streams[request] = TextStream(self._tokenizer, context, settings.stop)
        self._counts[request] = 0
        return request

    def remove(self, request: int) -> None:
        self._batch.remove(request)
        self._streams.pop(request, None)
        self._counts.pop(request, None)

    def step(self) -> list[Piece]:
        """The texts that are certain after one more token each; one that has nothing to say yet is left out."""
        pieces = []
        for request, token, end in self._batch.step():
            stream, text = self._streams[request], ""
            if token is not None:
                self._counts[request] += 1
                text = stream.add(token)
            if end is not None:
                text += stream.finish()
            if stream.stopped:
                end = "stop"
            if text or end:
                pieces.append(Piece(request, text, self._counts[request], end))
            if end is not None:
                self.remove(request)
        return pieces


def generate(model: Model, settings: GenerationConfig, on_text: Callable[[str], None] = lambda text: None) -> str:
    """The prompt's continuation as text; `on_text` gets it piece by piece, as soon as it is certain.

    Ends at max_new_tokens, at an end of document, before the first of the stop strings, or when max_seq_len is reached.
    The same settings give the same text. Raises UserError for a prompt that leaves no room in max_seq_len.
    """
    batch = TextBatch(model)
    batch.insert(prompt_ids(model, settings.prompt), settings, {model.tokenizer.eod_id})
    parts = []
    while batch:
        for piece in batch.step():
            if piece.text:
                on_text(piece.text)
                parts.append(piece.text)
    return "".join(parts)


def generate_each(model: Model, prompts: Sequence[str], settings: GenerationConfig) -> Iterator[str]:
    """The continuation of each of `prompts`, in their order, written ROWS at a time. The first is drawn with
    settings.seed, the next with one more, and so on: each has the text that it has alone with its seed.

    Raises UserError, before anything is written, for a prompt that leaves no room in max_seq_len.
    """
    batch = TextBatch(model)
    texts: dict[int, list[str]] = {}
    for number, prompt in enumerate(prompts):
        own = settings.model_copy(update={"prompt": prompt, "seed": (settings.seed + number) % SEEDS})
        try:
            texts[batch.insert(prompt_ids(model, prompt), own, {model.tokenizer.eod_id})] = []
        except UserError as error:
            raise UserError(f"prompt {number + 1}: {error}") from error
    over = set()
    for request in list(texts):
        while request not in over:
            for piece in batch.step():
                texts[piece.request].append(piece.text)
                if piece.end is not None:
                    over.add(piece.request)
        yield "".join(texts.pop(request))


def generate_ids(model: Model, settings: GenerationConfig) -> Iterator[int]:
    """The drawn token ids, without the end of document that may stop them. Raises UserError as `generate`."""
    return stream_token_ids(
        model.params, model.shape, prompt_ids(model, settings.prompt), settings, {model.tokenizer.eod_id}
    )


def stream_token_ids(
    params: Params, shape: ModelConfig, context: list[int], settings: GenerationConfig, stop: Collection[int]
) -> Iterator[int]:
    """Token ids drawn one after the other behind those of `context`, without the one of `stop` that may end them.

    Raises UserError for a context that leaves no room in max_seq_len.
    """
    batch = Batch(params, shape)
    batch.insert(context, settings, stop)
    while batch:
        for drawn in batch.step():
            if drawn.token is not None:
                yield drawn.token


def prompt_ids(model: Model, prompt: str) -> list[int]:
    """The ids that a text goes on from."""
    return [model.begin, *model.tokenizer.encode_batch([prompt])[0].tolist()]
