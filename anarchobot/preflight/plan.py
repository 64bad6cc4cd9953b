"""Estimates of a run's cost, counted from its configuration: memory, FLOPs, tokens, checkpoint sizes."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, Literal

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig, load_config
from anarchobot.config.schema import Config, PreferenceConfig
from anarchobot.data.shards import read_manifest
from anarchobot.data.teacher_cache import record_bytes
from anarchobot.model.lora import trained_count
from anarchobot.model.parameters import parameter_count
from anarchobot.optim.schedule import sequences_per_step, total_steps
from anarchobot.system.machine import system_memory
from anarchobot.system.memory import MemoryEstimate, checkpoint_bytes, estimate, expected_device, expected_precision
from anarchobot.system.micro_batch import largest_micro_batch_size, memory_budget, resolve_micro_batch
from anarchobot.system.peak_flops import training_flops_per_token

PRECISIONS: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")  # float16 needs the same as bfloat16
CHINCHILLA = 20  # compute-optimal training tokens per parameter (Hoffmann et al., 2022)
CONVERSATIONS_UNCOUNTED = "the run's length is given in epochs, and conversations are only counted when it starts"
MANY_EPOCHS = 4  # up to here, repeated text is worth almost as much as new text (Muennighoff et al., 2023)


def load_plan(path: str | None, overrides: Sequence[str | tuple[str, Any]]) -> LoadedConfig:
    """Loads the configuration of any training command. With train.init_from, the model section is that model's."""
    loaded = load_config(path, overrides)
    if loaded.config.train.init_from is None:
        return loaded
    from anarchobot.tasks.finetuning import load_tuning_config

    return load_tuning_config(path, overrides)


def plan(loaded: LoadedConfig, deadline_hours: float | None = None) -> dict[str, Any]:
    """The values of `anarchobot plan --json`, in bytes, tokens and FLOPs; None if unknown. A configuration with a
    preference section is assumed to be for dpo, whose micro-batches count pairs. FLOPs of grpo are without those of
    sampling."""
    pairs = is_preference_config(loaded)
    loaded, _ = resolve_micro_batch(loaded, pairs=pairs)
    config = loaded.config
    model, train, length = config.model, config.train, config.data.seq_len
    sequences = sequences_per_step(train)
    tokens_per_step = sequences * length * (2 if pairs else 1)
    windows, unknown = _windows(loaded)
    if train.epochs is not None and windows is None:
        steps = None
    else:
        steps, unknown = total_steps(train, tokens_per_step // sequences, windows or 0), None
    tokens = None if steps is None else steps * tokens_per_step
    parameters, flops = parameter_count(model), training_flops_per_token(model, length)
    budget = memory_budget(config)
    fits = largest_micro_batch_size(config, budget, pairs=pairs)
    model_bytes, optimizer_bytes = checkpoint_bytes(config)
    cached = None
    if train.teacher is not None and tokens is not None:
        available = tokens if windows is None else min(tokens, windows * length)
        cached = available * record_bytes(config.distillation.top_k, model.vocab_size)
    return {
        "parameters": parameters,
        "trained_parameters": trained_count(model, config.lora),
        "device": expected_device(train),
        "precision": expected_precision(train),
        "micro_batch_size": train.micro_batch_size,
        "grad_accum_steps": train.grad_accum_steps,
        "unit": "pairs" if pairs else "sequences" if config.grpo.rewards is None else "completions",
        "memory": _memory_values(estimate(config, pairs=pairs)),
        "peaks": [
            _peak(config, precision, checkpointing, pairs)
            for precision, checkpointing in product(PRECISIONS, (False, True))
        ],
        "machine_bytes": system_memory().total,
        "budget_bytes": budget,
        "largest_micro_batch": None if fits is None else fits[0],
        "steps": steps,
        "steps_unknown": unknown,
        "tokens_per_step": tokens_per_step,
        "tokens": tokens,
        "epochs": None if steps is None or windows is None else steps * sequences / windows,
        "tokens_per_parameter": None if tokens is None else tokens / parameters,
        "flops_per_token": flops,
        "flops": None if tokens is None else flops * tokens,
        "deadline_hours": deadline_hours,
        "tokens_per_second": None if tokens is None or deadline_hours is None else tokens / (3600 * deadline_hours),
        "teacher": train.teacher,
        "teacher_cache_bytes": cached,  # at most
        "checkpoint": {
            "model_bytes": model_bytes,
            "optimizer_bytes": optimizer_bytes,
            "most": train.ckpt_keep + 2,  # the newest, the best, and the one being written
            "disk_bytes": (train.ckpt_keep + 2) * (model_bytes + optimizer_bytes),
        },
    }


def is_preference_config(loaded: LoadedConfig) -> bool:
    """Whether it is for dpo, that is, has a preference section. A run's config.yaml has all sections: pretrain's
    has no train.init_from, and sft's has the default preference section."""
    given = {key.partition(".")[0] for key in loaded.sources}
    if is_run_config(given):
        return loaded.config.train.init_from is not None and loaded.config.preference != PreferenceConfig()
    return "preference" in given


def is_run_config(sections: set[str]) -> bool:
    """Whether it is a run's config.yaml, which has all sections; earlier versions had no distillation and no grpo."""
    return sections >= set(Config.model_fields) - {"distillation", "grpo"}


def _memory_values(memory: MemoryEstimate) -> dict[str, Any]:
    return {**asdict(memory), "phase": memory.phase, "peak": memory.peak}


def _peak(config: Config, precision: str, checkpointing: bool, pairs: bool) -> dict[str, Any]:
    train = config.train.model_copy(update={"precision": precision, "gradient_checkpointing": checkpointing})
    memory = estimate(config.model_copy(update={"train": train}), pairs=pairs)
    return {"precision": precision, "gradient_checkpointing": checkpointing, **_memory_values(memory)}


def _windows(loaded: LoadedConfig) -> tuple[int | None, str | None]:
    """The number of training sequences in an epoch of the shards, or why it is unknown."""
    data, folders = loaded.config.data, loaded.config.data.shard_dirs
    sections = {key.partition(".")[0] for key in loaded.sources}
    is_tuning = bool(sections & {"lora", "chat", "preference", "grpo"}) and "data.shard_dir" not in loaded.sources
    if is_tuning or (loaded.config.train.init_from is not None and data.dataset is not None):
        return None, CONVERSATIONS_UNCOUNTED
    missing = [folder for folder in folders if not (Path(folder) / "manifest.json").exists()]
    if missing:
        return None, f"the run's length is given in epochs, and there are no shards in {missing[0]}: run pretokenize"
    tokens = [read_manifest(folder).tokens("train") for folder in folders]
    if sum(tokens) <= data.seq_len:
        raise UserError(
            f"{folders[0]}: {sum(tokens)} training tokens are fewer than one sequence (data.seq_len: {data.seq_len})"
        )
    return sum(math.ceil((count - 1) / data.seq_len) for count in tokens), None


def many_epochs(epochs: float) -> str | None:
    """A warning about a long run on little text."""
    if epochs <= MANY_EPOCHS:
        return None
    return (
        f"{epochs:,.1f} epochs: beyond {MANY_EPOCHS}, repeated text helps less than new text, and a model may overfit"
    )
