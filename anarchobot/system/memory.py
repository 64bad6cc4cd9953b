"""The memory of a training step, estimated from its shapes before anything runs. No MLX here.

What exists throughout the step is exact: weights, optimizer state, gradients. To it comes the phase of the step that
needs most (training/mlx_engine.py, model/llama/gradients.py), at its highest moment:

    forward    the last block is computed: the saved activations of the blocks before it, and all its own arrays
    loss       the saved activations of all blocks, and the logits of one chunk
    backward   the gradient of the last block (with gradient checkpointing, the recomputed block as well), or of the
               first block, when no activations are left but all gradients exist
    norm       the squares of the largest gradient
    update     the optimizer's temporaries: Muon's largest stack of matrices, AdamW's largest parameter

Within a part that is evaluated as a whole, MLX allocates about fifty operations ahead of what it frees. So all arrays
of a part count together, each once, unless the next operation can reuse its memory. The constants `_FORWARD` and below
are these counts: read from the code, and fitted to MLX's own counter on random shapes where they depend on how far MLX
runs ahead. docs/planning.md compares the estimate with MLX's peak on other shapes.

On a CPU, every thread has its own rows, gradients and temporaries. On a GPU the same counts are used; they have not
been measured there.

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
from anarchobot.model.architecture import architecture, query_blocks
from anarchobot.model.lora import GROUP, adapted_matrices, is_quantized, trained_shapes
from anarchobot.model.parameters import parameter_shapes
from anarchobot.numerics.cores import CPU_MLP_ROWS, workers_for
from anarchobot.optim.param_groups import MIN_SIZE_FOR_STRIPS, balanced_shares, muon_stacks, state_shapes
from anarchobot.optim.param_groups import trained as trained_names

Device = Literal["gpu", "cpu"]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class MemoryEstimate:
    """In bytes. `weights` are all of the model's, including the running average; `gradients` those of all threads;
    `activations` the highest amount before the head, `logits` that of a chunk of the head; `update` the optimizer's
    temporaries. `peak` is the highest of the phases and `phase` its name; the parts do not add up to it, since they do
    not all exist at once."""

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
    """The memory of the config's training step. `micro_batch_size`, `device` and `threads` override the config;
    `pairs`: a micro-batch is one of preference pairs (dpo), two sequences each."""
    model, train = config.model, config.train
    on_cpu = (device or expected_device(train)) == "cpu"
    micro_batch = micro_batch_size or train.micro_batch_size
    workers = 1
    if on_cpu and not train.compile:
        workers = workers_for(micro_batch, threads or train.cpu_threads)
    rows = (2 if pairs else 1) * micro_batch // workers
    e = 4 if expected_precision(train, device) == "float32" else 2

    whole = trained_shapes(model, config.lora)
    trained = {name: whole[name] for name in trained_names(whole, train.trainable)}
    one_gradient = 4 * _size(trained)
    frozen = _frozen_bytes(model, config.lora, e) if config.lora.r else 4 * (_size(whole) - _size(trained))
    weights = (2 if train.ema_decay else 1) * one_gradient + frozen
    states = state_shapes(whole, train)
    optimizer = 4 * sum(_size(of) for of in states.values())

    part = _Part(config, trained, rows, workers, e, on_cpu)
    micro_batches = train.grad_accum_steps * train.micro_batch_size // micro_batch
    static = weights + optimizer
    forward, loss, backward = (workers * phase for phase in part.phases(accumulated=micro_batches > 1))
    squares = max(4 * math.prod(shape) for shape in trained.values())
    update, used = _update(trained, set(states["muon.momentum"]), train, workers, on_cpu)
    return MemoryEstimate(
        weights=weights,
        gradients=workers * one_gradient,
        optimizer=optimizer,
        activations=workers * part.activations,
        logits=workers * part.logits,
        update=update,
        phases={
            "forward": static + forward,
            "loss": static + loss,
            "backward": static + backward,
            "norm": static + one_gradient + squares,
            "update": static + one_gradient + used,
        },
    )


def expected_device(train: TrainConfig) -> Device:
    """What train.device resolves to, without loading MLX: the GPU on Apple silicon, elsewhere the CPU for `auto`."""
    if train.device != "auto":
        return train.device
    return "gpu" if sys.platform == "darwin" and platform.machine() == "arm64" else "cpu"


def expected_precision(train: TrainConfig, device: Device | None = None) -> str:
    return train.precision or ("float32" if (device or expected_device(train)) == "cpu" else "bfloat16")


def checkpoint_bytes(config: Config) -> tuple[int, int]:
    """Sizes of model.npz and optimizer.npz without array headers; everything is float32."""
    shapes = trained_shapes(config.model, config.lora)
    states = state_shapes(shapes, config.train)
    moments = sum(_size(of) for of in states.values())
    if config.train.ema_decay:  # the averages are the model then
        moments += sum(math.prod(shapes[name]) for name in trained_names(shapes, config.train.trainable))
    return 4 * _size(shapes), 4 * moments


class _Part:
    """What one thread needs for its rows, besides weights and optimizer state."""

    def __init__(self, config: Config, trained: Shapes, rows: int, workers: int, e: int, on_cpu: bool) -> None:
        model, train, length = config.model, config.train, config.data.seq_len
        n = rows * length
        self._config, self._trained, self._e = config, trained, e
        self._sizes = architecture(model.architecture).activation_sizes(model, n, e)
        self._x = self._sizes.x
        blocks = query_blocks(rows, model.n_heads, length, train.attention_block, on_cpu=on_cpu)
        self._scores = 4 * rows * model.n_heads * max((end - start) * end for start, end in blocks)
        self._scores = self._scores * (workers + 1) // (2 * workers)  # the threads do not all peak at once
        mlp_rows = min(n, CPU_MLP_ROWS) if on_cpu else n
        self._chunk_x, self._chunk_mlp = e * mlp_rows * model.d_model, e * mlp_rows * model.mlp_size
        self._loss_chunk = -(-train.loss_chunk // workers)
        matrices = [math.prod(s) for name, s in parameter_shapes(model).items() if ".layers.0." in name and len(s) == 2]
        # A block's weights cast to the products' dtype, or dequantized.
        self._cast = e * sum(matrices) if e == 2 or config.lora.quantize else 0
        self.logits = self._logits(n)

    def _made(self, counts: _Counts) -> int:
        x, q, kv, mlp, _ = self._sizes
        sizes = (x, q, kv, mlp, self._scores, self._chunk_mlp, self._chunk_x)
        return round(sum(count * size for count, size in zip(counts, sizes, strict=True)))

    @property
    def activations(self) -> int:
        model, train = self._config.model, self._config.train
        if train.gradient_checkpointing:
            return (model.n_layers - 1) * self._x + self._sizes.saved + self._made(_FORWARD[self._e])
        return model.n_layers * self._sizes.saved + self._x

    def phases(self, accumulated: bool) -> tuple[int, int, int]:
        """The peaks of forward, loss and backward. `accumulated`: the gradients of earlier micro-batches exist."""
        model, recompute = self._config.model, self._config.train.gradient_checkpointing
        lowest = self._lowest()
        kept = self._x if recompute else self._sizes.saved
        gradients = 4 * _size(self._trained)
        of_blocks = [4 * _size(_of_block(self._trained, i)) for i in range(model.n_layers)]
        ends = gradients - sum(of_blocks)  # embedding, head and last norm
        forward = self._made(_FORWARD[self._e]) + self._cast
        before_last = max(0, model.n_layers - 1 - lowest) * kept
        before = gradients if accumulated else 0
        forward_peak = before + before_last + self._x + forward
        layers = (model.n_layers - lowest) * kept
        loss = (gradients if accumulated else ends) + layers + 3 * self._x + self.logits

        backward = 0
        for i in range(lowest, model.n_layers):
            there = gradients if accumulated else ends + sum(of_blocks[i:])
            held = there + (i - lowest) * kept + 2 * self._x
            backward = max(backward, held + self._sizes.saved + self._block_backward())
        return forward_peak, loss, backward

    def _block_backward(self) -> int:
        model = self._config.model
        mlp, gone = self._made(_MLP_BACKWARD[self._e]), 2 * self._sizes.mlp + self._x  # saved by the MLP half
        if self._config.train.gradient_checkpointing:  # gate and up exist only chunk by chunk
            mlp += 2 * self._chunk_mlp - 2 * self._sizes.mlp
        if self._e == 2 and not self._config.lora.r:  # a product in half precision, in float32, and the sum
            mlp += 12 * model.d_model * model.mlp_size
        attention = self._made(_ATTENTION_BACKWARD[self._e])
        norm = self._made(_NORM_BACKWARD[self._e])
        return max(mlp, attention - gone, norm - self._x) + (self._cast if self._config.lora.quantize else 0)

    def _logits(self, n: int) -> int:
        """Of a chunk [C, V]: float32 logits, their exponentials and two temporaries; the head cast to the products'
        dtype (quantized heads twice); in half precision also a norm's arrays and a separate gradient of the head."""
        model, e, lora = self._config.model, self._e, self._config.lora
        chunk, head = min(n, self._loss_chunk) * model.vocab_size, model.vocab_size * model.d_model
        made = (16 if e == 4 else 18) * chunk
        made += 2 * e * head if lora.quantize else 0 if e == 4 else e * head + 7 * self._x
        return made if e == 4 or lora.r else max(made, 4 * chunk + 8 * head)

    def _lowest(self) -> int:
        """As model/llama/gradients.py's: blocks below keep nothing."""
        if "model.embed_tokens.weight" in self._trained:
            return 0
        layers = self._config.model.n_layers
        return min((int(name.split(".")[2]) for name in self._trained if ".layers." in name), default=layers)


