"""The memory of a training step, estimated from its shapes before anything runs. No MLX here.

Weights, optimizer state and gradients exist throughout the step and are counted exactly. Added to them is the most
expensive phase of the step (training/mlx_engine.py, model/llama/gradients.py), at its peak. The phases are in
cpu_memory.py, gpu_memory.py and, for mlx-lm's models, module_memory.py.
"""

import math
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from anarchobot.config.schema import Config, LoraConfig, ModelConfig, TrainConfig
from anarchobot.model.architecture import CPU_LOSS_CHUNK, GPU_LOSS_CHUNK
from anarchobot.model.lora import GROUP, adapted_matrices, is_quantized, trained_shapes
from anarchobot.model.parameters import parameter_shapes
from anarchobot.model.quantization import Packing, packings
from anarchobot.numerics.cores import workers_for
from anarchobot.optim.param_groups import (
    select_trainable,
    state_shapes,
)
from anarchobot.system.cpu_memory import cpu_phases
from anarchobot.system.gpu_memory import gpu_phases
from anarchobot.system.module_memory import module_phases
from anarchobot.system.sampling_memory import reference_bytes, sampling_bytes

Device = Literal["gpu", "cpu"]
Shapes = Mapping[str, tuple[int, ...]]
# Automatic differentiation saves more than the hand-written gradients that are estimated: at most about so many times.
AUTODIFF_MEMORY = 3
TEACHER_ARRAYS = (1, 5)  # with a teacher, at temperature 1 and at others: more float32 arrays of a chunk of logits


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part. `weights` include the running average and grpo's reference model; `gradients` and the parts below
    cover all threads. `activations`: peak before the head; `logits`: one chunk of the head; `update`: the optimizer's
    temporaries.

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
    weights += reference_bytes(config, trained, itemsize)
    static = weights + optimizer
    if model.architecture == "mlx_lm":
        phases = module_phases(config, trained, rows, itemsize, on_cpu=on_cpu, accumulated=accumulated)
    elif on_cpu:
        phases = cpu_phases(config, trained, rows, itemsize, workers=workers, accumulated=accumulated)
    else:
        phases = gpu_phases(config, trained, rows, itemsize, accumulated=accumulated)
    activations, logits, forward, loss, backward, norm, update = phases
    if train.technique == "autodiff":
        activations, forward, loss, backward = (AUTODIFF_MEMORY * x for x in (activations, forward, loss, backward))
    if train.teacher is not None:
        chunk = -(-(train.loss_chunk or (CPU_LOSS_CHUNK if on_cpu else GPU_LOSS_CHUNK)) // workers)
        arrays = TEACHER_ARRAYS[config.distillation.temperature != 1]
        more = 4 * arrays * workers * min(rows * config.data.seq_len, chunk) * model.vocab_size
        logits, loss = logits + more, loss + more
    return MemoryEstimate(
        weights=weights,
        gradients=workers * one_gradient,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        update=update - one_gradient,
        phases={
            "forward": static + forward,
            "loss": static + loss,
            "backward": static + backward,
            "norm": static + norm,
            "update": static + update,
            **({} if config.grpo.rewards is None else {"sampling": static + sampling_bytes(config, itemsize)}),
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


def _size(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))
