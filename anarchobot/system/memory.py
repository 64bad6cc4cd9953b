"""The memory of a training step, estimated from its shapes before anything runs. No MLX here.

Weights, optimizer state and gradients exist throughout the step and are counted exactly. Added to them is the most
expensive phase of the step (training/mlx_engine.py, model/llama/gradients.py), at its peak. The phases of a GPU are in
system/gpu_memory.py; those of a CPU are:

    forward    the last block is computed: the saved activations of the blocks before it, and all arrays of this block
    loss       the saved activations of all blocks, and the logits of one chunk
    backward   the gradient of the last block (with gradient checkpointing, the recomputed block as well), or of the
               first block, when no activations are left but all gradients exist
    norm       the squares of the largest gradient
    update     the optimizer's temporaries: Muon's largest stack of matrices, AdamW's largest parameter

In a part that is evaluated in one call, MLX allocates about fifty operations ahead of what it frees. So all arrays of a
part count together, each once, unless the next operation can reuse its memory. The constants `_FORWARD` and below are
these counts: taken from the code, and fitted to MLX's memory counter on random shapes where they depend on how far MLX
runs ahead. docs/planning.md compares the estimate with MLX's peak on other shapes.

Every thread has separate rows, gradients and temporaries.

Shapes: N = B L tokens of a thread, D d_model, A and K the widths of all query and all key heads, F MLP width, V
vocabulary.
"""

import math
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from anarchobot.config.schema import Config, LoraConfig, ModelConfig, TrainConfig
from anarchobot.model.architecture import CPU_LOSS_CHUNK, architecture, query_blocks
from anarchobot.model.lora import GROUP, adapted_matrices, is_quantized, trained_shapes
from anarchobot.model.parameters import by_block, lowest_trained_block, parameter_shapes
from anarchobot.model.quantization import Packing, packings
from anarchobot.numerics.cores import CPU_MLP_ROWS, workers_for
from anarchobot.optim.param_groups import (
    EMBEDDING,
    HEAD,
    MIN_SIZE_FOR_STRIPS,
    balanced_shares,
    muon_batches,
    select_trainable,
    state_shapes,
)
from anarchobot.system.gpu_memory import gpu_phases
from anarchobot.system.module_memory import module_phases

Device = Literal["gpu", "cpu"]
Shapes = Mapping[str, tuple[int, ...]]
# Automatic differentiation saves more than the hand-written gradients that are estimated: at most about so many times.
AUTODIFF_MEMORY = 3


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part. `weights` include the running average; `gradients` and the parts below cover all threads.
    `activations`: peak before the head; `logits`: one chunk of the head; `update`: the optimizer's temporaries.

    `peak` is the highest phase and `phase` its name. The parts do not add up to it: not all exist at the same time.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    update: int
    phases: Mapping[str, int]

    @property
    def phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak(self) -> int:
        return self.phases[self.phase]


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
_FORWARD = {4: _Counts(x=1, q=3, kv=4, mlp=3.1, scores=4), 2: _Counts(x=7, q=3, kv=6, mlp=5, scores=3)}
_ATTENTION_BACKWARD = {4: _Counts(q=3, kv=5, scores=5), 2: _Counts(q=6, kv=2, scores=7)}
_MLP_BACKWARD = {4: _Counts(chunk_mlp=6, chunk_x=2), 2: _Counts(chunk_mlp=4, chunk_x=7)}
_NORM_BACKWARD = {4: _Counts(x=6), 2: _Counts(x=10)}


