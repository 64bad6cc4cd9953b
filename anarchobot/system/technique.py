"""How a device computes attention and the loss: defaults, and what `bench --device` measured. No MLX here.

Measurements are kept in one JSON file, by device, MLX version and shape. `train.technique: auto` uses the one that
matches the run, and otherwise the device's default.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

from anarchobot.config.schema import Config, Technique, TrainConfig
from anarchobot.model.architecture import CPU_LOSS_CHUNK, GPU_LOSS_CHUNK
from anarchobot.storage.durable import write_atomic

DeviceKind = Literal["cpu", "metal", "cuda"]
Task = Literal["pretrain", "sft", "dpo", "grpo"]
ONE_GRAPH_LOSS_CHUNK = 64  # on a CPU, where MLX allocates several chunks ahead if they are evaluated in one call
CUDNN_MAX_HEAD, CUDNN_TILE = 128, 128  # cuDNN's attention gradient: largest head width, divisor of the length


class StepSettings(NamedTuple):
    """The settings that change only the speed and memory of a step, as in the train section."""

    technique: Technique
    loss_chunk: int
    compile: bool


def default_settings(config: Config, kind: DeviceKind, precision: str) -> StepSettings:
    """The settings of a device without measurements, except for those that the configuration gives."""
    chunk = CPU_LOSS_CHUNK if kind == "cpu" else GPU_LOSS_CHUNK
    if kind == "cpu" and config.model.architecture == "mlx_lm":
        chunk = ONE_GRAPH_LOSS_CHUNK
    return given_or(config.train, StepSettings(_default_technique(config, kind, precision), chunk, kind != "cpu"))


def given_or(train: TrainConfig, others: StepSettings) -> StepSettings:
    """The settings of a configuration; `others` replaces technique auto, and null."""
    return StepSettings(
        others.technique if train.technique == "auto" else train.technique,
        train.loss_chunk or others.loss_chunk,
        others.compile if train.compile is None else train.compile,
    )


def with_settings(config: Config, settings: StepSettings) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=settings._asdict())})


def _default_technique(config: Config, kind: DeviceKind, precision: str) -> Technique:
    if kind == "cpu":
        return "blocked"
    head_size, length = config.model.head_size, config.data.seq_len
    cudnn = precision != "float32" and head_size <= CUDNN_MAX_HEAD and head_size % 8 == 0 and length % CUDNN_TILE == 0
    return "sdpa" if kind == "cuda" and cudnn else "fused"


def expected_kind(device: Literal["gpu", "cpu"]) -> DeviceKind:
    """The kind of a device of this machine, without loading MLX."""
    return "cpu" if device == "cpu" else "metal" if sys.platform == "darwin" else "cuda"


# ---- Measurements ----


def cache_file() -> Path:
    """~/.cache/anarchobot/techniques.json, or in XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "anarchobot" / "techniques.json"


def has_segments(config: Config, task: Task) -> bool:
    """Whether the task's sequences hold several documents or conversations that do not see each other."""
    return {"pretrain": config.data.document_mask, "sft": config.chat.pack, "dpo": False, "grpo": False}[task]


def cache_key(config: Config, task: Task, device: str, mlx_version: str, precision: str) -> str:
    """What a measurement is valid for: one device, MLX version, precision and shape of a micro-batch. `device` is as
    `device_label` (tasks/technique.py) returns it."""
    shape = config.model.model_dump(exclude={"dropout", "max_seq_len", "bos_id", "norm_eps", "rope_theta"})
    shape |= {"seq_len": config.data.seq_len, "segments": has_segments(config, task), "pairs": task == "dpo"}
    shape |= {f"lora.{key}": getattr(config.lora, key) for key in ("r", "target_modules", "num_layers", "quantize")}
    shape |= {key: getattr(config.train, key) for key in ("micro_batch_size", "gradient_checkpointing", "trainable")}
    return f"{device} | MLX {mlx_version} | {precision} | {json.dumps(shape, sort_keys=True)}"


def read_measured(key: str) -> StepSettings | None:
    """The fastest settings measured for `key`; None if there are none, or the file is not readable."""
    entry = _read_cache().get(key)
    try:
        return StepSettings(entry["technique"], entry["loss_chunk"], entry["compile"]) if entry else None
    except (KeyError, TypeError):
        return None


def write_measured(key: str, settings: StepSettings) -> Path:
    """Stores the fastest settings for `key` and returns the file."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(_read_cache() | {key: settings._asdict()}, indent=1) + "\n")
    return path


def _read_cache() -> dict[str, Any]:
    try:
        values = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
