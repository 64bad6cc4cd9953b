"""Resolves `train.micro_batch_size: auto` to the largest micro-batch that fits into memory. Does not import MLX.

With `auto`, train.grad_accum_steps is the number of sequences (pairs, in dpo) in a step. Memory only decides how many
equal micro-batches they are split into, so the effective batch size is the same on every machine.
"""

import sys
from typing import NamedTuple

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.config.schema import Config, TrainConfig
from anarchobot.optim.schedule import sequences_per_step
from anarchobot.system.machine import gpu_working_set, system_memory
from anarchobot.system.memory import MemoryEstimate, estimate, expected_device

MEMORY_FRACTION = 0.75  # of the machine's memory, when no budget is set; the rest is for the system and other programs


class ResolvedConfig(NamedTuple):
    """`messages` describe the choice to the user."""

    loaded: LoadedConfig
    messages: list[str]


def resolve_micro_batch(loaded: LoadedConfig, *, pairs: bool = False, several_ranks: bool = False) -> ResolvedConfig:
    """Replaces `auto` with numbers for micro_batch_size and grad_accum_steps; returns other configurations unchanged.

    Raises UserError if not even one sequence fits, and if several ranks could choose different sizes.
    """
    config = loaded.config
    if not config.train.auto_micro_batch:
        return ResolvedConfig(loaded, [])
    where = loaded.where("train.micro_batch_size")
    if several_ranks and config.train.memory_budget_gb is None:
        raise UserError(f"{where}: auto with several ranks requires train.memory_budget_gb (per rank)")
    if config.train.device == "gpu" and sys.platform != "darwin" and config.train.memory_budget_gb is None:
        raise UserError(f"{where}: auto does not know the GPU's memory: set train.memory_budget_gb")
    budget = memory_budget(config)
    largest = largest_micro_batch_size(config, budget, pairs=pairs)
    if largest is None:
        raise UserError(f"{where}: {_too_little(config, budget, pairs)}")
    rows, needed = largest
    micro_batches = config.train.grad_accum_steps // rows
    # With auto, eval_batches counts steps' worth of sequences, so memory does not change what is validated on.
    batches = config.train.eval_batches
    values = {
        **config.train.model_dump(),
        "micro_batch_size": rows,
        "grad_accum_steps": micro_batches,
        "eval_batches": None if batches is None else batches * micro_batches,
    }
    train = TrainConfig.model_validate(values)
    unit = "pairs" if pairs else "sequences"
    messages = [
        f"micro_batch_size auto: {rows} x {micro_batches} {unit} per step, estimated peak memory {_gb(needed.peak)} of "
        f"{_gb(budget)}"
    ]
    if config.train.grad_accum_steps == 1:
        messages.append(
            f"warning: train.grad_accum_steps is 1, which with auto is the number of {unit} per step: raise it"
        )
    return ResolvedConfig(LoadedConfig(config.model_copy(update={"train": train}), loaded.sources), messages)


def memory_budget(config: Config) -> int:
    """train.memory_budget_gb, or MEMORY_FRACTION of the machine's memory, in bytes; on a Mac's GPU at most what macOS
    recommends for the GPU."""
    if config.train.memory_budget_gb is not None:
        return round(1e9 * config.train.memory_budget_gb)
    total = system_memory().total
    budget = round(MEMORY_FRACTION * total)
    on_metal = sys.platform == "darwin" and expected_device(config.train) == "gpu"
    return min(budget, gpu_working_set(total)) if on_metal else budget


def largest_micro_batch_size(config: Config, budget: int, *, pairs: bool = False) -> tuple[int, MemoryEstimate] | None:
    """The largest divisor of a step's sequences whose estimated peak is at most `budget` bytes."""
    sequences = sequences_per_step(config.train)
    for rows in range(sequences, 0, -1):
        if sequences % rows == 0:
            needed = estimate(config, micro_batch_size=rows, pairs=pairs)
            if needed.peak <= budget:
                return rows, needed
    return None


def _too_little(config: Config, budget: int, pairs: bool) -> str:
    needed = estimate(config, micro_batch_size=1, pairs=pairs).peak
    checkpointed = config.train.model_copy(update={"gradient_checkpointing": True})
    less = estimate(config.model_copy(update={"train": checkpointed}), micro_batch_size=1, pairs=pairs).peak
    remedy = "make the model or data.seq_len smaller"
    if less <= budget:
        remedy = f"set train.gradient_checkpointing: true, which needs {_gb(less)}"
    return (
        f"one {'pair' if pairs else 'sequence'} needs an estimated {_gb(needed)}, but the budget is {_gb(budget)} "
        f"(train.memory_budget_gb): {remedy}"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