def estimate(
    config: Config,
    *,
    micro_batch_size: int | None = None,
    device: Device | None = None,
    threads: int | None = None,
    pairs: bool = False,
) -> MemoryEstimate:
    """Estimates the memory of a training step. `micro_batch_size`, `device` and `threads` override the config; `pairs`:
    micro-batches count preference pairs (dpo) of two sequences each."""
    model, train = config.model, config.train
    on_cpu = (device or expected_device(train)) == "cpu"
    micro_batch = micro_batch_size or train.micro_batch_size
    workers = 1
    if on_cpu and not train.compile and model.architecture == "llama":
        workers = workers_for(micro_batch, threads or train.cpu_threads)
    rows = (2 if pairs else 1) * micro_batch // workers
    itemsize = 4 if expected_precision(train, device) == "float32" else 2

    shapes = trained_shapes(model, config.lora)
    trained = {name: shapes[name] for name in select_trainable(shapes, train.trainable)}
    one_gradient = 4 * _size(trained)
    frozen = _frozen_bytes(model, config.lora, itemsize) if config.lora.r else 4 * (_size(shapes) - _size(trained))
    weights = (2 if train.ema_decay else 1) * one_gradient + frozen
    states = state_shapes(shapes, train)
    optimizer = 4 * sum(_size(state) for state in states.values())

    accumulated = train.grad_accum_steps * train.micro_batch_size // micro_batch > 1
    static = weights + optimizer
    if model.architecture == "mlx_lm":
        phases = module_phases(config, trained, rows, itemsize, on_cpu=on_cpu, accumulated=accumulated)
        activations, logits, forward, loss, backward, norm, update = phases
        temporaries = update - one_gradient
    elif on_cpu:
        part = _Part(config, trained, rows, workers, itemsize)
        activations, logits = workers * part.activations, workers * part.logits
        forward, loss, backward = (workers * phase for phase in part.phases(accumulated))
        temporaries, net_update = _update(trained, set(states["muon.momentum"]), train, workers)
        norm, update = one_gradient + max(4 * math.prod(shape) for shape in trained.values()), one_gradient + net_update
    else:
        phases_of_gpu = gpu_phases(config, trained, rows, itemsize, accumulated=accumulated)
        activations, logits, forward, loss, backward, norm, update = phases_of_gpu
        temporaries = update - one_gradient
    if train.technique == "autodiff":
        activations, forward, loss, backward = (AUTODIFF_MEMORY * x for x in (activations, forward, loss, backward))
    return MemoryEstimate(
        weights=weights,
        gradients=workers * one_gradient,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        update=temporaries,
        phases={
            "forward": static + forward,
            "loss": static + loss,
            "backward": static + backward,
            "norm": static + norm,
            "update": static + update,
        },
    )


def expected_device(train: TrainConfig) -> Device:
    """The device that train.device selects, without loading MLX. `auto`: GPU on Apple silicon, CPU elsewhere."""
    if train.device != "auto":
        return train.device
    return "gpu" if sys.platform == "darwin" and platform.machine() == "arm64" else "cpu"


def expected_precision(train: TrainConfig, device: Device | None = None) -> str:
    return train.precision or ("float32" if (device or expected_device(train)) == "cpu" else "bfloat16")


def checkpoint_bytes(config: Config) -> tuple[int, int]:
    """Sizes of model.npz and optimizer.npz without array headers; everything is float32."""
    shapes = trained_shapes(config.model, config.lora)
    states = state_shapes(shapes, config.train)
    moments = sum(_size(state) for state in states.values())
    if config.train.ema_decay:  # the averages are the model then
        moments += sum(math.prod(shapes[name]) for name in select_trainable(shapes, config.train.trainable))
    return 4 * _size(shapes), 4 * moments


