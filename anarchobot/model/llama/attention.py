"""Causal attention: exact, in O(L) memory and with a hand-written gradient (`BlockedAttention`, for training on a CPU),
or by MLX's fused kernel (`FusedAttention`), which MLX can differentiate and which takes a KV cache for generation.
Training on a GPU has fused_attention.py.

A token sees itself and all earlier tokens, or with a sliding window of w only the last w. Blocks may differ in that and
in their rotary embeddings, so there is one attention per kind of block (`per_block`).

BlockedAttention processes blocks of queries sequentially (FlashAttention's recomputation; Dao et al., 2022, algorithm
4). A block sees all keys from the first window to its end, so its softmax needs no second pass, and the other scores
are not computed at all. The backward pass needs the inputs, the outputs and the logsumexp of each row, and recomputes
the probabilities. MLX's attention saves all of them in training.

Shapes: B batch, L sequence, K key/value heads, G query heads for each of them, E head width; N = B L.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, TypeVar

import mlx.core as mx
import numpy as np

from anarchobot.config.schema import ModelConfig
from anarchobot.model.architecture import query_blocks
from anarchobot.model.llama.rope import attention_factor, has_local_rope, inverse_frequencies
from anarchobot.numerics.device import on_cpu
from anarchobot.numerics.elementary import exp, row_sums, tanh
from anarchobot.numerics.eval_order import EvalOrder, depend

Mask = mx.array | str | None
Attention = TypeVar("Attention")
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


def per_block(model: ModelConfig, make: Callable[[int | None], Attention]) -> list[Attention]:
    """The attention of each block, from `make(window)`; blocks of the same kind share one."""
    kinds = {window: make(window) for window in set(model.windows)}
    return [kinds[window] for window in model.windows]


class Rope(NamedTuple):
    """Rotary embeddings: the first `width` elements of a head are rotated, at frequencies given by `base` or by
    `periods` [width / 2], positions per radian, and multiplied by `factor`.

    The rotation pairs the halves of `width`, as Hugging Face's Llama does; traditional=True would pair neighbors.
    """

    width: int
    base: float | None
    periods: mx.array | None
    factor: float

    def rotate(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """`x` [B, H, L, E]; `offset` is the position of the first token, for all rows or for each [B]."""
        return self._turn(self._scale(x), 1.0, offset)

    def backward(self, dy: mx.array) -> mx.array:
        """The gradient of x, given that of `rotate(x)`. A rotation's transpose turns by the negative angles."""
        return self._scale(self._turn(dy, -1.0, 0))

    def _turn(self, x: mx.array, scale: float, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x, self.width, traditional=False, base=self.base, scale=scale, offset=offset, freqs=self.periods
        )

    def _scale(self, x: mx.array) -> mx.array:
        if self.factor == 1:
            return x
        return x * mx.where(mx.arange(x.shape[-1]) < self.width, self.factor, 1.0).astype(x.dtype)


def rope(model: ModelConfig, window: int | None, length: int) -> Rope:
    """The rotary embeddings of blocks with this sliding window, in sequences of `length` tokens."""
    if model.rope_scaling.type is None or has_local_rope(model, window):
        theta = model.rope_local_theta if window is not None else None
        return Rope(model.rotary_size, theta or model.rope_theta, None, 1.0)
    periods = mx.array((1 / inverse_frequencies(model, window, length)).astype(np.float32))
    return Rope(model.rotary_size, None, periods, attention_factor(model, window))


