"""Learning rate, momentum and length of a run. They depend only on the step, so that a run can be resumed exactly."""

import math

from anarchobot.config.schema import TrainConfig
from anarchobot.config.wording import count

MOMENTUM_START, MOMENTUM_WARMUP = 0.85, 300


def sequences_per_step(train: TrainConfig, ranks: int = 1) -> int:
    return ranks * train.micro_batch_size * train.grad_accum_steps


def total_steps(train: TrainConfig, seq_len: int, windows: int, ranks: int = 1) -> int:
    """Returns the run's optimizer steps, from epochs, token_budget or total_steps, rounded up.

    `windows` is the number of training sequences in an epoch.
    """
    per_step = sequences_per_step(train, ranks)
    if train.epochs is not None:
        return max(1, math.ceil(train.epochs * windows / per_step))
    if train.token_budget is not None:
        return math.ceil(train.token_budget / (per_step * seq_len))
    return train.total_steps


def describe_length(train: TrainConfig, steps: int, windows: int, unit: str, ranks: int = 1) -> str:
    """Returns the length of a run for the user, such as `100 steps of 8 sequences = 1.50 epochs`."""
    per_step = sequences_per_step(train, ranks)
    return f"{count(steps, 'step')} of {per_step} {unit} = {steps * per_step / windows:.2f} epochs"


def split_micro_batch(micro_batch_size: int, grad_accum_steps: int) -> tuple[int, int]:
    """Returns the next smaller micro-batch size (halved, if it is even) and the accumulation steps that keep the batch.
    `micro_batch_size` is at least 2."""
    parts = next(n for n in range(2, micro_batch_size + 1) if micro_batch_size % n == 0)
    return micro_batch_size // parts, grad_accum_steps * parts


def learning_rate(step: int, train: TrainConfig, steps: int) -> float:
    """Returns the learning rate of step `step` (the first is 1) of a run of `steps`.

    Linear from 0 to lr over warmup_steps (already above 0 at step 1), then by schedule to min_lr at lr_decay_steps
    (default: the last step), where it stays. cosine: half a cosine (Loshchilov and Hutter, 2017). linear: a straight
    line. wsd: constant, then linear decay over the last decay_fraction of lr_decay_steps (Hu et al., 2024). constant:
    lr.
    """
    if step < train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    end = train.lr_decay_steps or steps
    start = train.warmup_steps
    if train.schedule == "wsd":
        start = max(start, round(end * (1 - train.decay_fraction)))
    done = 1.0 if step >= end else max(0, step - start) / max(1, end - start)
    left = (1 + math.cos(math.pi * done)) / 2 if train.schedule == "cosine" else 1 - done
    return train.min_lr + (train.lr - train.min_lr) * left


def muon_momentum(step: int, train: TrainConfig) -> float:
    """Returns Muon's momentum, warmed up linearly from 0.85 over 300 steps (modded-nanogpt); never above its
    setting."""
    start = min(MOMENTUM_START, train.momentum)
    return start + (train.momentum - start) * min(1.0, step / MOMENTUM_WARMUP)
