"""The model: a pre-norm transformer as functions of its parameters (Llama's form: RoPE, RMSNorm, gated MLP).

There is no module tree: parameters are a flat dict of arrays under Hugging Face Llama's names, which is also what a
checkpoint holds. Master weights are float32; every matrix is cast to the hidden states' dtype where it is used. Packed
matrices and adapters are in the same dict (model/linear.py).

Shapes: B batch, L sequence, N = B L, D d_model, K key/value heads, E head width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.linear import Matrix, matrix, rows, times_transposed
from anarchobot.model.llama import block
from anarchobot.model.llama.attention import Attended, Attention, HeadNorms, turned
from anarchobot.model.norm import rms_norm
from anarchobot.numerics.sequencing import Wait, tied

Mask = mx.array | str | None


class Cache(Protocol):
    """A layer's keys and values of the tokens before: mlx-lm's KVCache, or for rows of different lengths its
    BatchKVCache. `offset` is the next token's position, or each row's [B]."""

    @property
    def offset(self) -> int | mx.array: ...

    def make_mask(self, N: int, *, return_array: bool, window_size: int | None) -> Mask:
        """What N new tokens see: "causal", an array [..., N, S] of booleans, or None for everything."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]: ...


def hidden_states(
    params: Params,
    tokens: mx.array,
    model: ModelConfig,
    *,
    dtype: mx.Dtype = mx.float32,
    segments: mx.array | None = None,
    caches: Sequence[Cache] | None = None,
    wait: Wait = tied,
) -> mx.array:
    """What the head reads: [B, L, D] in `dtype` after the last norm, for int32 `tokens` [B, L]; for evaluation and use.

    `segments` [B, L], where given, number the documents of a row: a token sees only its own. `caches`, one a layer,
    hold what came before the first of `tokens` and are appended to. Each block waits for the one before it.
    """
    B, L = tokens.shape
    x = embed(params, tokens, model, dtype)  # [N, D]
    attention = Attention(model, B, L, segments, wait=wait)
    mask = None if caches is None else caches[0].make_mask(L, return_array=False, window_size=None)
    first_v = None
    for i, p in enumerate(blocks(params, model)):
        attends = attention if caches is None else CachedAttention(model, B, L, caches[i], mask)
        x, kept = block.attention_forward(p, x, model, attends, first_v=first_v)
        first_v = kept.v if i == 0 and model.value_residual else first_v
        del kept
        x, _ = block.mlp_forward(p, x, model)
        (x,) = wait([x], [x])
    return rms_norm(x, params["model.norm.weight"], model.norm_eps).reshape(B, L, -1)


def embed(params: Params, tokens: mx.array, model: ModelConfig, dtype: mx.Dtype) -> mx.array:
    """The tokens' embeddings [N, D] in `dtype`, times model.embedding_scale."""
    x = rows(matrix(params, "model.embed_tokens"), tokens.reshape(-1))
    return (x if model.embedding_scale is None else x * model.embedding_scale).astype(dtype)


def head_name(model: ModelConfig) -> str:
    """The name of the output head's weight [V, D]: the token embedding itself when they are tied."""
    return "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"


def head_matrix(params: Params, model: ModelConfig) -> Matrix:
    """The output head [V, D]."""
    return matrix(params, head_name(model).removesuffix(".weight"))


def logits(hidden: mx.array, params: Params, model: ModelConfig) -> mx.array:
    """float32 logits [..., V] of hidden states [..., D]: the product in their dtype, the rest in float32."""
    rows_of = hidden.reshape(-1, hidden.shape[-1])
    z = times_transposed(rows_of, head_matrix(params, model)).astype(mx.float32).reshape(*hidden.shape[:-1], -1)
    return z if model.logit_softcap is None else model.logit_softcap * mx.tanh(z / model.logit_softcap)


def blocks(params: Params, model: ModelConfig) -> list[Params]:
    """Each block's own parameters, by their names inside it: `"self_attn.q_proj.weight"`."""
    parts: list[Params] = [{} for _ in range(model.n_layers)]
    for name, p in params.items():
        if name.startswith("model.layers."):
            number, _, inner = name.removeprefix("model.layers.").partition(".")
            parts[int(number)][inner] = p
    return parts


class CachedAttention:
    """Attention to what a cache holds and to the new tokens, with MLX's own kernel: for generation."""

    def __init__(self, model: ModelConfig, batch: int, length: int, cache: Cache, mask: Mask) -> None:
        self._model, self._batch, self._length, self._cache, self._mask = model, batch, length, cache, mask

    def forward(self, q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms | None) -> Attended:
        """For projections q [N, H E] and k, v [N, K E]; there are no log sums."""
        model, offset = self._model, self._cache.offset
        q, k, v = (x.reshape(self._batch, self._length, -1, model.head_size) for x in (q, k, v))
        queries = turned(q, norms and norms.q, model, offset)  # [B, H, L, E]
        keys, values = self._cache.update_and_fetch(turned(k, norms and norms.k, model, offset), v.swapaxes(1, 2))
        scale = model.head_size**-0.5
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=self._mask)
        return Attended(out.swapaxes(1, 2).reshape(self._batch * self._length, -1), mx.array(0.0))
