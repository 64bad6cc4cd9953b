"""Models that mlx-lm computes: the forward pass, through mlx-lm's modules (model/mlx_lm/module.py).

Parameters have the names of mlx-lm's module. Every array has the dtype in which it is used (model/mlx_lm/frozen.py).

Shapes: B rows, L tokens, N = B L, D width of the hidden states, V vocabulary.
"""

import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from anarchobot.config.errors import UserError
from anarchobot.config.schema import ModelConfig
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.mlx_lm.frozen import cast_weights
from anarchobot.model.mlx_lm.module import network
from anarchobot.numerics.eval_order import EvalOrder, depend


def hidden_states(
    params: Params,
    tokens: mx.array,
    model: ModelConfig,
    *,
    dtype: mx.Dtype,
    segments: mx.array | None = None,
    caches: Sequence[Any] | None = None,
    lengths: Sequence[int] | None = None,
    wait: EvalOrder = depend,
) -> mx.array:
    """The input of the head [B, L, D] of int32 `tokens` [B, L]. `caches` come from `make_caches`; `lengths` are not
    used. Raises UserError for `segments`: mlx-lm's modules have no mask of documents."""
    if segments is not None:
        raise UserError("data.document_mask, chat.pack: mlx-lm's models can't mask documents: set it to false")
    with network(model, params).bound(cast_weights(params, model, dtype)) as net:
        return net.hidden_states(tokens, caches)


def head_name(model: ModelConfig) -> None:
    """The head is a function of the module."""


def head_logits(hidden: mx.array, params: Params, model: ModelConfig) -> mx.array:
    """The logits [N, V] of hidden states [N, D]."""
    with network(model, params).bound(cast_weights(params, model, hidden.dtype)) as net:
        return net.logits(hidden)


def head_parameters(params: Params, model: ModelConfig) -> list[str]:
    """The names of the parameters that `head_logits` uses."""
    return network(model, params).head_names


def make_caches(params: Params, model: ModelConfig, *, trimmable: bool = False) -> list[Any]:
    """New caches of one row, of the types that mlx-lm uses for this model. Raises UserError if they have to be
    `trimmable` and are not: states, and windows, from which old tokens are gone."""
    from mlx_lm.models.cache import KVCache, make_prompt_cache  # a slow import

    caches: list[Any] = make_prompt_cache(network(model, params).module)
    if trimmable and (other := next((cache for cache in caches if type(cache) is not KVCache), None)):
        name, kind = json.loads(model.hf_config or "{}")["model_type"], type(other).__name__
        raise UserError(
            f"models of type {name} can't be used with a draft model, or as one: tokens can't be removed from mlx-lm's "
            f"{kind}: leave out --draft-model"
        )
    return caches


def can_batch(params: Params, model: ModelConfig) -> bool:
    """Whether mlx-lm's caches of this model can be merged, and the module takes several rows of different lengths."""
    return network(model, params).can_batch
