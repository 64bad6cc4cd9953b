"""The Llama family's forward pass: a pre-norm transformer as functions of its parameters.

There is no module tree: parameters are a flat dict of arrays under Hugging Face's names, which is also what a
checkpoint holds. Master weights are float32; every matrix is cast to the hidden states' dtype where it is used.
Quantized matrices and adapters are in the same dict (model/linear.py).

Shapes: B batch, L sequence, N = B L, D d_model, V vocabulary.
"""

from collections.abc import Sequence

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.linear import InputDropout, embedding_rows, matrix
from anarchobot.model.llama import block
from anarchobot.model.llama.attention import (
    BlockedAttention,
    Cache,
    FusedAttention,
    LongRope,
    Mask,
    Rope,
    attention_mask,
    per_block,
    rope,
    rope_of_rows,
)
from anarchobot.model.llama.fused_attention import FusedTrainingAttention
from anarchobot.model.norm import rms_norm
from anarchobot.model.parameters import by_block
from anarchobot.model.step_options import MicroBatch
from anarchobot.numerics import elementary
from anarchobot.numerics.device import on_cpu
from anarchobot.numerics.eval_order import EvalOrder, depend


def hidden_states(
    params: Params,
    tokens: mx.array,
    model: ModelConfig,
    *,
    dtype: mx.Dtype = mx.float32,
    segments: mx.array | None = None,
    caches: Sequence[Cache] | None = None,
    lengths: Sequence[int] | None = None,
    wait: EvalOrder = depend,
) -> mx.array:
    """Returns the final hidden states [B, L, D], normalized and in `dtype`, of int32 `tokens` [B, L]; no dropout.

    `segments` [B, L] number the documents of a row: a token sees only its own. `caches`, one per layer, hold the
    earlier tokens' keys and values and are appended to. Each block waits for the one before it.

    `lengths` [B] say how long each row with caches may become, prompt and answer (default: model.max_seq_len), for
    longrope, which has other frequencies for rows longer than its original context. All tokens of a row have the same
    ones: keys rotated by others would be at the wrong distances.
    """
    B, L = tokens.shape
    x = embed(params, tokens, model, dtype)  # [N, D]
    attentions: Sequence[block.TrainingAttention | FusedAttention]
    if caches is None:
        attentions = _whole_rows(model, B, L, dtype, segments, wait)
    else:
        attentions = _with_caches(model, B, L, caches, lengths or [model.max_seq_len])
    for p, attention in zip(by_block(params, model), attentions, strict=True):
        x, _ = block.attention_forward(p, x, model, attention)
        x, _ = block.mlp_forward(p, x, model)
        (x,) = wait([x], [x])
    return final_norm(params, x, model).reshape(B, L, -1)


def make_caches(params: Params, model: ModelConfig, *, trimmable: bool = False) -> list[Cache]:
    """One of mlx-lm's for each block. That of a block with a window holds only the window, unless `trimmable`."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache  # a slow import

    windows = [None if trimmable else window for window in model.windows]
    return [KVCache() if window is None else RotatingKVCache(window) for window in windows]  # type: ignore[no-untyped-call]


def can_batch(params: Params, model: ModelConfig) -> bool:
    return True


def _whole_rows(
    model: ModelConfig, B: int, L: int, dtype: mx.Dtype, segments: mx.array | None, wait: EvalOrder
) -> Sequence[block.TrainingAttention]:
    def attention(window: int | None) -> block.TrainingAttention:
        if on_cpu() or model.attention_softcap is not None:
            return BlockedAttention(model, B, L, segments, wait=wait, window=window)
        return FusedTrainingAttention(model, B, L, dtype, segments, wait=wait, window=window)

    return per_block(model, attention)


def _with_caches(
    model: ModelConfig, B: int, L: int, caches: Sequence[Cache], lengths: Sequence[int]
) -> Sequence[FusedAttention]:
    def mask_and_rope(window: int | None) -> tuple[Mask, Rope | LongRope]:
        cache = caches[model.windows.index(window)]
        mask = cache.make_mask(L, return_array=False, window_size=window)
        return mask, rope_of_rows(model, window, lengths)

    shared = per_block(model, mask_and_rope)
    return [FusedAttention(model, B, L, *parts, cache) for parts, cache in zip(shared, caches, strict=True)]


def embed(params: Params, tokens: mx.array, model: ModelConfig, dtype: mx.Dtype) -> mx.array:
    """The token embeddings [N, D] in `dtype`, times model.embedding_scale, which is rounded to `dtype` like Gemma's in
    transformers: sqrt(1152) is 34 in bfloat16."""
    x = embedding_rows(matrix(params, "model.embed_tokens"), tokens.reshape(-1)).astype(dtype)
    return x if model.embedding_scale is None else x * model.embedding_scale


def layer(p: Params, x: mx.array, i: int, model: ModelConfig, batch: MicroBatch) -> mx.array:
    """Block `i` on the hidden states [N, D], differentiable by MLX."""
    drop = dropout_keys(batch.dropout_key, model, batch.adapter_dropout)[i]
    rows, length = batch.tokens.shape
    window = model.windows[i]
    mask: Mask = "causal"
    if batch.segments is not None or (window is not None and window < length):
        mask = attention_mask(batch.segments, length, window)
    attention = FusedAttention(model, rows, length, mask, rope(model, window, length))
    with elementary.differentiable():
        x, _ = block.attention_forward(p, x, model, attention, drop.attention, drop.attention_inputs)
        x, _ = block.mlp_forward(p, x, model, drop.mlp, drop=drop.mlp_inputs)
    return x


def final_norm(params: Params, x: mx.array, model: ModelConfig) -> mx.array:
    return rms_norm(x, params["model.norm.weight"], model.norm_eps)


def head_name(model: ModelConfig) -> str:
    """The name of the output head's weight [V, D]: the token embedding if they are tied."""
    return "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"


def dropout_keys(key: mx.array | None, model: ModelConfig, adapter_dropout: float) -> list[block.DropoutKeys]:
    """Returns each block's dropout keys; empty where dropout is off."""
    none = [block.DropoutKeys()] * model.n_layers
    if key is None:
        return none
    keys = none
    if model.dropout > 0:
        split = mx.random.split(key, 2 * model.n_layers)
        keys = [block.DropoutKeys(split[2 * i], split[2 * i + 1]) for i in range(model.n_layers)]
    if adapter_dropout == 0:
        return keys
    split = mx.random.split(mx.random.split(key)[1], 2 * model.n_layers)
    inputs = [InputDropout(adapter_dropout, split[i]) for i in range(2 * model.n_layers)]
    return [k._replace(attention_inputs=inputs[2 * i], mlp_inputs=inputs[2 * i + 1]) for i, k in enumerate(keys)]
