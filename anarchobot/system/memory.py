"""What memory a training step takes, counted from its shapes before anything runs. No MLX here.

What is there all along is exact: weights, optimizer state, gradients. The rest is the phase of the step that needs most
(training/mlx_engine.py, model/llama/gradients.py), at its worst moment:

    forward    the last block is computed: what the blocks before it keep, and all that this one makes
    loss       all blocks' kept arrays, and one chunk's logits
    backward   the last block's gradient (under gradient checkpointing with the block computed anew), or the first
               block's, when nothing else is kept any more but all gradients are there
    norm       the squares of the largest gradient
    update     the optimizer's temporaries: Muon's largest stack of matrices, AdamW's largest parameter

Within a part that is evaluated as a whole, MLX allocates some fifty operations ahead of what it frees; so the arrays
that a part makes count together, each once, unless the next operation can take one over. `_FORWARD` and its neighbours
are these counts: read from the code, and set by MLX's own counter, part by part over random shapes, where how far it
runs ahead decides. docs/planning.md shows what comes of it beside MLX's peak on other shapes.

On a CPU every thread has its own rows, its own gradients and its own temporaries. On a GPU the same counts are taken;
nothing was measured there.

Shapes: N = B L tokens of a thread, D d_model, A and K the widths of all query and all key heads, F mlp width, V
vocabulary.
"""

import math
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from anarchobot.config.schema import Config, LoraConfig, ModelConfig, TrainConfig
from anarchobot.model.llama.flops import STRIPS_FROM
from anarchobot.model.llama.query_blocks import query_blocks
from anarchobot.model.lora import GROUP, adapted_matrices, is_packed, trained_shapes
from anarchobot.model.parameters import parameter_shapes
from anarchobot.numerics.cores import CPU_MLP_ROWS, workers_for
from anarchobot.optim import param_groups as routes

Device = Literal["gpu", "cpu"]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class MemoryEstimate:
    """In bytes. `weights` are all of the model's, with the running average; `gradients` those of all threads;
    `activations` what blocks keep and make at the highest moment before the head, `logits` what the head's chunk takes;
    `update` the optimizer's temporaries. `peak` is the highest of the phases, `phase` its name; its parts need not add
    up: not all are there at once."""

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
    """How many arrays of each kind a part makes: [N, D], [N, A], [N, K], [N, F], one block's scores (float32), an MLP
    chunk's [C, F] and [C, D]."""

    x: float = 0
    q: float = 0
    kv: float = 0
    wide: float = 0
    scores: float = 0
    chunk_wide: float = 0
    chunk_x: float = 0


# By bytes of a number in the products: float32, and float16 or bfloat16 (norms, rotation and softmax of which make
# float32 arrays besides).
_FORWARD = {4: _Counts(x=1, q=3, kv=4, wide=3.1, scores=4), 2: _Counts(x=7, q=3, kv=6, wide=5, scores=3)}
_ATTENTION_BACKWARD = {4: _Counts(q=3, kv=5, scores=5), 2: _Counts(q=6, kv=2, scores=7)}
_MLP_BACKWARD = {4: _Counts(chunk_wide=6, chunk_x=2), 2: _Counts(chunk_wide=4, chunk_x=7)}
_NORM_BACKWARD = {4: _Counts(x=6), 2: _Counts(x=10)}


def estimate(
    config: Config,
    *,
    micro_batch_size: int | None = None,
    device: Device | None = None,
    threads: int | None = None,
    pairs: bool = False,
) -> MemoryEstimate:
    """The memory of the config's training step. `micro_batch_size`, `device` and `threads` stand in for the config's
    own; `pairs`: a micro-batch is of pairs of answers (dpo), two sequences each."""
    model, train = config.model, config.train
    on_cpu = (device or expected_device(train)) == "cpu"
    micro_batch = micro_batch_size or train.micro_batch_size
    workers = 1
    if on_cpu and not train.compile:
        workers = workers_for(micro_batch, threads or train.cpu_threads)
    rows = (2 if pairs else 1) * micro_batch // workers
    e = 4 if expected_precision(train, device) == "float32" else 2

    whole = trained_shapes(model, config.lora)
    trained = {name: whole[name] for name in routes.trained(whole, train.trainable)}
    one_gradient = 4 * _size(trained)
    frozen = _frozen_bytes(model, config.lora, e) if config.lora.r else 4 * (_size(whole) - _size(trained))
    weights = (2 if train.ema_decay else 1) * one_gradient + frozen
    states = routes.state_shapes(whole, train)
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
    """What train.device comes to, without asking MLX: a Mac of Apple's own chips has a GPU; elsewhere `auto` is taken
    for the CPU."""
    if train.device != "auto":
        return train.device
    return "gpu" if sys.platform == "darwin" and platform.machine() == "arm64" else "cpu"


def expected_precision(train: TrainConfig, device: Device | None = None) -> str:
    return train.precision or ("float32" if (device or expected_device(train)) == "cpu" else "bfloat16")


def checkpoint_bytes(config: Config) -> tuple[int, int]:
    """Sizes of model.npz and optimizer.npz, but for the names and heads of their arrays: all of it float32."""
    shapes = trained_shapes(config.model, config.lora)
    states = routes.state_shapes(shapes, config.train)
    moments = sum(_size(of) for of in states.values())
    if config.train.ema_decay:  # the averages are the model then
        moments += sum(math.prod(shapes[name]) for name in routes.trained(shapes, config.train.trainable))
    return 4 * _size(shapes), 4 * moments


