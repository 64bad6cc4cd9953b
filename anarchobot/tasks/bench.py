"""Where the time of a training step goes: FLOPs counted (model/NAME/architecture.py) against time measured.

The step runs on random tokens as it does in training. Then it runs again with a profiler, which evaluates and times
each part in place; a step that is compiled as a whole is profiled uncompiled. "the rest" is the difference:
summing the threads' gradients, their norm, the running average, Python, and the effect of evaluating parts
separately. It can be negative.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.model.architecture import architecture, query_blocks
from anarchobot.model.parameters import model_flops, parameter_count, parameter_shapes
from anarchobot.optim.param_groups import muon_flops
from anarchobot.system.blas import load_fast_blas
from anarchobot.system.micro_batch import resolve_micro_batch

if TYPE_CHECKING:
    from anarchobot.training.mlx_engine import MLXEngine

CPU_PEAK_SIZE, GPU_PEAK_SIZE = 1024, 8192  # rows and columns of the products that measure the peak
PEAK_SECONDS = 1.0
PEAK_STEPS = 3  # for the peak of memory: with several threads, steps differ


def bench(loaded: LoadedConfig, steps: int = 5) -> dict[str, Any]:
    """Measures the config's step and its parts, each as the median of `steps` runs; writes nothing. Takes the memory of
    a run and, if the step is compiled, about as much again as parameters and optimizer state.

    Returns numbers only, times in milliseconds: `step`, `peak` (large matrix products in all threads together), and
    `parts`, whose `share`s of the step's time add up to 1.
    """
    loaded, _ = resolve_micro_batch(loaded)
    config = loaded.config
    model, train = config.model, config.train
    if config.lora.r is not None:
        raise UserError(f"{loaded.where('lora.r')}: bench measures full training only: leave lora out")
    if train.backend == "torch":
        raise UserError(f"{loaded.where('train.backend')}: bench measures the MLX backend only: leave torch out")
    blas = load_fast_blas()  # before MLX, which the next lines import
    import mlx.core as mx

    from anarchobot.data.windows import Batch
    from anarchobot.numerics.device import reduced_float32
    from anarchobot.numerics.profiling import TimedProfile
    from anarchobot.training.mlx_engine import MLXEngine

    engine = MLXEngine(config)
    on_cpu = engine.device.type == mx.DeviceType.cpu
    ids = np.random.default_rng(train.seed).integers(
        0, model.vocab_size, (train.grad_accum_steps, train.micro_batch_size, config.data.seq_len + 1), np.int32
    )
    segments = np.zeros(ids[..., 1:].shape, np.int32) if config.data.document_mask else None
    batch = Batch(ids[..., :-1].copy(), ids[..., 1:].copy(), segments)

    def step(engine: MLXEngine) -> None:
        engine.train_step(batch, 1, 0.0, train.momentum)  # a rate of zero: everything is computed, nothing changes

    step(engine)
    mx.reset_peak_memory()
    for _ in range(PEAK_STEPS):
        step(engine)
    peak_memory, traces = mx.get_peak_memory(), engine.traces

    profiled = engine
    if engine.compiled:
        threads = {"compile": False, "cpu_threads": engine.workers.count}
        profiled = MLXEngine(config.model_copy(update={"train": train.model_copy(update=threads)}))
    plain, profile = profiled.options, TimedProfile(engine.workers.count)

    def profiled_step() -> None:
        profiled.options = replace(plain, profile=profile)
        step(profiled)
        profiled.options = plain
        profile.finish_step()

    seconds, _ = _medians([lambda: step(engine), profiled_step], steps)
    rows = config.train.micro_batch_size // engine.workers.count
    blocks = query_blocks(rows, model.n_heads, config.data.seq_len, plain.attention_block, on_cpu=on_cpu)
    sequences, tokens = ids.shape[0] * ids.shape[1], int(batch.inputs.size)
    counts = dict(architecture(model.architecture).step_flops(model, sequences, blocks))
    counts["update by Muon"] = muon_flops(
        parameter_shapes(model), train, model.head_size, on_cpu=on_cpu, reduced_float32=reduced_float32()
    )
    counts["update by AdamW"] = 0
    if train.optimizer == "adamw":
        del counts["update by Muon"]
    part_times = profile.medians()
    measured = [(name, flops, part_times[name]) for name, flops in counts.items() if name in part_times]
    parts = [_row(name, flops, part_seconds, seconds) for name, flops, part_seconds in measured]
    rest = seconds - sum(part_seconds for _, _, part_seconds in measured)
    size = CPU_PEAK_SIZE if on_cpu else GPU_PEAK_SIZE
    peak = _peak(engine, size)
    flops = model_flops(model, sequences, blocks)
    recomputed = architecture(model.architecture).recomputed_flops(model, sequences, blocks, plain.recompute)
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
            "model_flops": flops,
            "model_flops_per_token": flops / tokens,
            "recomputed_flops": recomputed,
            "gflop_per_second": flops / seconds / 1e9,
            "share_of_peak": flops / seconds / 1e9 / peak,
            "peak_memory_mb": peak_memory / 1e6,
            "compiled": engine.compiled,
            "traces": traces,
        },
        "peak": {"gflop_per_second": peak, "threads": engine.workers.count, "product_size": size},
        "parts": [*parts, _row("the rest", 0, rest, seconds)],
    }


def _row(name: str, flops: int, seconds: float, step_seconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "flops": flops,
        "ms": 1e3 * seconds,
        "gflop_per_second": flops / seconds / 1e9 if flops else None,
        "share": seconds / step_seconds,
    }


def _medians(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of each run. They take turns, so that a busy machine slows all of them; a first round is not counted."""
    times = [[_timed(run) for run in runs] for _ in range(1 + rounds)]
    return [statistics.median(of_run) for of_run in zip(*times[1:], strict=True)]


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _peak(engine: "MLXEngine", size: int) -> float:
    """GFLOP/s of products [size, size] in the step's precision, in all threads together: the best in PEAK_SECONDS."""
    import mlx.core as mx

    a = mx.random.normal((size, size)).astype(engine.dtype)
    mx.eval(a)
    times: list[float] = []
    while sum(times) < PEAK_SECONDS:
        times.append(_timed(lambda: engine.workers.map(lambda _: mx.eval(a @ a))))
    return float(2 * size**3 * engine.workers.count / min(times) / 1e9)