class LongRope(NamedTuple):
    """Rotary embeddings of rows [B] of which only some are long."""

    short: Rope
    long: Rope
    is_long: mx.array

    def rotate(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """As Rope.rotate."""
        is_long = self.is_long[:, None, None, None]
        return mx.where(is_long, self.long.rotate(x, offset), self.short.rotate(x, offset))


def rope_of_rows(model: ModelConfig, window: int | None, lengths: Sequence[int]) -> Rope | LongRope:
    """The rotary embeddings of rows of these lengths."""
    longest, original = rope(model, window, max(lengths)), model.rope_scaling.original_max_seq_len
    if model.rope_scaling.type != "longrope" or original is None or not min(lengths) <= original < max(lengths):
        return longest
    return LongRope(rope(model, window, original), longest, mx.array([length > original for length in lengths]))


@dataclass(frozen=True)
class BlockedAttention:
    """Attention over B rows of L tokens. `segments` [B, L] number the documents of a row: a token sees only its own.
    With a `window`, it sees only the last `window` tokens.

    `block` is the number of queries per block; None: chosen by the memory of their scores. Each block waits for
    the previous one.
    """

    model: ModelConfig
    batch: int
    length: int
    segments: mx.array | None = None
    block: int | None = None
    wait: EvalOrder = depend
    window: int | None = None

    def forward(self, q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms | None) -> AttentionOutput:
        """`q` [N, K G E] and `k`, `v` [N, K E] are the projections, before norm and rotation."""
        queries, keys, values = self._prepared(q, k, v, norms)
        outs: list[mx.array] = []
        logsumexp: list[mx.array] = []
        for start, end in self.query_blocks():
            (rows,) = self.wait([self._rows(queries, start, end)], outs[-1:])  # [B, K, G l, E]
            scores = self._masked(self._scores(rows, keys, start, end), start, end)
            highest = mx.max(scores, axis=-1, keepdims=True)
            weights = exp(scores - highest)
            sums = row_sums(weights)  # [B, K, G l, 1]
            out = (weights.astype(q.dtype) @ values[:, :, self._first(start) : end]) * (1 / sums).astype(q.dtype)
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
        q. With a softcap c, scores are c tanh(s / c), whose derivative is 1 - tanh(s / c)^2.
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
            seen, scores = slice(self._first(start), end), self._scores(rows, keys, start, end)
            weights = exp(self._masked(scores, start, end) - self._rows(logsumexp, start, end))  # [B, K, G l, seen]
            drows = self._rows(douts, start, end)
            new_dv = weights.astype(q.dtype).swapaxes(2, 3) @ drows
            dweights = (drows @ values[:, :, seen].swapaxes(2, 3)).astype(mx.float32)
            dscores = weights * (dweights - self._rows(deltas, start, end))
            if self.model.attention_softcap is not None:
                dscores = dscores * (1 - mx.square(scores * (1 / self.model.attention_softcap)))
            dscores = dscores.astype(q.dtype)
            return self._unfold(dscores @ keys[:, :, seen], start, end), dscores.swapaxes(2, 3) @ rows, new_dv

        dqs: list[mx.array] = []
        # No block sees keys after its end: those that no earlier block sees are final.
        dk_tails: list[mx.array] = []
        dv_tails: list[mx.array] = []
        dk = dv = None  # of the keys [first, end) that the last block saw
        for start, end in reversed(self.query_blocks()):
            (rows,) = self.wait([self._rows(queries, start, end)], [*dk_tails[-1:], *dv_tails[-1:], *dqs[-1:]])
            dq, new_dk, new_dv = block_grads(start, end, rows)  # frees its temporaries
            dqs.append(dq)
            first = self._first(start)
            dk = new_dk if dk is None else extend_keys(dk, self._first(end), first, end) + new_dk
            dv = new_dv if dv is None else extend_keys(dv, self._first(end), first, end) + new_dv
            del new_dk, new_dv
            # Copies, since a slice would keep the whole array in memory.
            dk_tails.append(mx.contiguous(dk[:, :, start - first :]))
            dv_tails.append(mx.contiguous(dv[:, :, start - first :]))
        dq = mx.concatenate(dqs[::-1], axis=3) * self.model.softmax_scale  # [B, K, G, L, E]
        dq = dq.reshape(self.batch, -1, self.length, self.model.head_size)
        return dq, mx.concatenate(dk_tails[::-1], axis=2), mx.concatenate(dv_tails[::-1], axis=2)

    def _prepared(
        self, q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Rotated and scaled queries [B, K, G, L, E], rotated keys and values [B, K, L, E]."""
        queries = self._normed_and_rotated(q, None if norms is None else norms.q) * self.model.softmax_scale
        keys = self._normed_and_rotated(k, None if norms is None else norms.k)
        values = v.reshape(self.batch, self.length, -1, self.model.head_size).swapaxes(1, 2)
        queries = queries.reshape(self.batch, self.model.kv_heads, -1, self.length, self.model.head_size)
        return queries, keys, mx.contiguous(values)

    def _normed_and_rotated(self, x: mx.array, norm: mx.array | None) -> mx.array:
        heads = x.reshape(self.batch, self.length, -1, self.model.head_size)
        return norm_and_rotate(heads, norm, self.model, self._rope)

    @cached_property
    def _rope(self) -> Rope:
        return rope(self.model, self.window, self.length)

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
        """[start, end) of each block of queries, which sees the keys [first, end)."""
        return query_blocks(self.batch, self.model.n_heads, self.length, self.block, on_cpu=on_cpu())

    def _first(self, start: int) -> int:
        """The first key that a block of queries from `start` on sees."""
        return 0 if self.window is None else max(0, start - self.window + 1)

    def _rows(self, x: mx.array, start: int, end: int) -> mx.array:
        """Queries start..end of [B, K, G, L, ...], with the query heads of each KV head flattened:
        [B, K, G l, ...]."""
        return x[:, :, :, start:end].reshape(self.batch, self.model.kv_heads, -1, x.shape[-1])

    def _unfold(self, x: mx.array, start: int, end: int) -> mx.array:
        return x.reshape(self.batch, self.model.kv_heads, -1, end - start, x.shape[-1])

    def _scores(self, rows: mx.array, keys: mx.array, start: int, end: int) -> mx.array:
        """[B, K, G l, seen] in float32, of the keys [first, end)."""
        scores = (rows @ keys[:, :, self._first(start) : end].swapaxes(2, 3)).astype(mx.float32)
        return softcap(scores, self.model.attention_softcap)

    def _masked(self, scores: mx.array, start: int, end: int) -> mx.array:
        """Very small where a query must not see a key."""
        first = self._first(start)
        visible = visible_keys(mx.arange(start, end), mx.arange(first, end), self.window)  # [l, seen]
        if self.segments is not None:
            same = self.segments[:, start:end, None] == self.segments[:, None, first:end]
            visible = (visible & same)[:, None, None]  # [B, 1, 1, l, seen]
        bias = (1 - visible.astype(mx.float32)) * _MASKED
        return (self._unfold(scores, start, end) + bias).reshape(scores.shape)


def norm_and_rotate(
    x: mx.array, norm: mx.array | None, model: ModelConfig, rope: Rope | LongRope, offset: int | mx.array = 0
) -> mx.array:
    """Normalizes (qk_norm) and rotates heads [B, L, H, E] to [B, H, L, E]; `offset` as in Rope.rotate."""
    if norm is not None:
        x = mx.fast.rms_norm(x, norm.astype(x.dtype), model.norm_eps)
    return rope.rotate(x.swapaxes(1, 2), offset)


def softcap(scores: mx.array, cap: float | None) -> mx.array:
    return scores if cap is None else cap * tanh(scores * (1 / cap))


def visible_keys(queries: mx.array, keys: mx.array, window: int | None) -> mx.array:
    """Which positions of `keys` [S] the positions of `queries` [L] see, bool [L, S]: the last `window` up to their
    own."""
    visible = queries[:, None] >= keys
    return visible if window is None else visible & (queries[:, None] < keys + window)


def extend_keys(total: mx.array, total_first: int, first: int, end: int) -> mx.array:
    """Of `total` [B, K, keys, E], sums over the keys from total_first on, those of the keys [first, end): with zeros in
    front where it has none."""
    total = total[:, :, : end - total_first]
    return total if first == total_first else mx.pad(total, [(0, 0), (0, 0), (total_first - first, 0), (0, 0)])


class Cache(Protocol):
    """The keys and values of a layer's earlier tokens: mlx-lm's KVCache or, of the window, RotatingKVCache; for
    rows of different lengths, BatchKVCache or BatchRotatingKVCache. `offset` is the next token's position, or one for
    each row [B]."""

    @property
    def offset(self) -> int | mx.array: ...

    def make_mask(self, N: int, *, return_array: bool, window_size: int | None) -> Mask:
        """What N new tokens see: "causal", a boolean array [..., N, S], or None for everything."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]: ...


class FusedAttention:
    """Attention by MLX's fused kernel, with a cache for generation. MLX can differentiate it, but then saves all
    probabilities."""

    def __init__(
        self,
        model: ModelConfig,
        batch: int,
        length: int,
        mask: Mask,
        rope: Rope | LongRope,
        cache: Cache | None = None,
    ) -> None:
        self._model, self._batch, self._length, self._mask, self._rope = model, batch, length, mask, rope
        self._cache = cache

    def forward(self, q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms | None) -> AttentionOutput:
        """`q` [N, K G E] and `k`, `v` [N, K E] are the projections, before norm and rotation."""
        model, offset = self._model, 0 if self._cache is None else self._cache.offset
        q, k, v = (x.reshape(self._batch, self._length, -1, model.head_size) for x in (q, k, v))
        queries = norm_and_rotate(q, norms and norms.q, model, self._rope, offset)  # [B, H, L, E]
        keys, values = norm_and_rotate(k, norms and norms.k, model, self._rope, offset), v.swapaxes(1, 2)
        if self._cache is not None:
            keys, values = self._cache.update_and_fetch(keys, values)
        out = self._attend(queries, keys, values)
        return AttentionOutput(out.swapaxes(1, 2).reshape(self._batch * self._length, -1))

    def _attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """[B, H, L, E] of queries [B, H, L, E], and keys and values [B, K, S, E]."""
        mask, scale, cap = self._mask, self._model.softmax_scale, self._model.attention_softcap
        if cap is None:
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
        B, H, L, E = queries.shape
        K, S = keys.shape[1:3]
        scores = (queries.reshape(B, K, -1, L, E) @ keys[:, :, None].swapaxes(3, 4)).astype(mx.float32)
        scores = softcap(scores * scale, cap)  # [B, K, G, L, S]
        if mask is not None:
            visible = mask if isinstance(mask, mx.array) else visible_keys(mx.arange(S - L, S), mx.arange(S), None)
            visible = visible[:, :, None] if visible.ndim == 4 else visible
            scores = scores + mx.where(visible, 0, _MASKED)
        p = mx.softmax(scores, axis=-1).astype(values.dtype)
        return (p @ values[:, :, None]).reshape(B, H, L, E)


def attention_mask(segments: mx.array | None, length: int, window: int | None) -> mx.array:
    """What the tokens of a sequence see, bool [L, L], or with documents, of which a token sees only its own,
    [B, 1, L, L]."""
    visible = visible_keys(mx.arange(length), mx.arange(length), window)
    return visible if segments is None else ((segments[:, :, None] == segments[:, None, :]) & visible)[:, None]