class _Part:
    """What one thread needs besides weights and optimizer, from its rows."""

    def __init__(self, config: Config, trained: Shapes, rows: int, workers: int, e: int, on_cpu: bool) -> None:
        model, train, length = config.model, config.train, config.data.seq_len
        n = rows * length
        self._config, self._trained, self._e = config, trained, e
        self._x, self._wide = e * n * model.d_model, e * n * model.mlp_size
        self._q, self._kv = e * n * model.n_heads * model.head_size, e * n * model.kv_heads * model.head_size
        blocks = query_blocks(rows, model.n_heads, length, train.attention_block, on_cpu=on_cpu)
        self._scores = 4 * rows * model.n_heads * max((end - start) * end for start, end in blocks)
        self._scores = self._scores * (workers + 1) // (2 * workers)  # threads are not at their highest all at once
        self._log_sums = 4 * n * model.n_heads
        mlp_rows = min(n, CPU_MLP_ROWS) if on_cpu else n
        self._chunk_x, self._chunk_wide = e * mlp_rows * model.d_model, e * mlp_rows * model.mlp_size
        self._loss_chunk = -(-train.loss_chunk // workers)
        matrices = [math.prod(s) for name, s in parameter_shapes(model).items() if ".layers.0." in name and len(s) == 2]
        # What products make of a block's weights first: another dtype, or numbers of packed ones.
        self._cast = e * sum(matrices) if e == 2 or config.lora.quantize else 0
        self.logits = self._logits(n)

    @property
    def _kept(self) -> int:
        """Of a block, for its backward pass: both halves' inputs, q, k, v, attention's output, gate and up."""
        return 2 * self._x + 2 * self._q + 2 * self._kv + self._log_sums + 2 * self._wide

    def _made(self, counts: _Counts) -> int:
        sizes = (self._x, self._q, self._kv, self._wide, self._scores, self._chunk_wide, self._chunk_x)
        return round(sum(count * size for count, size in zip(counts, sizes, strict=True)))

    @property
    def activations(self) -> int:
        model, train = self._config.model, self._config.train
        if train.gradient_checkpointing:
            return (model.n_layers - 1) * self._x + self._kept + self._made(_FORWARD[self._e])
        return model.n_layers * self._kept + self._x

    def phases(self, accumulated: bool) -> tuple[int, int, int]:
        """Forward, loss and backward, at their highest. `accumulated`: all gradients are there from before."""
        model, recompute = self._config.model, self._config.train.gradient_checkpointing
        lowest = self._lowest()
        kept = self._x if recompute else self._kept
        gradients = 4 * _size(self._trained)
        of_blocks = [4 * _size(_of_block(self._trained, i)) for i in range(model.n_layers)]
        ends = gradients - sum(of_blocks)  # of embedding, head and last norm
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
            backward = max(backward, held + self._kept + self._block_backward())
        return forward_peak, loss, backward

    def _block_backward(self) -> int:
        model = self._config.model
        mlp, gone = self._made(_MLP_BACKWARD[self._e]), 2 * self._wide + self._x  # what the MLP half kept
        if self._config.train.gradient_checkpointing:  # gate and up are made by chunks, and go with them
            mlp += 2 * self._chunk_wide - 2 * self._wide
        if self._e == 2 and not self._config.lora.r:  # a product in half, in float32, and the sum
            mlp += 12 * model.d_model * model.mlp_size
        attention = self._made(_ATTENTION_BACKWARD[self._e])
        norm = self._made(_NORM_BACKWARD[self._e])
        return max(mlp, attention - gone, norm - self._x) + (self._cast if self._config.lora.quantize else 0)

    def _logits(self, n: int) -> int:
        """Of a chunk [C, V]: float32 logits, their exponentials, and two more on the way; the head as the products
        want it, packed ones for both; in half precision a norm's arrays, and the head's gradient, which is made
        apart."""
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
    """Temporaries of the update: the most that all threads need at once, and the most beyond the gradients that are
    not used up yet."""
    most = most_used = 0
    for share in routes.update_shares(trained, by_muon, workers):
        matrices = {name: trained[name] for name in share if name in by_muon}
        parts = [
            (_muon_stack([trained[name] for name in names], names[0], train, on_cpu), 4 * _size_of(trained, names))
            for names in routes.muon_stacks(matrices, train.muon_split_heads)
        ]
        parts += [(4 * math.prod(trained[name]),) * 2 for name in share if name not in by_muon]
        gone = highest = 0
        for made, gradient in parts:
            highest = max(highest, made - gone)
            gone += gradient
        most, most_used = most + max((made for made, _ in parts), default=0), most_used + highest
    return most, most_used


def _muon_stack(shapes: list[tuple[int, ...]], name: str, train: TrainConfig, on_cpu: bool) -> int:
    """Of a stack of S bytes, whose Gram matrices take G: weights, gradients, momentum and what becomes of them are 8 S,
    then come eleven products of [s, s]; in strips these take so many operations that what came first has gone."""
    rows, cols = shapes[0]
    stack = 4 * len(shapes) * rows * cols
    small, large = sorted((rows, cols))
    if train.muon_split_heads and "self_attn" in name:
        return 8 * stack
    gram = stack * small // large
    return max(8 * stack, 3 * stack + 13 * gram) if on_cpu and small >= STRIPS_FROM else 8 * stack + 11 * gram


def _frozen_bytes(model: ModelConfig, lora: LoraConfig, e: int) -> int:
    """model/frozen.py: norms and biases float32, matrices in the products' dtype or packed, DoRA's row lengths."""
    total = 0
    shapes = parameter_shapes(model)
    for shape in shapes.values():
        size = math.prod(shape)
        if len(shape) == 1:
            total += 4 * size
        elif lora.quantize and is_packed(shape):
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