def _update(trained: Shapes, by_muon: set[str], train: TrainConfig, workers: int, on_cpu: bool) -> tuple[int, int]:
    """Temporaries of the update: the most that all threads need at once, and the most beyond the gradients that are not
    consumed yet."""
    most = most_used = 0
    for share in balanced_shares(trained, by_muon, workers):
        matrices = {name: trained[name] for name in share if name in by_muon}
        parts = [
            (_muon_stack([trained[name] for name in names], names[0], train, on_cpu), 4 * _size_of(trained, names))
            for names in muon_stacks(matrices, train.muon_split_heads)
        ]
        parts += [(4 * math.prod(trained[name]),) * 2 for name in share if name not in by_muon]
        gone = highest = 0
        for made, gradient in parts:
            highest = max(highest, made - gone)
            gone += gradient
        most, most_used = most + max((made for made, _ in parts), default=0), most_used + highest
    return most, most_used


def _muon_stack(shapes: list[tuple[int, ...]], name: str, train: TrainConfig, on_cpu: bool) -> int:
    """For a stack of S bytes whose Gram matrices take G: weights, gradients, momentum and their results are 8 S,
    followed by eleven products of [s, s]. In strips, these take so many operations that the first arrays have been
    freed."""
    rows, cols = shapes[0]
    stack = 4 * len(shapes) * rows * cols
    small, large = sorted((rows, cols))
    if train.muon_split_heads and "self_attn" in name:
        return 8 * stack
    gram = stack * small // large
    return max(8 * stack, 3 * stack + 13 * gram) if on_cpu and small >= MIN_SIZE_FOR_STRIPS else 8 * stack + 11 * gram


def _frozen_bytes(model: ModelConfig, lora: LoraConfig, e: int) -> int:
    """model/frozen.py: norms and biases float32, matrices in the products' dtype or quantized, DoRA's row norms."""
    total = 0
    shapes = parameter_shapes(model)
    for shape in shapes.values():
        size = math.prod(shape)
        if len(shape) == 1:
            total += 4 * size
        elif lora.quantize and is_quantized(shape):
            total += size * lora.quantize // 8 + 2 * e * size // GROUP
        else:
            total += e * size
    if lora.dora:
        total += sum(4 * shapes[f"{name}.weight"][0] for name in adapted_matrices(model, lora))
    return total


def _of_block(shapes: Shapes, i: int) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name.startswith(f"model.layers.{i}.")}


def _size(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _size_of(shapes: Shapes, names: list[str]) -> int:
    return sum(math.prod(shapes[name]) for name in names)
