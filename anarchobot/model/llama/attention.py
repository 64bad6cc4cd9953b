"""Causal attention: exact, in O(L) memory and with a hand-written gradient (`BlockedAttention`, for training on a CPU),
or by MLX's fused kernel (`FusedAttention`), which MLX can differentiate and which takes a KV cache for generation.
Training on a GPU has fused_attention.py.

BlockedAttention processes blocks of queries sequentially (FlashAttention's recomputation; Dao et al., 2022, algorithm
4). A block sees all keys up to its end, so its softmax needs no second pass, and scores above the diagonal are not
computed at all. The backward pass needs the inputs, the outputs and the logsumexp of each row, and recomputes the
probabilities. MLX's attention saves all of them in training.

Shapes: B batch, L sequence, K key/value heads, G query heads for each of them, E head width; N = B L.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model.architecture import query_blocks
from anarchobot.numerics.device import on_cpu
from anarchobot.numerics.elementary import exp, row_sums
from anarchobot.numerics.eval_order import EvalOrder, depend

Mask = mx.array | str | None
_MASKED = -1e9  # added to a score, in float32


class HeadNorms(NamedTuple):
    """The weights [E] of the norms of qk_norm."""

    q: mx.array
    k: mx.array


class AttentionOutput(NamedTuple):
    """Outputs [N, K G E], and what the backward pass needs besides: the logsumexp of each row [B, K, G, L], float32, or
    the rotated queries and keys [B, heads, L, E]."""

    out: mx.array
    logsumexp: mx.array | None = None
    rotated: tuple[mx.array, mx.array] | None = None

    def arrays(self, x: mx.array) -> list[mx.array]:
        """`x` and what is computed beside it and saved."""
        return [x, *([] if self.logsumexp is None else [self.logsumexp])]


@dataclass(frozen=True)
class BlockedAttention:
    """Attention over B rows of L tokens. `segments` [B, L] number the documents of a row: a token sees only its own.

    `block` is the number of queries per block; None: chosen by the memory of their scores. Each block waits for
    the previous one.
    """

    model: ModelConfig
    batch: int
    length: int
    segments: mx.array | None = None
    block: int | None = None
    wait: EvalOrder = depend

    def forward(self, q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms | None) -> AttentionOutput:
        """`q` [N, K G E] and `k`, `v` [N, K E] are the projections, before norm and rotation."""
        queries, keys, values = self._prepared(q, k, v, norms)
        outs: list[mx.array] = []
        logsumexp: list[mx.array] = []
        for start, end in self.query_blocks():
            (rows,) = self.wait([self._rows(queries, start, end)], outs[-1:])  # [B, K, G l, E]
            scores = self._scores(rows, keys, start, end)
            highest = mx.max(scores, axis=-1, keepdims=True)
            weights = exp(scores - highest)
            sums = row_sums(weights)  # [B, K, G l, 1]
            out = (weights.astype(q.dtype) @ values[:, :, :end]) * (1 / sums).astype(q.dtype)
            outs.append(self._unfold(out, start, end).transpose(0, 3, 1, 2, 4))  # [B, l, K, G, E]
            logsumexp.append(self._unfold(highest + mx.log(sums), start, end)[..., 0])
        out = mx.concatenate(outs, axis=1).reshape(self.batch * self.length, -1)
        return AttentionOutput(out, mx.concatenate(logsumexp, axis=-1))

    def backward(
        self,
        q: mx.array | None,
        k: mx.array | None,
        v: mx.array,
        norms: HeadNorms | None,
        attended: AttentionOutput,
        dout: mx.array,
    ) -> tuple[mx.array, mx.array, mx.array, HeadNorms | None]:
        """Returns the gradients of q, k, v and the norms' weights, given the gradient `dout` of the output.

        With p the probabilities and o the output of a row: dv = p^T do; ds = p (do v^T - do . o); dq = ds k; dk = ds^T
        q.
        """
        assert q is not None and k is not None
        dq, dk, dv = self._blocks_backward(q, k, v, norms, attended, dout)
        dq, dk, dv = self.wait([dq, dk, dv], [dq, dk, dv])  # frees what only the blocks needed
        dq, dq_norm = self._rope_backward(q, None if norms is None else norms.q, dq)
        (dk,) = self.wait([dk], [dq])
        dk, dk_norm = self._rope_backward(k, None if norms is None else norms.k, dk)
        dv = dv.swapaxes(1, 2).reshape(v.shape)
        return dq, dk, dv, None if dq_norm is None or dk_norm is None else HeadNorms(dq_norm, dk_norm)

    def _blocks_backward(
        self, q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms | None, attended: AttentionOutput, dout: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The gradients of rotated queries [B, H, L, E] and keys, and of values [B, K, L, E]."""
        queries, keys, values = self._prepared(q, k, v, norms)
        rows_out, douts = self._heads(attended.out), self._heads(dout)  # [B, K, G, L, E]
        assert attended.logsumexp is not None
        deltas, logsumexp = row_sums((rows_out * douts).astype(mx.float32)), attended.logsumexp[..., None]

        def block_grads(start: int, end: int, rows: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            weights = exp(self._scores(rows, keys, start, end) - self._rows(logsumexp, start, end))  # [B, K, G l, end]
            drows = self._rows(douts, start, end)
            new_dv = weights.astype(q.dtype).swapaxes(2, 3) @ drows
            dweights = (drows @ values[:, :, :end].swapaxes(2, 3)).astype(mx.float32)
            dscores = (weights * (dweights - self._rows(deltas, start, end))).astype(q.dtype)
            return self._unfold(dscores @ keys[:, :, :end], start, end), dscores.swapaxes(2, 3) @ rows, new_dv

        dqs: list[mx.array] = []
        # The last block sees all keys, each block before it fewer. The keys that no earlier block sees are final.
        dk_tails: list[mx.array] = []
        dv_tails: list[mx.array] = []
        dk = dv = None
        for start, end in reversed(self.query_blocks()):
            (rows,) = self.wait([self._rows(queries, start, end)], [*dk_tails[-1:], *dv_tails[-1:], *dqs[-1:]])
            dq, new_dk, new_dv = block_grads(start, end, rows)  # frees its temporaries
            dqs.append(dq)
            dk = new_dk if dk is None else dk[:, :, :end] + new_dk
            dv = new_dv if dv is None else dv[:, :, :end] + new_dv
            del new_dk, new_dv
            # Copies, since a slice would keep the whole array in memory.
            dk_tails.append(mx.contiguous(dk[:, :, start:]))
            dv_tails.append(mx.contiguous(dv[:, :, start:]))
        dq = mx.concatenate(dqs[::-1], axis=3) * self.model.head_size**-0.5  # [B, K, G, L, E]
        dq = dq.reshape(self.batch, -1, self.length, self.model.head_size)
        return dq, mx.concatenate(dk_tails[::-1], axis=2), mx.concatenate(dv_tails[::-1], axis=2)

    def _prepared(
        self, q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Rotated queries [B, K, G, L, E], scaled by 1 / sqrt(E), keys and values [B, K, L, E]."""
        queries = self._normed_and_rotated(q, None if norms is None else norms.q) * self.model.head_size**-0.5
        keys = self._normed_and_rotated(k, None if norms is None else norms.k)
        values = v.reshape(self.batch, self.length, -1, self.model.head_size).swapaxes(1, 2)
        queries = queries.reshape(self.batch, self.model.kv_heads, -1, self.length, self.model.head_size)
        return queries, keys, mx.contiguous(values)

    def _normed_and_rotated(self, x: mx.array, norm: mx.array | None) -> mx.array:
        return apply_rope(x.reshape(self.batch, self.length, -1, self.model.head_size), norm, self.model)

    def _rope_backward(self, x: mx.array, norm: mx.array | None, dy: mx.array) -> tuple[mx.array, mx.array | None]:
        if norm is None:
            _, (dx,) = mx.vjp(lambda x: self._normed_and_rotated(x, None), [x], [dy])
            return dx, None
        _, (dx, dnorm) = mx.vjp(self._normed_and_rotated, [x, norm], [dy])
        return dx, dnorm

    def _heads(self, x: mx.array) -> mx.array:
        """[N, K G E] -> [B, K, G, L, E]."""
        split = x.reshape(self.batch, self.length, self.model.kv_heads, -1, self.model.head_size)
        return split.transpose(0, 2, 3, 1, 4)

    def query_blocks(self) -> list[tuple[int, int]]:
        """[start, end) of each block of queries, which sees the keys [0, end)."""
        return query_blocks(self.batch, self.model.n_heads, self.length, self.block, on_cpu=on_cpu())

    def _rows(self, x: mx.array, start: int, end: int) -> mx.array:
        """Queries start..end of [B, K, G, L, ...], with the query heads of each KV head flattened:
        [B, K, G l, ...]."""
        return x[:, :, :, start:end].reshape(self.batch, self.model.kv_heads, -1, x.shape[-1])

    def _unfold(self, x: mx.array, start: int, end: int) -> mx.array:
        return x.reshape(self.batch, self.model.kv_heads, -1, end - start, x.shape[-1])

    def _scores(self, rows: mx.array, keys: mx.array, start: int, end: int) -> mx.array:
        """[B, K, G l, end] in float32, masked: very small where a query must not see a key."""
        scores = (rows @ keys[:, :, :end].swapaxes(2, 3)).astype(mx.float32)
        visible = mx.arange(start, end)[:, None] >= mx.arange(end)[None, :]  # [l, end]
        if self.segments is not None:
            same = self.segments[:, start:end, None] == self.segments[:, None, :end]
            visible = (visible & same)[:, None, None]  # [B, 1, 1, l, end]
        bias = (1 - visible.astype(mx.float32)) * _MASKED
        return (self._unfold(scores, start, end) + bias).reshape(scores.shape)


def apply_rope(x: mx.array, norm: mx.array | None, model: ModelConfig, offset: int | mx.array = 0) -> mx.array:
    """Normalizes (qk_norm) and rotates heads [B, L, H, E] to [B, H, L, E]; `offset` is the position of the first token,
    for all rows or for each [B].

    The rotation pairs the halves of a head, as Hugging Face's Llama does; traditional=True would pair neighbors.
    """
    if norm is not None:
        x = mx.fast.rms_norm(x, norm.astype(x.dtype), model.norm_eps)
    return mx.fast.rope(
        x.swapaxes(1, 2), model.head_size, traditional=False, base=model.rope_theta, scale=1.0, offset=offset
    )


class Cache(Protocol):
    """The keys and values of a layer's earlier tokens: mlx-lm's KVCache or, for rows of different lengths,
    BatchKVCache. `offset` is the next token's position, or one for each row [B]."""

    @property
    def offset(self) -> int | mx.array: ...

    def make_mask(self, N: int, *, return_array: bool, window_size: int | None) -> Mask:
        """What N new tokens see: "causal", a boolean array [..., N, S], or None for everything."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]: ...


class FusedAttention:
    """Attention by MLX's fused kernel, with a cache for generation. MLX can differentiate it, but then saves all
    probabilities."""

    def __init__(self, model: ModelConfig, batch: int, length: int, mask: Mask, cache: Cache | None = None) -> None:
        self._model, self._batch, self._length, self._mask, self._cache = model, batch, length, mask, cache

    def forward(self, q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms | None) -> AttentionOutput:
        """`q` [N, K G E] and `k`, `v` [N, K E] are the projections, before norm and rotation."""
        model, offset = self._model, 0 if self._cache is None else self._cache.offset
        q, k, v = (x.reshape(self._batch, self._length, -1, model.head_size) for x in (q, k, v))
        queries = apply_rope(q, norms and norms.q, model, offset)  # [B, H, L, E]
        keys, values = apply_rope(k, norms and norms.k, model, offset), v.swapaxes(1, 2)
        if self._cache is not None:
            keys, values = self._cache.update_and_fetch(keys, values)
        scale = model.head_size**-0.5
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=self._mask)
        return AttentionOutput(out.swapaxes(1, 2).reshape(self._batch * self._length, -1))


def document_mask(segments: mx.array | None, length: int) -> Mask:
    """A causal mask in which a token sees only its own document, [B, 1, L, L]."""
    if segments is None:
        return "causal"
    return ((segments[:, :, None] == segments[:, None, :]) & mx.tri(length, dtype=mx.bool_))[:, None]
