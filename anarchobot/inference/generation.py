"""Text from a model: a prompt in, tokens drawn one by one with a KV cache, text out as it comes."""

import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config, GenerationConfig, ModelConfig
from anarchobot.data.tokenizer import Tokenizer, load_tokenizer
from anarchobot.model.sums import Params
from anarchobot.model.transformer import Cache, hidden_states, logits
from anarchobot.training import checkpoint

CONTEXT = 8  # whole tokens that the next one is decoded with: they decide about the space between
PENALTY_WINDOW = 20  # tokens that repetition_penalty looks back


@dataclass(frozen=True)
class Model:
    """Parameters, their shape and the tokenizer they were trained with: all that generation needs."""

    params: Params
    shape: ModelConfig
    tokenizer: Tokenizer


def load_model(path: str | Path) -> tuple[Model, Config]:
    """The model of a checkpoint (a run folder, a step folder or a file in it) and the config it was trained with.

    Raises UserError when there is no checkpoint, it is damaged, or its tokenizer is gone.
    """
    found = checkpoint.find(path, files=(checkpoint.MODEL_FILE,))
    for text in found.passed_over:
        print(f"warning: {text}: an older step is taken", file=sys.stderr)
    config = found.config
    arrays = checkpoint.load_arrays(found, config.model, optimizer=False)
    prefix = checkpoint.PARAMS
    params = {name.removeprefix(prefix): mx.array(a) for name, a in arrays.items() if name.startswith(prefix)}
    return Model(params, config.model, load_tokenizer(found.folder.parent)), config


def generate(model: Model, settings: GenerationConfig, on_text: Callable[[str], None] = lambda text: None) -> str:
    """The prompt's continuation as text; `on_text` gets it piece by piece, as soon as it is certain.

    Ends at max_new_tokens, at an end of document, or when max_seq_len is reached. The same settings give the same text.
    """
    decoder = StreamDecoder(model.tokenizer, model.tokenizer.encode_batch([settings.prompt])[0].tolist())
    parts = []
    for token in generate_ids(model, settings):
        if piece := decoder.add(token):
            on_text(piece)
            parts.append(piece)
    if rest := decoder.rest():
        on_text(rest)
        parts.append(rest)
    return "".join(parts)


def generate_ids(model: Model, settings: GenerationConfig) -> Iterator[int]:
    """The drawn token ids, without the end of document that may stop them.

    The context begins with an end of document, as documents do in the shards, or with model.bos_id. Raises UserError
    for a prompt that leaves no room in max_seq_len.
    """
    eod = model.tokenizer.eod_id
    begin = eod if model.shape.bos_id is None else model.shape.bos_id
    context = [begin, *model.tokenizer.encode_batch([settings.prompt])[0].tolist()]
    return continued(model.params, model.shape, context, settings, {eod})


def continued(
    params: Params, shape: ModelConfig, context: list[int], settings: GenerationConfig, stop: Collection[int]
) -> Iterator[int]:
    """Token ids drawn one after the other behind those of `context`, without the one of `stop` that may end them.

    Raises UserError for a context that leaves no room in max_seq_len.
    """
    from mlx_lm.models.cache import KVCache  # late: the package takes seconds to import
    from mlx_lm.sample_utils import make_logits_processors

    room = shape.max_seq_len - len(context)
    if room < 1:
        raise UserError(
            f"the prompt is {len(context)} tokens long and the model's max_seq_len is {shape.max_seq_len}: shorten it"
        )
    mx.random.seed(settings.seed)  # training draws from keys of its own and is not disturbed
    draw = sampler(settings, shape.vocab_size)
    penalty = None if settings.repetition_penalty == 1 else settings.repetition_penalty
    processors = make_logits_processors(repetition_penalty=penalty, repetition_context_size=PENALTY_WINDOW)
    caches: list[Cache] = [KVCache() for _ in range(shape.n_layers)]  # type: ignore[no-untyped-call]
    seen = mx.array(context)
    tokens = seen[None]  # [1, L]
    for _ in range(min(settings.max_new_tokens, room)):
        hidden = hidden_states(params, tokens, shape, caches=caches)
        z = logits(hidden[:, -1], params, shape)  # [1, V]
        for process in processors:
            z = process(seen, z)
        token = draw(z)  # [1]
        mx.eval(token)
        drawn = int(np.array(token)[0])
        if drawn in stop:
            return
        yield drawn
        seen = mx.concatenate([seen, token])
        tokens = token[None]


def sampler(settings: GenerationConfig, vocab_size: int) -> Callable[[mx.array], mx.array]:
    """Draws ids [B] from logits [B, V] by the configured method: first the temperature, then the method's filter."""
    from mlx_lm.sample_utils import make_sampler

    if settings.method == "greedy":
        return lambda z: mx.argmax(z, axis=-1)
    # mlx-lm filters before its temperature; dividing first gives the field's order (as in transformers). For mlx-lm
    # a top_k of 0 and a top_p of 0 mean no filter.
    draw = make_sampler(
        temp=1.0,
        top_k=settings.top_k if settings.method == "top_k" and settings.top_k < vocab_size else 0,
        top_p=settings.top_p if settings.method == "nucleus" else 0.0,
    )

    def tempered(z: mx.array) -> mx.array:
        z = z / settings.temperature
        ids: mx.array = draw(z - mx.logsumexp(z, axis=-1, keepdims=True))
        return ids

    return tempered


class StreamDecoder:
    """Ids to text one at a time. A character may be spread over several ids, so text is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer, before: list[int]) -> None:
        """`before`: the ids that the text goes on from; a tokenizer may take a first space for none of the text."""
        self._tokenizer = tokenizer
        self._context = before[-CONTEXT:]
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that is certain now; often a word, sometimes nothing."""
        self._pending.append(token)
        text = self._text()
        # A broken character decodes to U+FFFD; after four tokens it is no character but broken bytes.
        if text.endswith("\ufffd") and len(self._pending) < 4:
            return ""
        return self._flush(text)

    def rest(self) -> str:
        """What is left at the end, whole or not."""
        return self._flush(self._text()) if self._pending else ""

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending).removeprefix(before)

    def _flush(self, text: str) -> str:
        self._context, self._pending = (self._context + self._pending)[-CONTEXT:], []
        return text
