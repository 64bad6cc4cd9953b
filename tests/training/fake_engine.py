"""A fake engine for tests of the training loop."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from anarchobot.config.schema import Config, ModelConfig
from anarchobot.data.windows import Batch
from anarchobot.model.parameters import parameter_shapes
from anarchobot.runs.metrics_log import MetricsLog
from anarchobot.runs.progress import Progress
from anarchobot.training.engine import StepResult
from anarchobot.training.loop import Run, run_training

MODEL = {"vocab_size": 7, "n_layers": 1, "d_model": 2, "n_heads": 1}


class FakeEngine:
    """Its loss is 10 - step; the first token of a batch is its position."""

    def __init__(self, val_losses: list[float] | None = None, nan_at: int = 0, on_step: Any = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._val = iter(val_losses or [])
        self._nan_at, self._on_step = nan_at, on_step

    def train_step(self, batch: Batch, step: int, lr: float, momentum: float, norm_limit: float) -> StepResult:
        self.calls.append(("train", step, int(batch.inputs[0, 0, 0]), lr, momentum))
        if self._on_step:
            self._on_step(step)
        if step == self._nan_at:
            return StepResult(float("nan"), 1.0, batch.inputs.size, applied=False)
        return StepResult(10.0 - step, 1.0, batch.inputs.size)

    def eval_step(self, batch: Batch) -> tuple[float, int]:
        self.calls.append(("eval",))
        return 8 * next(self._val, 2.0), 8

    def state(self) -> dict[str, Any]:
        self.calls.append(("state",))
        shapes = parameter_shapes(ModelConfig.model_validate(MODEL))
        return {f"params/{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def peak_memory_gb(self) -> float:
        return 0.5

    def memory_gb(self) -> dict[str, float]:
        return {"active_memory_gb": 0.25}


class Windows:
    windows = 100

    def at(self, position: int, micro_batches: int, micro_batch_size: int) -> Batch:
        ids = np.full((micro_batches, micro_batch_size, 4), position, np.int32)
        return Batch(ids, ids)


class NullDisplay:
    def step(self, step: int, smooth_loss: float) -> None: ...

    def train(self, step: int, values: dict[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...


def train(
    tmp_path: Path,
    engine: FakeEngine,
    steps: int,
    val: int = 1,
    sample: Any = None,
    start: int = 0,
    guard: dict[str, Any] | None = None,
    data_error: Any = lambda: None,
    **settings: Any,
) -> tuple[bool, list[dict[str, Any]]]:
    settings = {"lr": 1.0, "min_lr": 1.0, "warmup_steps": 0, "micro_batch_size": 2, "grad_accum_steps": 3, **settings}
    config = Config.model_validate({"model": MODEL, "train": settings, "guard": guard or {}})
    val_batches = [Windows().at(0, 1, 2)] * val
    run = Run(config, steps, {}, Windows(), val_batches, 2.0, tmp_path, sample, data_error)  # type: ignore[arg-type]
    progress = Progress(step=start, position=start * 6, tokens=start * 24)
    with MetricsLog(tmp_path / "logs") as log:
        finished = run_training(engine, run, progress, log, NullDisplay())
    lines = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    return finished, lines
