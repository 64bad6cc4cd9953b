"""Chooses the technique of a run: that of its checkpoint, else the fastest that `bench --device` measured, else the
device's default. The run's config.yaml and checkpoints then have values in place of `auto` and null."""

import json
from typing import NamedTuple

from anarchobot.config.schema import Config
from anarchobot.runs.checkpoint import Checkpoint
from anarchobot.system.blas import load_fast_blas
from anarchobot.system.memory import expected_precision
from anarchobot.system.packages import installed_version
from anarchobot.system.technique import (
    StepSettings,
    Task,
    cache_key,
    default_settings,
    given_or,
    read_measured,
    with_settings,
)
from anarchobot.training.ranks import SINGLE_PROCESS, Ranks

DEFAULT = "default"


class ResolvedTechnique(NamedTuple):
    """`messages` describe a choice that is not the default."""

    config: Config
    messages: list[str]


def resolve_technique(
    config: Config, task: Task, saved: Checkpoint | None = None, ranks: Ranks = SINGLE_PROCESS
) -> ResolvedTechnique:
    """Replaces train.technique `auto`, and train.loss_chunk and train.compile if they are null. `saved`: the checkpoint
    that the run resumes from. All ranks use rank 0's choice. PyTorch's configurations are returned unchanged.

    Raises UserError if train.device is gpu and there is none.
    """
    train = config.train
    if train.backend == "torch":
        return ResolvedTechnique(config, [])
    choice, source = json.loads(ranks.broadcast(json.dumps(_choice(config, task, saved)).encode()))
    settings = given_or(train, StepSettings(*choice))
    given = {
        "technique": train.technique != "auto",
        "loss_chunk": train.loss_chunk,
        "compile": train.compile is not None,
    }
    keys = [key for key, is_given in given.items() if is_given]
    if not keys and source.startswith(DEFAULT):
        return ResolvedTechnique(with_settings(config, settings), [])  # nothing that the user has to know
    sources = [f"{', '.join(keys)} as configured"] if keys else []
    if len(keys) < len(given):
        sources.append(f"the rest {source}" if keys else source)
    compiled = "compiled" if settings.compile else "not compiled"
    text = f"technique: {settings.technique}, loss_chunk {settings.loss_chunk}, {compiled} ({'; '.join(sources)})"
    return ResolvedTechnique(with_settings(config, settings), [text])


def device_label() -> str:
    """MLX's default device, such as `Apple M3 Pro, metal`. A Mac's GPU and its CPU have the same name."""
    import mlx.core as mx

    from anarchobot.training.device import device_kind

    return f"{mx.device_info()['device_name']}, {device_kind()}"


def technique_key(config: Config, task: Task) -> str:
    """The key of a measurement on MLX's default device."""
    from anarchobot.numerics.device import on_cpu

    precision = expected_precision(config.train, "cpu" if on_cpu() else "gpu")
    return cache_key(config, task, device_label(), str(installed_version("mlx")), precision)


def _choice(config: Config, task: Task, saved: Checkpoint | None) -> tuple[StepSettings, str]:
    """The settings that the configuration leaves open, and where they are from."""
    load_fast_blas()  # before MLX, which the next lines import
    from anarchobot.numerics.device import on_cpu
    from anarchobot.training.device import choose_device, device_kind

    choose_device(config.train.device)
    precision = expected_precision(config.train, "cpu" if on_cpu() else "gpu")
    default = default_settings(config, device_kind(), precision)
    if saved is not None and saved.config.train.backend == "mlx":
        kept = given_or(saved.config.train, default)
        # Steps are compiled on GPUs: the choice for another kind of device is slow here, and the bits differ anyway.
        if kept.compile == default.compile:
            return kept, "as in the checkpoint"
    if measured := read_measured(technique_key(config, task)):
        return measured, f"measured on {device_label()}"
    return default, f"{DEFAULT} on {device_label()}"
