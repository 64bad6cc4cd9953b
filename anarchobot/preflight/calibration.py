"""How long a step takes, by a few real ones on random tokens. They are to take seconds: of a big model, one or two
micro-batches stand for the step, and of a bigger one the count of its operations."""

import statistics
import time
from typing import Literal

import numpy as np

from anarchobot.config.schema import Config
from anarchobot.data.batches import Batch
from anarchobot.exchange.pretrained import PretrainedModel
from anarchobot.model.llama.flops import model_step
from anarchobot.tasks.engines import open_engine

SECONDS = 8.0  # of measuring
LONGEST = 20.0  # seconds that a micro-batch may take by its operations, to be tried at all
LEAST, MOST = 3, 50  # whole steps

How = Literal["measured", "at most", "a guess"]


def step_seconds(config: Config, base: PretrainedModel | None, rows: int, rate: float) -> tuple[float, How]:
    """Seconds of a step of `rows` sequences a micro-batch, and how that is known; `rate`: operations a second, for a
    guess.

    With A micro-batches of m seconds and an update of u, a step takes A m + u. Where whole steps fit into the time,
    their median is given; else m and u are told from steps of one and of two micro-batches; where even one takes long,
    A (m + u). Raises UserError as the engine does, and MemoryError.
    """
    train, micro_batches, length = config.train, config.train.grad_accum_steps, config.data.seq_len
    guess = model_step(config.model, rows, [(0, length)]) / rate
    if guess > LONGEST:
        return micro_batches * guess, "a guess"
    engine = open_engine(config, base.weights if base is not None else None).engine
    rng = np.random.default_rng(train.seed)

    def step(count: int) -> float:
        ids = rng.integers(0, config.model.vocab_size, (count, rows, length + 1), np.int32)
        segments = np.zeros(ids[..., 1:].shape, np.int32) if config.data.document_mask else None
        batch = Batch(ids[..., :-1].copy(), ids[..., 1:].copy(), segments)
        began = time.perf_counter()
        engine.train_step(batch, 1, 0.0, train.momentum, float("inf"))  # all is computed, nothing moves
        return time.perf_counter() - began

    first = step(1)  # slower than those behind it
    if first * micro_batches * LEAST <= SECONDS:
        times = [step(micro_batches) for _ in range(1 + LEAST)][1:]
        while sum(times) < SECONDS / 2 and len(times) < MOST:
            times.append(step(micro_batches))
        return statistics.median(times), "measured"
    if first > SECONDS:
        return micro_batches * first, "at most"
    one = step(1)
    more = max(0.0, step(2) - one) if micro_batches > 1 else 0.0
    return one + (micro_batches - 1) * more, "measured"
