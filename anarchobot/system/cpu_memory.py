"""The memory of a training step on a CPU, estimated from its shapes: system/memory.py for one or more threads. No MLX
here. The phases at their peaks:

    forward    the last block is computed: the saved activations of the blocks before it, and the arrays of this block
    loss       the saved activations of all blocks, and the logits of one chunk
    backward   a block's MLP, its norm or attention, with what is saved by this block and the blocks before it; with
               gradient checkpointing, also the recomputation. Without earlier micro-batches the first block counts as
               well, where no activations are left but all gradients exist
    norm       the squares of the largest gradient
    update     the optimizer's temporaries: Muon's largest stack of matrices, AdamW's largest parameter

In a part that is evaluated in one call, MLX allocates about fifty operations ahead of what it frees. So all arrays of a
part count together, each once, unless the next operation can reuse its memory. The constants `_FORWARD` and below are
these counts: taken from the code, and fitted to MLX's memory counter on random shapes where they depend on how far MLX
runs ahead. docs/planning.md compares the estimate with MLX's peak on other shapes.

Every thread has separate rows, gradients and temporaries, and in some step all of them are at their peak together.

Shapes: N = B L tokens of a thread, D d_model, A and K the widths of all query and all key heads, F MLP width, V
vocabulary.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from anarchobot.config.schema import Config, TrainConfig
from anarchobot.model.architecture import CPU_LOSS_CHUNK, architecture, query_blocks
from anarchobot.model.parameters import by_block, lowest_trained_block
from anarchobot.numerics.cores import CPU_MLP_ROWS
from anarchobot.optim.param_groups import (
    EMBEDDING,
    HEAD,
    MIN_SIZE_FOR_STRIPS,
    balanced_shares,
    muon_batches,
    state_shapes,
)
from anarchobot.system.memory_phases import MemoryPhases

Shapes = Mapping[str, tuple[int, ...]]


class _Counts(NamedTuple):
    """How many arrays of each kind a part allocates: [N, D], [N, A], [N, K], [N, F], the scores of one block of queries
    (float32), and an MLP chunk's [C, F] and [C, D]."""

    x: float = 0
    q: float = 0
    kv: float = 0
    mlp: float = 0
    scores: float = 0
    chunk_mlp: float = 0
    chunk_x: float = 0


# By item size of the products: float32; float16 or bfloat16, whose norms, rotation and softmax add float32 arrays.
_FORWARD = {4: _Counts(x=5, q=4, kv=4, mlp=2, chunk_mlp=2, scores=4), 2: _Counts(x=7, q=3, kv=6, mlp=5, scores=4.5)}
_ATTENTION_BACKWARD = {4: _Counts(q=4, kv=5, scores=4), 2: _Counts(q=7, kv=2, scores=6)}
_MLP_BACKWARD = {4: _Counts(chunk_mlp=6), 2: _Counts(chunk_mlp=4, chunk_x=8)}
_NORM_BACKWARD = {4: _Counts(x=5, chunk_mlp=4), 2: _Counts(x=10, chunk_mlp=4)}


def cpu_phases(
    config: Config, trained: Shapes, rows: int, itemsize: int, *, workers: int, accumulated: bool
) -> MemoryPhases:
    """A step on `workers` threads with `rows` sequences each that trains the parameters `trained`, with products in a
    dtype of `itemsize` bytes. `accumulated`: it has several micro-batches, so that the gradients of earlier ones
    exist."""
    part = _Part(config, trained, rows, workers, itemsize)
    forward, loss, backward = part.phases(accumulated)
    gradients = 4 * _size(trained)
    by_muon = set(state_shapes(trained, config.train)["muon.momentum"])
    return MemoryPhases(
        activations=workers * part.activations,
        logits=workers * part.logits,
        forward=workers * forward,
        loss=workers * loss,
        backward=workers * backward,
        norm=gradients + max(4 * math.prod(shape) for shape in trained.values()),
        update=gradients + _update(trained, by_muon, config.train, workers),
    )


