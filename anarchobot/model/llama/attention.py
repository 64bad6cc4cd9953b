"""Causal attention in O(L) memory, exact, with its own gradient: query blocks one after the other (FlashAttention's
recomputation; Dao et al., 2022, algorithm 4).

A block of queries sees all keys up to its own end, so its softmax needs no second pass, and scores above the diagonal
are not computed at all. Kept for the backward pass are the inputs, the outputs and each row's log of its sum of
exponentials; the probabilities are computed again. In training, MLX's own attention would keep all of them.

Shapes: B batch, L sequence, K key/value heads, G query heads for each of them, E head width; N = B L.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model.llama.query_blocks import query_blocks
from anarchobot.numerics.elementary import exp, on_cpu, row_sums
from anarchobot.numerics.sequencing import Wait, tied

_MASKED = -1e9  # added to a score, in float32


class HeadNorms(NamedTuple):
    """The weights [E] of qk_norm."""

    q: mx.array
    k: mx.array


class Attended(NamedTuple):
    """Outputs [N, K G E], and each row's logsumexp [B, K, G, L] in float32."""

    out: mx.array
    log_sums: mx.array


class Attends(Protocol):
    """What mixes tokens: training's Attention, or one with a cache."""

    def forward(self, q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms | None) -> Attended: ...


