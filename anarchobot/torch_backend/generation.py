"""Text generation without a KV cache: each token recomputes the whole sequence. Sampling uses NumPy, so that it is the
same on every device."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.tokenizers.decoding import TextStream
from anarchobot.tokenizers.tokenizer import Tokenizer, text_start
from anarchobot.tokenizers.trailing_space import split_trailing_space, starts_with_space
from anarchobot.torch_backend.loss import logits
from anarchobot.torch_backend.model import Params, head_name, hidden_states

PENALTY_WINDOW = 20  # most recent tokens that repetition_penalty applies to, as in inference/sampling.py

Logits = npt.NDArray[np.float64]


def generate(weights: Params, model: ModelConfig, tokenizer: Tokenizer, settings: GenerationConfig) -> str:
    """Returns the continuation of settings.prompt, with the stopping rules of `inference.generation.generate`. Raises
    UserError if the prompt leaves no room within max_seq_len."""
    text, after_space = split_trailing_space(settings.prompt, tokenizer)
    prompt = tokenizer.encode_batch([text])[0].tolist()
    context = [*text_start(tokenizer, model.bos_id), *prompt] or [tokenizer.eod_id]
    stream = TextStream(tokenizer, prompt, settings.stop, drop_space=after_space)
    first = starts_with_space(tokenizer) if after_space else None
    parts = []
    for token in stream_token_ids(weights, model, context, settings, tokenizer.stop_ids, first):
        parts.append(stream.add(token))
        if stream.stop_string is not None:
            break
    return "".join([*parts, stream.finish()])


def stream_token_ids(
    weights: Params,
    model: ModelConfig,
    context: list[int],
    settings: GenerationConfig,
    stop: Collection[int],
    first: npt.NDArray[np.bool_] | None = None,
) -> Iterator[int]:
    """Yields token ids that continue `context`, up to but not including an id in `stop`. The first one is one of
    `first` [V]."""
    ids, room = list(context), model.max_seq_len - len(context)
    if room < 1:
        raise UserError(
            f"the prompt has {len(ids)} tokens, but the model's max_seq_len is {model.max_seq_len}: shorten it"
        )
    head = weights[head_name(model)]
    rng = np.random.default_rng(settings.seed)
    for _ in range(min(settings.max_new_tokens, room)):
        with torch.no_grad():
            hidden = hidden_states(weights, torch.tensor([ids], device=head.device), model)
            z = np.array(logits(hidden[0, -1:], head, model)[0].cpu(), np.float64)  # [V]
        if first is not None and len(ids) == len(context):
            z = np.where(first, z, -np.inf)
        token = sample(apply_penalties(z, ids, len(context), settings), settings, rng)
        if token in stop:
            return
        yield token
        ids.append(token)


def apply_penalties(z: Logits, ids: list[int], prompt_length: int, settings: GenerationConfig) -> Logits:
    """Lowers the logits [V] of the tokens in `ids`, as `inference.sampling.Penalties` does."""
    recent, penalty = np.unique(ids[-PENALTY_WINDOW:]), settings.repetition_penalty
    z = z.copy()
    z[recent] = np.where(z[recent] < 0, z[recent] * penalty, z[recent] / penalty)
    counts = np.bincount(ids[prompt_length:], minlength=len(z))
    z -= settings.frequency_penalty * counts + settings.presence_penalty * (counts > 0)
    return z


def sample(z: Logits, settings: GenerationConfig, rng: np.random.Generator) -> int:
    """Samples an id from logits [V]: applies the temperature, then top_k, top_p and min_p."""
    if settings.is_greedy:
        return int(z.argmax())
    top_k, top_p, min_p = settings.filters
    p: npt.NDArray[Any] = np.exp((z - z.max()) / settings.temperature)
    order = np.argsort(-p, kind="stable")[: top_k or None]  # most likely first
    p = p[order] / p[order].sum()
    p = p[: np.searchsorted(np.cumsum(p), top_p) + 1]  # the smallest set with a total probability of at least top_p
    p = p[p >= min_p * p[0]]
    return int(rng.choice(order[: len(p)], p=p / p.sum()))
