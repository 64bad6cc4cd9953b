"""The model: a pre-norm transformer as one function of its parameters (Llama's form: RoPE, RMSNorm, gated MLP).

There is no module tree: parameters are a flat dict of arrays under Hugging Face Llama's names, which is also what a
checkpoint holds. Master weights are float32; every matrix is cast to the hidden states' dtype where it is used.

Shapes: B batch, L sequence, D d_model, H query heads, K key/value heads, E head width, F mlp width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from anarchobot.config.schema import ModelConfig

Params = dict[str, mx.array]
Mask = mx.array | str | None  # what scaled_dot_product_attention takes


class Cache(Protocol):
    """A layer's keys and values of the tokens before (mlx-lm's KVCache is one)."""

    offset: int

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]: ...


def hidden_states(
    params: Params,
    tokens: mx.array,
    model: ModelConfig,
    *,
    dtype: mx.Dtype = mx.float32,
    segments: mx.array | None = None,
    dropout_key: mx.array | None = None,
    recompute: bool = False,
    caches: Sequence[Cache] | None = None,
) -> mx.array:
    """What the head reads: [B, L, D] in `dtype` after the last norm, for int32 `tokens` [B, L].

    `segments` [B, L], where given, number the documents of a row: a token sees only its own. `dropout_key` turns
    dropout on (training); the same key drops the same places. `recompute` keeps only each block's input for the
    backward pass (gradient checkpointing; Chen et al., 2016). `caches`, one a layer, hold what came before the first of
    `tokens` and are appended to.
    """
    x = params["model.embed_tokens.weight"][tokens].astype(dtype)  # [B, L, D]
    keys = [None] * model.n_layers if dropout_key is None else list(mx.random.split(dropout_key, model.n_layers))
    mask = _mask(tokens.shape[1], segments)
    for i, block in enumerate(_blocks(params, model)):
        if caches is not None:
            x = _block(block, x, model, mask, None, caches[i])
        elif recompute:
            key = keys[i]
            x = mx.checkpoint(lambda block, x, key=key: _block(block, x, model, mask, key, None))(block, x)
        else:
            x = _block(block, x, model, mask, keys[i], None)
    return _norm(x, params["model.norm.weight"], model)


def head_weight(params: Params, model: ModelConfig) -> mx.array:
    """The output head [V, D]: the token embedding itself when they are tied."""
    return params["model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"]


def logits(hidden: mx.array, weight: mx.array, model: ModelConfig) -> mx.array:
    """float32 logits [..., V] of hidden states [..., D]: the product in their dtype, the rest in float32."""
    z = (hidden @ weight.astype(hidden.dtype).T).astype(mx.float32)
    return z if model.logit_softcap is None else model.logit_softcap * mx.tanh(z / model.logit_softcap)


def _mask(length: int, segments: mx.array | None) -> Mask:
    if segments is None:
        return "causal" if length > 1 else None  # a single token sees all that came before
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & mx.tri(length, dtype=mx.bool_)  # [B, 1, L, L]


def _blocks(params: Params, model: ModelConfig) -> list[Params]:
    """Each block's own parameters, by their names inside it: `"self_attn.q_proj.weight"`."""
    blocks: list[Params] = [{} for _ in range(model.n_layers)]
    for name, p in params.items():
        if name.startswith("model.layers."):
            number, _, inner = name.removeprefix("model.layers.").partition(".")
            blocks[int(number)][inner] = p
    return blocks


def _block(
    p: Params, x: mx.array, model: ModelConfig, mask: Mask, key: mx.array | None, cache: Cache | None
) -> mx.array:
    attention_key, mlp_key = (None, None) if key is None else mx.random.split(key)
    attended = _attention(p, _norm(x, p["input_layernorm.weight"], model), model, mask, cache)
    x = x + _dropout(attended, model, attention_key)
    return x + _dropout(_mlp(p, _norm(x, p["post_attention_layernorm.weight"], model), model), model, mlp_key)


def _attention(p: Params, x: mx.array, model: ModelConfig, mask: Mask, cache: Cache | None) -> mx.array:
    B, L, _ = x.shape
    E = model.head_size

    def heads(name: str, n: int) -> mx.array:
        return _linear(p, f"self_attn.{name}", x).reshape(B, L, n, E)

    q, k, v = heads("q_proj", model.n_heads), heads("k_proj", model.kv_heads), heads("v_proj", model.kv_heads)
    if model.qk_norm:
        q, k = _norm(q, p["self_attn.q_norm.weight"], model), _norm(k, p["self_attn.k_norm.weight"], model)
    q, k, v = (y.swapaxes(1, 2) for y in (q, k, v))  # [B, H or K, L, E]
    offset = 0 if cache is None else cache.offset
    # traditional=False rotates the halves of a head, as Hugging Face's Llama does; True would pair neighbours.
    q, k = (mx.fast.rope(y, E, traditional=False, base=model.rope_theta, scale=1.0, offset=offset) for y in (q, k))
    if cache is not None:
        k, v = cache.update_and_fetch(k, v)
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=E**-0.5, mask=mask)  # [B, H, L, E]
    return _linear(p, "self_attn.o_proj", y.swapaxes(1, 2).reshape(B, L, -1))


def _mlp(p: Params, x: mx.array, model: ModelConfig) -> mx.array:
    gate = _linear(p, "mlp.gate_proj", x)  # [B, L, F]
    return _linear(p, "mlp.down_proj", _activation(gate, model) * _linear(p, "mlp.up_proj", x))


def _activation(x: mx.array, model: ModelConfig) -> mx.array:
    if model.ffn_activation == "silu":
        return x * mx.sigmoid(x)
    # gelu's tanh form (Hendrycks and Gimpel, 2016); Python scalars keep the dtype
    return 0.5 * x * (1 + mx.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


def _linear(p: Params, name: str, x: mx.array) -> mx.array:
    return x @ p[f"{name}.weight"].astype(x.dtype).T


def _norm(x: mx.array, weight: mx.array, model: ModelConfig) -> mx.array:
    # The kernel sums in float32; a float32 weight would promote all that follows.
    return mx.fast.rms_norm(x, weight.astype(x.dtype), model.norm_eps)


def _dropout(x: mx.array, model: ModelConfig, key: mx.array | None) -> mx.array:
    if key is None or model.dropout == 0:
        return x
    keep = mx.random.bernoulli(1 - model.dropout, x.shape, key=key)
    return mx.where(keep, x * (1 / (1 - model.dropout)), 0)