class _Part:
    """The memory of one thread for its rows, without weights and optimizer state."""

    def __init__(self, config: Config, trained: Shapes, rows: int, workers: int, itemsize: int) -> None:
        model, train, length = config.model, config.train, config.data.seq_len
        n = rows * length
        self._config, self._trained, self._itemsize, self._workers = config, trained, itemsize, workers
        self._sizes = architecture(model.architecture).activation_sizes(model, n, itemsize)
        self._x = self._sizes.x
        blocks = query_blocks(rows, model.n_heads, length, train.attention_block, on_cpu=True)
        scores = max((end - start) * end for start, end in blocks)
        self._mask = 5 * scores  # as bytes and as float32
        self._scores = 4 * rows * model.n_heads * scores
        mlp_rows = min(n, CPU_MLP_ROWS)
        self._chunk_x, self._chunk_mlp = itemsize * mlp_rows * model.d_model, itemsize * mlp_rows * model.mlp_size
        self._loss_chunk = -(-(train.loss_chunk or CPU_LOSS_CHUNK) // workers)
        self._dequantized = itemsize * model.d_model * model.mlp_size if _has_quantized_base(config) else 0
        # In half precision, all matrices are cast once for each step; LoRA's base model is stored in it.
        self._copies = 0
        if itemsize == 2 and not config.lora.r:
            self._copies = itemsize * _size({name: shape for name, shape in trained.items() if len(shape) == 2})
        self.logits, self._several_chunks = self._logits(n), n > self._loss_chunk

    def _bytes(self, counts: _Counts) -> int:
        x, q, kv, mlp, _ = self._sizes
        sizes = (x, q, kv, mlp, self._scores, self._chunk_mlp, self._chunk_x)
        total = round(sum(count * size for count, size in zip(counts, sizes, strict=True)))
        return total + (self._mask if counts.scores else 0)

    @property
    def activations(self) -> int:
        model, train = self._config.model, self._config.train
        if train.gradient_checkpointing:
            return (model.n_layers - 1) * self._x + self._sizes.saved + self._block_forward(self._sizes.mlp)
        return model.n_layers * self._sizes.saved + self._x

    def phases(self, accumulated: bool) -> tuple[int, int, int]:
        """The peaks of forward, loss and backward. `accumulated`: the gradients of earlier micro-batches exist."""
        model, recompute = self._config.model, self._config.train.gradient_checkpointing
        lowest = lowest_trained_block(self._trained, model)
        saved = self._x if recompute else self._sizes.saved  # by each block
        gradients = 4 * _size(self._trained)
        block_gradients = [4 * _size(block) for block in by_block(self._trained, model)]
        # Without earlier micro-batches, the head's gradient is the first, and exists from its first chunk on; the
        # embedding's is the last, unless it is the head's.
        embedding = 4 * math.prod(self._trained[EMBEDDING]) if HEAD in self._trained else 0
        other_gradients = gradients - sum(block_gradients) - embedding  # of the head and the last norm
        before_last_chunk = other_gradients if self._several_chunks else 0
        forward = (gradients if accumulated else 0) + max(0, model.n_layers - 1 - lowest) * saved
        forward += self._x + self._block_forward(self._sizes.mlp) + self._copies
        loss = self._copies + (gradients if accumulated else before_last_chunk) + (model.n_layers - lowest) * saved
        loss += 3 * self._x + self.logits

        backward = self._copies + gradients + 2 * self._x  # at the end
        for i in range(lowest, model.n_layers):
            live = gradients if accumulated else other_gradients + sum(block_gradients[i:])
            live += self._copies + (i - lowest) * saved + self._x
            backward = max(backward, live + self._block_backward(accumulated))
        return forward, loss, backward

    def _block_forward(self, gate: int) -> int:
        """The peak of a block's forward pass, in which the MLP's `gate` and up are computed. MLX runs ahead by about as
        many operations as there are from the scores to the end of the first chunk. Adapters add operations, so that the
        scores are freed before that chunk; several threads share what MLX runs ahead, and free them before the MLP."""
        counts = _FORWARD[self._itemsize]
        attention = self._bytes(counts._replace(scores=0, mlp=0, chunk_mlp=0))
        scores = self._bytes(_Counts(scores=counts.scores))
        gate_up, chunk = round(counts.mlp * gate), round(counts.chunk_mlp * self._chunk_mlp)
        if self._config.lora.r:  # the products of o and down with the base and with the adapters, and the sums
            chunk += 4 * self._x + 3 * self._dequantized
        if self._workers > 1:
            return attention + max(scores, gate_up + chunk)
        return attention + gate_up + (max(scores, chunk) if self._config.lora.r else scores + chunk)

    def _block_backward(self, accumulated: bool) -> int:
        """The highest peak of a block's backward pass, with what the block has saved."""
        model, train = self._config.model, self._config.train
        x, _, _, mlp, saved = self._sizes
        others = saved - 2 * mlp  # without gate and up, which are consumed chunk by chunk
        gate_up = 2 * (self._chunk_mlp if train.gradient_checkpointing else mlp)
        several_chunks = mlp > self._chunk_mlp
        joined = 2 * x if several_chunks else 0  # the gradients of the chunks, and all of them
        mlp_backward = self._bytes(_MLP_BACKWARD[self._itemsize])
        if model.ffn_activation == "gelu" and self._itemsize == 4:  # more steps than the sigmoid's
            mlp_backward += 2 * self._chunk_mlp
        products = 0
        if self._itemsize == 2 and not self._config.lora.r:  # of gate and up: in half precision, and to be added
            products = (12 if accumulated or several_chunks else 4) * model.d_model * model.mlp_size
        parts = [
            gate_up + mlp_backward + products,
            joined + self._bytes(_NORM_BACKWARD[self._itemsize]) + 2 * self._dequantized,
            self._bytes(_ATTENTION_BACKWARD[self._itemsize]) - x,
        ]
        if train.gradient_checkpointing:  # only the first chunk of the MLP is recomputed with attention
            parts.append(x + self._block_forward(self._chunk_mlp) - others)
        return others + max(parts) + (x if model.dropout else 0)

    def _logits(self, n: int) -> int:
        """One chunk [C, V]: float32 logits, exponentials and two temporaries; a quantized head, dequantized twice;
        in half precision also the arrays of a norm and a separate gradient of the head."""
        model, itemsize, quantized = self._config.model, self._itemsize, _has_quantized_base(self._config)
        chunk, head = min(n, self._loss_chunk) * model.vocab_size, model.vocab_size * model.d_model
        if itemsize == 4:
            return 16 * chunk + (8 * head if quantized else 0)
        size = 18 * chunk + (4 * head if quantized else 7 * self._x)
        return size if self._config.lora.r else max(size, 4 * chunk + 8 * head)


def _update(trained: Shapes, by_muon: set[str], train: TrainConfig, workers: int) -> int:
    """Temporaries of the update: their peak over all threads, net of the gradients freed so far."""
    peak = 0
    for share in balanced_shares(trained, by_muon, workers):
        matrices = {name: trained[name] for name in share if name in by_muon}
        parts = [
            (
                _muon_batch([trained[name] for name in names], names[0], train, workers),
                4 * sum(math.prod(trained[name]) for name in names),
            )
            for names in muon_batches(matrices, train.muon_split_heads)
        ]
        parts += [(4 * math.prod(trained[name]),) * 2 for name in share if name not in by_muon]
        freed = highest = 0
        for temporaries, gradient in parts:
            highest = max(highest, temporaries - freed)
            freed += gradient
        peak += highest
    return peak


def _muon_batch(shapes: list[tuple[int, ...]], name: str, train: TrainConfig, workers: int) -> int:
    """For a stack of S bytes with Gram matrices of G bytes: momenta, look-aheads, directions and new weights are 5.5 S,
    and eleven products of [s, s] come between. In strips, these are so many operations that the first arrays are freed
    before. MLX limits how far it runs ahead over all threads: with several, a batch's look-aheads are freed before its
    products are computed, and most of these before its weights."""
    rows, cols = shapes[0]
    stack = 4 * len(shapes) * rows * cols
    small, large = sorted((rows, cols))
    if train.muon_split_heads and "self_attn" in name:
        return 11 * stack // 2
    gram = stack * small // large
    if workers > 1:
        return max(5 * stack, 2 * stack + 13 * gram)
    return max(8 * stack, 3 * stack + 13 * gram) if small >= MIN_SIZE_FOR_STRIPS else 11 * stack // 2 + 11 * gram


def _has_quantized_base(config: Config) -> bool:
    return config.lora.quantize is not None or config.model.quantization is not None


def _size(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))