class _Part:
    """The memory of one thread for its rows, without weights and optimizer state."""

    def __init__(self, config: Config, trained: Shapes, rows: int, workers: int, itemsize: int) -> None:
        model, train, length = config.model, config.train, config.data.seq_len
        n = rows * length
        self._config, self._trained, self._itemsize = config, trained, itemsize
        self._sizes = architecture(model.architecture).activation_sizes(model, n, itemsize)
        self._x = self._sizes.x
        blocks = query_blocks(rows, model.n_heads, length, train.attention_block, on_cpu=True)
        self._scores = 4 * rows * model.n_heads * max((end - start) * end for start, end in blocks)
        self._scores = self._scores * (workers + 1) // (2 * workers)  # the threads do not all peak at once
        mlp_rows = min(n, CPU_MLP_ROWS)
        self._chunk_x, self._chunk_mlp = itemsize * mlp_rows * model.d_model, itemsize * mlp_rows * model.mlp_size
        self._loss_chunk = -(-(train.loss_chunk or CPU_LOSS_CHUNK) // workers)
        matrices = [math.prod(s) for name, s in parameter_shapes(model).items() if ".layers.0." in name and len(s) == 2]
        self._dequantized = itemsize * sum(matrices) if _has_quantized_base(config) else 0  # a block's
        # In half precision, all matrices are cast once for each step; LoRA's base model is stored in it.
        self._copies = 0
        if itemsize == 2 and not config.lora.r:
            self._copies = itemsize * _size({name: shape for name, shape in trained.items() if len(shape) == 2})
        self.logits, self._several_chunks = self._logits(n), n > self._loss_chunk

    def _bytes(self, counts: _Counts) -> int:
        x, q, kv, mlp, _ = self._sizes
        sizes = (x, q, kv, mlp, self._scores, self._chunk_mlp, self._chunk_x)
        return round(sum(count * size for count, size in zip(counts, sizes, strict=True)))

    @property
    def activations(self) -> int:
        model, train = self._config.model, self._config.train
        if train.gradient_checkpointing:
            return (model.n_layers - 1) * self._x + self._sizes.saved + self._bytes(_FORWARD[self._itemsize])
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
        forward += self._x + self._bytes(_FORWARD[self._itemsize]) + self._dequantized + self._copies
        loss = self._copies + (gradients if accumulated else before_last_chunk) + (model.n_layers - lowest) * saved
        loss += 3 * self._x + self.logits

        backward = self._copies + gradients + 2 * self._x  # at the end
        for i in range(lowest, model.n_layers):
            live = gradients if accumulated else other_gradients + sum(block_gradients[i:])
            live += self._copies + (i - lowest) * saved + 2 * self._x
            backward = max(backward, live + self._sizes.saved + self._block_backward())
        return forward, loss, backward

    def _block_backward(self) -> int:
        model = self._config.model
        mlp = self._bytes(_MLP_BACKWARD[self._itemsize])
        freed = 2 * self._sizes.mlp + self._x  # saved by the MLP half
        if self._config.train.gradient_checkpointing:  # gate and up exist only chunk by chunk
            mlp += 2 * self._chunk_mlp - 2 * self._sizes.mlp
        if self._itemsize == 2 and not self._config.lora.r:  # a product in half precision, in float32, and the sum
            mlp += 12 * model.d_model * model.mlp_size
        attention = self._bytes(_ATTENTION_BACKWARD[self._itemsize])
        norm = self._bytes(_NORM_BACKWARD[self._itemsize])
        return max(mlp, attention - freed, norm - self._x) + self._dequantized

    def _logits(self, n: int) -> int:
        """One chunk [C, V]: float32 logits, exponentials and two temporaries; a quantized head, dequantized twice;
        in half precision also the arrays of a norm and a separate gradient of the head."""
        model, itemsize, quantized = self._config.model, self._itemsize, _has_quantized_base(self._config)
        chunk, head = min(n, self._loss_chunk) * model.vocab_size, model.vocab_size * model.d_model
        if itemsize == 4:
            return 16 * chunk + (8 * head if quantized else 0)
        size = 18 * chunk + (4 * head if quantized else 7 * self._x)
        return size if self._config.lora.r else max(size, 4 * chunk + 8 * head)


def _update(trained: Shapes, by_muon: set[str], train: TrainConfig, workers: int) -> tuple[int, int]:
    """Temporaries of the update: their peak over all threads, and the peak net of the gradients freed so far."""
    peak = net_peak = 0
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
        peak += max((temporaries for temporaries, _ in parts), default=0)
        net_peak += highest
    return peak, net_peak


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


def _frozen_bytes(model: ModelConfig, lora: LoraConfig, itemsize: int) -> int:
    """See model/frozen.py: float32 norms and biases, matrices cast or quantized, DoRA's row norms."""
    total = 0
    shapes, quantized = parameter_shapes(model), packings(model)
    for name, shape in shapes.items():
        size = math.prod(shape)
        if lora.quantize and is_quantized(shape):
            quantized[name] = Packing(lora.quantize, GROUP)
        if len(shape) == 1:
            total += 4 * size
        elif name in quantized:
            bits, group_size = quantized[name]
            total += size * bits // 8 + 2 * itemsize * size // group_size
        else:
            total += itemsize * size
    if lora.dora:
        total += sum(4 * shapes[f"{name}.weight"][0] for name in adapted_matrices(model, lora))
    return total


def _has_quantized_base(config: Config) -> bool:
    return config.lora.quantize is not None or config.model.quantization is not None


def _size(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))
