"""`train.micro_batch_size: auto`: as many sequences at a time as memory has room for. No MLX here.

A step is then of train.grad_accum_steps sequences (pairs, in dpo), whatever the machine; memory decides in how many
equal parts they are computed, so that the effective batch, and with it the run, stays what it is.
"""

import sys
from typing import NamedTuple

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.config.schema import Config, TrainConfig
from anarchobot.system.machine import system_memory
from anarchobot.system.memory import MemoryEstimate, estimate

SHARE = 0.75  # of the machine's memory, where no budget is set: the rest is the system's and other programs'


class Fitted(NamedTuple):
    """`told` are lines for a person: what was chosen."""

    loaded: LoadedConfig
    told: list[str]


def fitted(loaded: LoadedConfig, *, pairs: bool = False) -> Fitted:
    """The configuration with numbers for micro_batch_size and grad_accum_steps in the place of `auto`; any other as it
    is. Raises UserError when not even one sequence fits."""
    config = loaded.config
    if not config.train.automatic:
        return Fitted(loaded, [])
    if config.train.device == "gpu" and sys.platform != "darwin" and config.train.memory_budget_gb is None:
        raise UserError(
            f"{loaded.where('train.micro_batch_size')}: auto, and a card's memory is not known here: set "
            "train.memory_budget_gb"
        )
    budget = memory_budget(config)
    found = largest_that_fits(config, budget, pairs=pairs)
    if found is None:
        raise UserError(f"{loaded.where('train.micro_batch_size')}: {_too_little(config, budget, pairs)}")
    rows, needed = found
    parts = config.train.grad_accum_steps // rows
    batches = (
        config.train.eval_batches
    )  # with auto, steps' worth of sequences: memory must not decide what is validated
    values = {
        **config.train.model_dump(),
        "micro_batch_size": rows,
        "grad_accum_steps": parts,
        "eval_batches": None if batches is None else batches * parts,
    }
    train = TrainConfig.model_validate(values)
    unit = "pairs" if pairs else "sequences"
    told = (
        f"micro_batch_size auto: {rows} x {parts} {unit} a step, {_gb(needed.peak)} at the peak by estimate, "
        f"of {_gb(budget)}"
    )
    lines = [told]
    if config.train.grad_accum_steps == 1:
        lines.append(f"warning: train.grad_accum_steps is 1, which with auto means {unit} in a step: raise it")
    return Fitted(LoadedConfig(config.model_copy(update={"train": train}), loaded.sources), lines)


def memory_budget(config: Config) -> int:
    """train.memory_budget_gb, or SHARE of the machine's memory, in bytes."""
    given = config.train.memory_budget_gb
    return round(SHARE * system_memory().total if given is None else 1e9 * given)


def largest_that_fits(config: Config, budget: int, *, pairs: bool = False) -> tuple[int, MemoryEstimate] | None:
    """The largest micro-batch that divides a step's sequences and whose estimated peak is within `budget` bytes."""
    sequences = config.train.micro_batch_size * config.train.grad_accum_steps
    for rows in range(sequences, 0, -1):
        if sequences % rows == 0:
            needed = estimate(config, micro_batch_size=rows, pairs=pairs)
            if needed.peak <= budget:
                return rows, needed
    return None


def _too_little(config: Config, budget: int, pairs: bool) -> str:
    needed = estimate(config, micro_batch_size=1, pairs=pairs).peak
    one = f"{'one pair' if pairs else 'one sequence'} at a time takes {_gb(needed)} by estimate"
    saving = config.train.model_copy(update={"gradient_checkpointing": True})
    less = estimate(config.model_copy(update={"train": saving}), micro_batch_size=1, pairs=pairs).peak
    advice = "make the model or data.seq_len smaller"
    if less <= budget:
        advice = f"set train.gradient_checkpointing: true, with which it takes {_gb(less)}"
    return f"{one}, and there are {_gb(budget)} (train.memory_budget_gb): {advice}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
