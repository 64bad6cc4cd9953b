"""Where the time of a training step goes: operations counted (model/llama/flops.py) against time measured.

The step runs as in training, on random tokens. Then each of its parts runs alone, by the step's own functions and with
its techniques, in all workers at once, as often as a step needs it: the sum of the parts need not be the step. What
is left, "the rest", is adding up the workers' gradients, their norm, the running average, Python, and what the parts
win or lose by being alone; it can be negative.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.model.llama import flops
from anarchobot.model.parameters import parameter_count
from anarchobot.system.blas import load_fast_blas
from anarchobot.system.micro_batch import resolve_micro_batch

if TYPE_CHECKING:
    from anarchobot.training.mlx_engine import MLXEngine

CPU_PEAK_SIZE, GPU_PEAK_SIZE = 1024, 8192  # rows and columns of the products that measure the peak
PEAK_SECONDS = 1.0
PEAK_STEPS = 3  # for the peak of memory: with several threads no two steps have the same


def bench(loaded: LoadedConfig, steps: int = 5) -> dict[str, Any]:
    """Measures the config's step and its parts, each as the median of `steps` runs; writes nothing. Takes the memory of
    a run and about as much again as parameters and optimizer state.

    Returns numbers only, times in milliseconds, operations whole: `step` (all of it), `peak` (what the workers reach
    together in large products), and `parts`, whose `share`s of the step's time add up to 1.
    """
    loaded, _ = resolve_micro_batch(loaded)
    config = loaded.config
    model, train, length = config.model, config.train, config.data.seq_len
    if config.lora.r is not None:
        raise UserError(f"{loaded.where('lora.r')}: bench takes the whole model apart: leave lora out")
    if train.backend == "torch":
        raise UserError(f"{loaded.where('train.backend')}: bench takes the MLX step apart: leave torch out")
    blas = load_fast_blas()  # before MLX, which the next lines import
    import mlx.core as mx

    from anarchobot.data.batches import Batch
    from anarchobot.tasks.step_parts import parts_of, query_blocks
    from anarchobot.training.mlx_engine import MLXEngine

    engine = MLXEngine(config)
    on_cpu = engine.device.type == mx.DeviceType.cpu
    ids = np.random.default_rng(train.seed).integers(
        0, model.vocab_size, (train.grad_accum_steps, train.micro_batch_size, length + 1), np.int32
    )
    segments = np.zeros(ids[..., 1:].shape, np.int32) if config.data.document_mask else None
    batch = Batch(ids[..., :-1].copy(), ids[..., 1:].copy(), segments)

    def step() -> None:
        engine.train_step(batch, 1, 0.0, train.momentum)  # all is computed, nothing moves: every step is the same

    step()
    mx.reset_peak_memory()
    for _ in range(PEAK_STEPS):
        step()
    peak_memory, traces = mx.get_peak_memory(), engine.traces

    parts = parts_of(engine, config, batch)
    seconds, *alone = _medians([step, *(partial(engine.workers.each, part.work) for part in parts)], steps)
    measured = [(part, s * part.times) for part, s in zip(parts, alone, strict=True)]
    rows = [_row(part.name, part.flops, s, seconds) for part, s in measured]
    rest = seconds - sum(s for _, s in measured)
    size = CPU_PEAK_SIZE if on_cpu else GPU_PEAK_SIZE
    peak = _peak(engine, size)

    sequences, tokens = ids.shape[0] * ids.shape[1], int(batch.inputs.size)
    blocks = query_blocks(engine, config)
    operations = flops.model_step(model, sequences, blocks)
    return {
        "device": "cpu" if on_cpu else "gpu",
        "precision": engine.precision,
        "optimizer": train.optimizer,
        "parameters": parameter_count(model),
        "tokens_per_step": tokens,
        "threads": engine.workers.count,
        "blas": blas if on_cpu else None,
        "steps": steps,
        "step": {
            "ms": 1e3 * seconds,
            "tokens_per_second": tokens / seconds,
            "model_flops": operations,
            "model_flops_per_token": operations / tokens,
            "recomputed_flops": flops.recomputed(model, sequences, blocks, train.gradient_checkpointing),
            "gflop_per_second": operations / seconds / 1e9,
            "share_of_peak": operations / seconds / 1e9 / peak,
            "peak_memory_mb": peak_memory / 1e6,
            "compiled": engine.compiled,
            "traces": traces,
        },
        "peak": {"gflop_per_second": peak, "threads": engine.workers.count, "product_size": size},
        "parts": [*rows, _row("the rest", 0, rest, seconds)],
    }


def _row(name: str, operations: int, seconds: float, step_seconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "flops": operations,
        "ms": 1e3 * seconds,
        "gflop_per_second": operations / seconds / 1e9 if operations else None,
        "share": seconds / step_seconds,
    }


def _medians(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of each run. They take turns, so that a machine that is busy for a while is so for all of them; a first
    round isn't counted."""
    times = [[_timed(run) for run in runs] for _ in range(1 + rounds)]
    return [statistics.median(of_run) for of_run in zip(*times[1:], strict=True)]


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _peak(engine: "MLXEngine", size: int) -> float:
    """GFLOP/s of products [size, size] in the step's precision, in all workers at once: the best of PEAK_SECONDS."""
    import mlx.core as mx

    a = mx.random.normal((size, size)).astype(engine.dtype)
    mx.eval(a)
    times: list[float] = []
    while sum(times) < PEAK_SECONDS:
        times.append(_timed(lambda: engine.workers.each(lambda _: mx.eval(a @ a))))
    return float(2 * size**3 * engine.workers.count / min(times) / 1e9)
