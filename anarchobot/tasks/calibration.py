"""Predicts the time of a training step by running a few on random tokens.

Calibration itself should take seconds: for a large model, one or two micro-batches are measured and extrapolated; for a
very large one, the time is estimated from its FLOPs.
"""

import statistics
import time
from typing import Literal

import numpy as np

from anarchobot.config.schema import Config
from anarchobot.data.teacher_cache import with_uniform_teacher
from anarchobot.data.windows import Batch
from anarchobot.exchange.pretrained import PretrainedModel
from anarchobot.model.parameters import model_flops
from anarchobot.tasks.engines import open_engine

BUDGET_SECONDS = 8.0
MAX_MICRO_BATCH_SECONDS = 20.0  # if the FLOPs predict more, nothing is measured
MIN_STEPS, MAX_STEPS = 3, 50  # whole steps that are measured

Method = Literal["measured", "upper bound", "estimate"]


def step_seconds(
    config: Config, base: PretrainedModel | None, rows: int, flops: float, budget: float = BUDGET_SECONDS
) -> tuple[float, Method]:
    """Seconds per step with micro-batches of `rows` sequences, and how they were obtained. `flops` is the assumed
    FLOP/s of an estimate; about `budget` seconds are spent.

    With A micro-batches of m seconds and an update of u seconds, a step takes A m + u. If whole steps fit into the
    budget, returns their median. Otherwise m and u follow from steps of one and of two micro-batches; if even one
    exceeds the budget, returns the upper bound A (m + u). Raises UserError like the engine, and MemoryError.
    """
    train, micro_batches, length = config.train, config.train.grad_accum_steps, config.data.seq_len
    predicted = model_flops(config.model, rows, [(0, length)]) / flops
    if predicted > MAX_MICRO_BATCH_SECONDS:
        return micro_batches * predicted, "estimate"
    engine = open_engine(config, base.weights if base is not None else None).engine
    rng = np.random.default_rng(train.seed)

    def step(count: int) -> float:
        ids = rng.integers(0, config.model.vocab_size, (count, rows, length + 1), np.int32)
        segments = np.zeros(ids[..., 1:].shape, np.int32) if config.data.document_mask else None
        batch = Batch(ids[..., :-1].copy(), ids[..., 1:].copy(), segments)
        if train.teacher is not None:
            batch = with_uniform_teacher(batch, config.distillation.top_k)
        start = time.perf_counter()
        engine.train_step(batch, 1, 0.0, train.momentum, float("inf"))  # lr 0: everything runs, no weight changes
        return time.perf_counter() - start

    first = step(1)  # slower than later steps: compilation and allocation
    if first > budget / MIN_STEPS and predicted < budget / MIN_STEPS:  # above all, where kernels were never compiled
        first = step(1)
    if first * micro_batches * MIN_STEPS <= budget:
        times = [step(micro_batches) for _ in range(1 + MIN_STEPS)][1:]
        while sum(times) < budget / 2 and len(times) < MAX_STEPS:
            times.append(step(micro_batches))
        return statistics.median(times), "measured"
    if first > budget:
        return micro_batches * first, "upper bound"
    one = step(1)
    per_micro_batch = max(0.0, step(2) - one) if micro_batches > 1 else 0.0
    return one + (micro_batches - 1) * per_micro_batch, "measured"