@dataclass(frozen=True)
class Attention:
    """Attention over B rows of L tokens; `segments` [B, L] number the documents of a row: a token sees its own.

    `block` is the number of queries at a time; None: by the memory that their scores take. A block of queries
    waits for the one before it.
    """

    model: ModelConfig
    batch: int
    length: int
    segments: mx.array | None = None
    block: int | None = None
    wait: Wait = tied

    def forward(self, q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms | None) -> Attended:
        """For projections q [N, K G E] and k, v [N, K E], before norm and rotation."""
        queries, keys, values = self._prepared(q, k, v, norms)
        outs: list[mx.array] = []
        log_sums: list[mx.array] = []
        for start, end in self.query_blocks():
            (rows,) = self.wait([self._rows(queries, start, end)], outs[-1:])  # [B, K, G l, E]
            scores = self._scores(rows, keys, start, end)
            highest = mx.max(scores, axis=-1, keepdims=True)
            weights = exp(scores - highest)
            sums = row_sums(weights)  # [B, K, G l, 1]
            out = (weights.astype(q.dtype) @ values[:, :, :end]) * (1 / sums).astype(q.dtype)
            outs.append(self._unfold(out, start, end).transpose(0, 3, 1, 2, 4))  # [B, l, K, G, E]
            log_sums.append(self._unfold(highest + mx.log(sums), start, end)[..., 0])
        out = mx.concatenate(outs, axis=1).reshape(self.batch * self.length, -1)
        return Attended(out, mx.concatenate(log_sums, axis=-1))

    def backward(
        self, q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms | None, attended: Attended, dout: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, HeadNorms | None]:
        """From `dout`, the gradient of the output: those of q, k, v and of the norms' weights.

        With p the weights and o the output of a row: dv = p^T do; ds = p (do v^T - do . o); dq = ds k; dk = ds^T q.
        """
        dq, dk, dv = self._blocks_backward(q, k, v, norms, attended, dout)
        dq, dk, dv = self.wait([dq, dk, dv], [dq, dk, dv])  # what only the blocks needed is gone
        dq, dq_norm = self._turn_backward(q, None if norms is None else norms.q, dq)
        (dk,) = self.wait([dk], [dq])
        dk, dk_norm = self._turn_backward(k, None if norms is None else norms.k, dk)
        dv = dv.swapaxes(1, 2).reshape(v.shape)
        return dq, dk, dv, None if dq_norm is None or dk_norm is None else HeadNorms(dq_norm, dk_norm)

    def _blocks_backward(
        self, q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms | None, attended: Attended, dout: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The gradients of rotated queries [B, H, L, E] and keys, and of values [B, K, L, E]."""
        queries, keys, values = self._prepared(q, k, v, norms)
        rows_out, douts = self._heads(attended.out), self._heads(dout)  # [B, K, G, L, E]
        deltas, log_sums = row_sums((rows_out * douts).astype(mx.float32)), attended.log_sums[..., None]

        def of_block(start: int, end: int, rows: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            weights = exp(self._scores(rows, keys, start, end) - self._rows(log_sums, start, end))  # [B, K, G l, end]
            drows = self._rows(douts, start, end)
            new_dv = weights.astype(q.dtype).swapaxes(2, 3) @ drows
            dweights = (drows @ values[:, :, :end].swapaxes(2, 3)).astype(mx.float32)
            dscores = (weights * (dweights - self._rows(deltas, start, end))).astype(q.dtype)
            return self._unfold(dscores @ keys[:, :, :end], start, end), dscores.swapaxes(2, 3) @ rows, new_dv

        dqs: list[mx.array] = []
        # The last block's keys are all keys; each block before it sees fewer. What a block alone sees is done with it.
        dk_tails: list[mx.array] = []
        dv_tails: list[mx.array] = []
        dk = dv = None
        for start, end in reversed(self.query_blocks()):
            (rows,) = self.wait([self._rows(queries, start, end)], [*dk_tails[-1:], *dv_tails[-1:], *dqs[-1:]])
            dq, new_dk, new_dv = of_block(start, end, rows)  # what it needs besides goes with it
            dqs.append(dq)
            dk = new_dk if dk is None else dk[:, :, :end] + new_dk
            dv = new_dv if dv is None else dv[:, :, :end] + new_dv
            del new_dk, new_dv
            # Copies: a slice would keep the whole array in memory.
            dk_tails.append(mx.contiguous(dk[:, :, start:]))
            dv_tails.append(mx.contiguous(dv[:, :, start:]))
        dq = mx.concatenate(dqs[::-1], axis=3) * self.model.head_size**-0.5  # [B, K, G, L, E]
        dq = dq.reshape(self.batch, -1, self.length, self.model.head_size)
        return dq, mx.concatenate(dk_tails[::-1], axis=2), mx.concatenate(dv_tails[::-1], axis=2)

    def _prepared(
        self, q: mx.array, k: mx.array, v: mx.array, norms: HeadNorms | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Rotated queries [B, K, G, L, E], scaled by 1 / sqrt(E), keys and values [B, K, L, E]."""
        queries = self._turned(q, None if norms is None else norms.q) * self.model.head_size**-0.5
        keys = self._turned(k, None if norms is None else norms.k)
        values = v.reshape(self.batch, self.length, -1, self.model.head_size).swapaxes(1, 2)
        queries = queries.reshape(self.batch, self.model.kv_heads, -1, self.length, self.model.head_size)
        return queries, keys, mx.contiguous(values)

    def _turned(self, x: mx.array, norm: mx.array | None) -> mx.array:
        return turned(x.reshape(self.batch, self.length, -1, self.model.head_size), norm, self.model)

    def _turn_backward(self, x: mx.array, norm: mx.array | None, dy: mx.array) -> tuple[mx.array, mx.array | None]:
        if norm is None:
            _, (dx,) = mx.vjp(lambda x: self._turned(x, None), [x], [dy])
            return dx, None
        _, (dx, dnorm) = mx.vjp(self._turned, [x, norm], [dy])
        return dx, dnorm

    def _heads(self, x: mx.array) -> mx.array:
        """[N, K G E] -> [B, K, G, L, E]."""
        split = x.reshape(self.batch, self.length, self.model.kv_heads, -1, self.model.head_size)
        return split.transpose(0, 2, 3, 1, 4)

    def query_blocks(self) -> list[tuple[int, int]]:
        """[start, end) of each block of queries, which sees the keys [0, end)."""
        return query_blocks(self.batch, self.model.n_heads, self.length, self.block, on_cpu=on_cpu())

    def _rows(self, x: mx.array, start: int, end: int) -> mx.array:
        """Queries start..end of [B, K, G, L, ...], a key head's query heads under one another: [B, K, G l, ...]."""
        return x[:, :, :, start:end].reshape(self.batch, self.model.kv_heads, -1, x.shape[-1])

    def _unfold(self, x: mx.array, start: int, end: int) -> mx.array:
        return x.reshape(self.batch, self.model.kv_heads, -1, end - start, x.shape[-1])

    def _scores(self, rows: mx.array, keys: mx.array, start: int, end: int) -> mx.array:
        """[B, K, G l, end] in float32, with what a query must not see made very small."""
        scores = (rows @ keys[:, :, :end].swapaxes(2, 3)).astype(mx.float32)
        seen = mx.arange(start, end)[:, None] >= mx.arange(end)[None, :]  # [l, end]
        if self.segments is not None:
            same = self.segments[:, start:end, None] == self.segments[:, None, :end]
            seen = (seen & same)[:, None, None]  # [B, 1, 1, l, end]
        bias = (1 - seen.astype(mx.float32)) * _MASKED
        return (self._unfold(scores, start, end) + bias).reshape(scores.shape)


def turned(x: mx.array, norm: mx.array | None, model: ModelConfig, offset: int | mx.array = 0) -> mx.array:
    """Heads [B, L, H, E] normed (qk_norm) and rotated by their positions from `offset` on, one or each row's [B]:
    [B, H, L, E].

    The rotation pairs the halves of a head, as Hugging Face's Llama does; traditional=True would pair neighbours.
    """
    if norm is not None:
        x = mx.fast.rms_norm(x, norm.astype(x.dtype), model.norm_eps)
    return mx.fast.rope(
        x.swapaxes(1, 2), model.head_size, traditional=False, base=model.rope_theta, scale=1.0, offset=offset
    )
