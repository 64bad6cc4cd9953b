"""Text generation without a KV cache: every token recomputes the whole text. Sampling is done in numpy, so that it is
the same on every device."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.tokenizers.decoding import TextStream
from anarchobot.tokenizers.tokenizer import Tokenizer
from anarchobot.torch_backend.loss import logits
from anarchobot.torch_backend.model import Params, head_name, hidden_states

PENALTY_WINDOW = 20  # tokens that repetition_penalty looks at

Logits = npt.NDArray[np.float64]


def generate(weights: Params, model: ModelConfig, tokenizer: Tokenizer, settings: GenerationConfig) -> str:
    """Returns the continuation of the prompt.

    Ends at max_new_tokens, at an end of document, before the first of the stop strings, or at max_seq_len. The context
    begins with model.bos_id or else with an end of document, like the documents in the shards. The same settings give
    the same text. Raises UserError if the prompt leaves no room in max_seq_len.
    """
    prompt = tokenizer.encode_batch([settings.prompt])[0].tolist()
    stream = TextStream(tokenizer, prompt, settings.stop)
    parts = []
    for token in generate_ids(weights, model, tokenizer.eod_id, prompt, settings):
        parts.append(stream.add(token))
        if stream.stopped:
            break
    return "".join([*parts, stream.finish()])


def generate_ids(
    weights: Params, model: ModelConfig, eod_id: int, prompt: list[int], settings: GenerationConfig
) -> Iterator[int]:
    """Yields the token ids, without a final end of document."""
    begin = eod_id if model.bos_id is None else model.bos_id
    return stream_token_ids(weights, model, [begin, *prompt], settings, {eod_id})


def stream_token_ids(
    weights: Params, model: ModelConfig, context: list[int], settings: GenerationConfig, stop: Collection[int]
) -> Iterator[int]:
    """Yields the ids that follow `context`, up to but not including an id of `stop`."""
    ids = list(context)
    start, room = len(ids), model.max_seq_len - len(ids)
    if room < 1:
        raise UserError(
            f"the prompt is {start} tokens long and the model's max_seq_len is {model.max_seq_len}: shorten it"
        )
    head = weights[head_name(model)]
    rng = np.random.default_rng(settings.seed)
    for _ in range(min(settings.max_new_tokens, room)):
        with torch.no_grad():
            hidden = hidden_states(weights, torch.tensor([ids], device=head.device), model)
            z = np.array(logits(hidden[0, -1:], head, model)[0].cpu(), np.float64)  # [V]
        token = draw(penalized(z, ids, settings.repetition_penalty), settings, rng)
        if token in stop:
            return
        yield token
        ids.append(token)


def penalized(z: Logits, ids: list[int], penalty: float) -> Logits:
    """Lowers the logits [V] of the last 20 tokens: divides them by `penalty`, or multiplies them if negative (Keskar
    et al., 2019)."""
    recent = np.unique(ids[-PENALTY_WINDOW:])
    z = z.copy()
    z[recent] = np.where(z[recent] < 0, z[recent] * penalty, z[recent] / penalty)
    return z


def draw(z: Logits, settings: GenerationConfig, rng: np.random.Generator) -> int:
    """Samples an id from logits [V]: applies the temperature, then the filter of the method."""
    if settings.method == "greedy":
        return int(z.argmax())
    p: npt.NDArray[Any] = np.exp((z - z.max()) / settings.temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")  # most likely first
    kept = len(p)
    if settings.method == "top_k":
        kept = settings.top_k
    elif settings.method == "nucleus":  # the smallest set with a total probability of top_p
        kept = int(np.searchsorted(np.cumsum(p[order]), settings.top_p)) + 1
    elif settings.method == "min_p":
        kept = int((p >= settings.min_p * p.max()).sum())
    candidates = p[order[:kept]]
    return int(rng.choice(order[:kept], p=candidates / candidates.sum()))
