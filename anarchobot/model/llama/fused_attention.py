"""Causal attention for training on a GPU: forward by MLX's fused kernel, with a hand-written gradient.

MLX's own gradient of attention is fused only on CUDA (cuDNN). On Metal it keeps the probabilities of all layers, and
inside `mx.grad` even the forward pass is unfused. Here the forward pass is outside of `mx.grad`, and the backward pass
recomputes the probabilities of a block of queries at a time, in the dtype of the products, with a softmax that computes
in float32. The matrix product adds the mask (`mx.addmm`).

Shapes: B batch, L sequence, K key/value heads, G query heads for each of them, H = K G, E head width; N = B L; l
queries of a block.
"""

from functools import cached_property

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model.architecture import query_blocks
from anarchobot.model.llama.attention import (
    AttentionOutput,
    HeadNorms,
    attention_mask,
    extend_keys,
    norm_and_rotate,
    rope,
    visible_keys,
)
from anarchobot.numerics.eval_order import EvalOrder, depend

KERNEL_HEADS = (64, 72, 80, 96, 128)  # head widths of Metal's kernel; for others MLX computes all scores of a call
_MASKED = -3e4  # added to a score; float16 ends at 65504


class FusedTrainingAttention:
    """Attention over B rows of L tokens. `segments` [B, L] number the documents of a row: a token sees only its own.
    With a `window`, it sees only the last `window` tokens. There is no softcap, since the kernel has none.

    `dtype` is that of the products. `block` is the number of queries per block of the backward pass; None: chosen by
    the memory of their scores. Each block waits for the previous one. `kernel_gradient`: MLX's gradient, not blocks.
    """

    def __init__(
        self,
        model: ModelConfig,
        batch: int,
        length: int,
        dtype: mx.Dtype,
        segments: mx.array | None = None,
        block: int | None = None,
        wait: EvalOrder = depend,
        kernel_gradient: bool = False,
        window: int | None = None,
    ) -> None:
        self.model, self.wait = model, wait
        self._batch, self._length, self._dtype, self._segments = batch, length, dtype, segments
        self._kernel_gradient, self._scale = kernel_gradient, model.softmax_scale
        self._window = None if window is None or window >= length else window
        self._rope = rope(model, window, length)
        self._blocks = query_blocks(batch, model.n_heads, length, block, on_cpu=False)

    def forward(self, q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms | None) -> AttentionOutput:
        """`q` [N, H E] and `k`, `v` [N, K E] are the projections, before norm and rotation."""
        queries, keys = self._rotated(q, norms and norms.q), self._rotated(k, norms and norms.k)
        out = self._rows(self._attend(queries, keys, self._heads(v)))
        # With norms, the backward pass needs the projections; it recomputes the rest.
        return AttentionOutput(out, rotated=(queries, keys) if norms is None else None)

    def backward(
        self,
        q: mx.array | None,
        k: mx.array | None,
        v: mx.array,
        norms: HeadNorms | None,
        attended: AttentionOutput,
        dout: mx.array,
    ) -> tuple[mx.array, mx.array, mx.array, HeadNorms | None]:
        """Returns the gradients of q, k, v and the norms' weights, given the gradient `dout` [N, H E] of the output.
        `q` and `k` are needed only with norms."""
        gradients = self._kernel_backward if self._kernel_gradient else self._blocks_backward
        if attended.rotated is not None:
            dq, dk, dv = gradients(*attended.rotated, self._heads(v), attended.out, dout)
            return self._rotated_back(dq), self._rotated_back(dk), dv, None
        assert q is not None and k is not None and norms is not None
        queries, keys = self._rotated(q, norms.q), self._rotated(k, norms.k)
        dq, dk, dv = gradients(queries, keys, self._heads(v), attended.out, dout)
        _, (dq, dq_norm) = mx.vjp(self._rotated, [q, norms.q], [dq])
        _, (dk, dk_norm) = mx.vjp(self._rotated, [k, norms.k], [dk])
        return dq, dk, dv, HeadNorms(dq_norm, dk_norm)

    def _attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """[B, H, L, E] of rotated queries [B, H, L, E], and keys and values [B, K, L, E]."""
        causal = self._segments is None and self._window is None
        if causal and (self.model.head_size in KERNEL_HEADS or self._kernel_gradient):
            return self._kernel(queries, keys, values, "causal")
        outs = []
        for start, end in self._blocks:
            seen = slice(self._first(start), end)
            outs.append(
                self._kernel(queries[:, :, start:end], keys[:, :, seen], values[:, :, seen], self._mask(start, end))
            )
        return mx.concatenate(outs, axis=2)

    def _kernel(self, queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str) -> mx.array:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self._scale, mask=mask)

    def _kernel_backward(
        self, queries: mx.array, keys: mx.array, values: mx.array, out: mx.array, dout: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        mask = "causal" if self._segments is None and self._window is None else self._full_mask
        _, (dq, dk, dv) = mx.vjp(
            lambda q, k, v: self._kernel(q, k, v, mask), [queries, keys, values], [self._heads(dout)]
        )
        return dq, dk, self._rows(dv)

    def _blocks_backward(
        self, queries: mx.array, keys: mx.array, values: mx.array, out: mx.array, dout: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The gradients of rotated queries [B, H, L, E] and keys [B, K, L, E], and of values [N, K E], given the output
        and its gradient [N, H E].

        With p the probabilities, s the scale and o the output of a row: dv = p^T do; ds = s p (do v^T - do . o);
        dq = ds k; dk = ds^T q.
        """
        B, K, L, E = keys.shape
        deltas = mx.sum((out.astype(mx.float32) * dout.astype(mx.float32)).reshape(B, L, K, -1, E), axis=-1)
        deltas = deltas.transpose(0, 2, 3, 1)[..., None]  # [B, K, G, L, 1]
        queries, douts = queries.reshape(B, K, -1, L, E), self._heads(dout).reshape(B, K, -1, L, E)
        keys_t, values_t = (x[:, :, None].swapaxes(3, 4) for x in (keys, values))  # [B, K, 1, E, L]

        dqs: list[mx.array] = []
        # No block sees keys after its end: those that no earlier block sees are final.
        dk_tails: list[mx.array] = []
        dv_tails: list[mx.array] = []
        dk = dv = None  # of the keys [first, end) that the last block saw
        for start, end in reversed(self._blocks):
            (rows,) = self.wait([queries[:, :, :, start:end]], [*dk_tails[-1:], *dv_tails[-1:], *dqs[-1:]])
            drows, first = douts[:, :, :, start:end], self._first(start)
            scores = mx.addmm(self._mask(start, end)[:, :, None], rows, keys_t[..., first:end], alpha=self._scale)
            p = mx.softmax(scores, axis=-1, precise=True)  # [B, K, G, l, seen]
            dp = drows @ values_t[..., first:end]
            ds = p.astype(mx.float32) * (dp.astype(mx.float32) - deltas[:, :, :, start:end]) * self._scale
            ds = ds.astype(self._dtype)
            dqs.append((ds @ keys[:, :, None, first:end]).reshape(B, -1, end - start, E))
            dk = _add_product(None if dk is None else extend_keys(dk, self._first(end), first, end), ds, rows)
            dv = _add_product(None if dv is None else extend_keys(dv, self._first(end), first, end), p, drows)
            # Copies, since a slice would keep the whole array in memory.
            dk_tails.append(mx.contiguous(dk[:, :, start - first :]))
            dv_tails.append(mx.contiguous(dv[:, :, start - first :]))
        dq, dk = (mx.concatenate(parts[::-1], axis=2) for parts in (dqs, dk_tails))
        dv = mx.concatenate([part.swapaxes(1, 2) for part in dv_tails[::-1]], axis=1)
        return dq, dk, dv.reshape(B * L, -1)

    def _first(self, start: int) -> int:
        """The first key that a block of queries from `start` on sees."""
        return 0 if self._window is None else max(0, start - self._window + 1)

    def _mask(self, start: int, end: int) -> mx.array:
        """Added to the scores [B, H, l, seen] of the queries start..end: [1, 1, l, seen], or with segments
        [B, 1, l, seen]."""
        if self._segments is not None:
            return self._full_mask[:, :, start:end, self._first(start) : end]
        rows, length = self._last_rows.shape
        return self._last_rows[None, None, rows - (end - start) :, length - end + self._first(start) :]

    @cached_property
    def _last_rows(self) -> mx.array:
        """The mask of the last queries, as many as in the largest block, and all keys: [l, L]. Those of other queries
        are parts of it."""
        most = max(end - start for start, end in self._blocks)
        queries, keys = mx.arange(self._length - most, self._length), mx.arange(self._length)
        return mx.where(visible_keys(queries, keys, self._window), 0, _MASKED).astype(self._dtype)

    @cached_property
    def _full_mask(self) -> mx.array:
        """[B, 1, L, L], or without segments [L, L]."""
        return mx.where(attention_mask(self._segments, self._length, self._window), 0, _MASKED).astype(self._dtype)

    def _heads(self, x: mx.array) -> mx.array:
        """[N, heads E] -> [B, heads, L, E]."""
        return x.reshape(self._batch, self._length, -1, self.model.head_size).swapaxes(1, 2)

    def _rows(self, x: mx.array) -> mx.array:
        """[B, heads, L, E] -> [N, heads E]."""
        return x.swapaxes(1, 2).reshape(self._batch * self._length, -1)

    def _rotated(self, x: mx.array, norm: mx.array | None) -> mx.array:
        """[N, heads E] -> [B, heads, L, E], normalized and rotated."""
        heads = x.reshape(self._batch, self._length, -1, self.model.head_size)
        return norm_and_rotate(heads, norm, self.model, self._rope)

    def _rotated_back(self, dy: mx.array) -> mx.array:
        """The gradient of x, given that of its rotation: [B, heads, L, E] -> [N, heads E]."""
        return self._rows(self._rope.backward(dy))


def _add_product(total: mx.array | None, left: mx.array, right: mx.array) -> mx.array:
    """total + left^T right, summed over the heads of a group and their queries; [B, K, G, l, seen] and
    [B, K, G, l, E] -> [B, K, seen, E]."""
    left, right = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (left, right))
    left = left.swapaxes(2, 3)
    return left @ right if total is None else mx.addmm(total, left, right)
