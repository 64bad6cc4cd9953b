"""What the training loop needs of an engine, MLX's or PyTorch's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

from anarchobot.data.batches import Batch


@dataclass(frozen=True)
class StepResult:
    """Mean loss in nats over the step's `tokens` scored tokens, and the gradient's global norm before clipping.

    `applied`: whether the update was made. `overflow`: it was not, and float16's loss scale, now halved, is to blame.
    `extra`: what else the log's line shall have.
    """

    loss: float
    grad_norm: float
    tokens: int
    applied: bool = True
    overflow: bool = False
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm) and math.isfinite(self.loss)


class Engine(Protocol):
    """What trains: it holds the weights and both optimizers; the loop knows no more of it."""

    def train_step(self, batch: Batch, step: int, lr: float, momentum: float, norm_limit: float) -> StepResult:
        """An update, unless the loss or the gradient is not finite or its norm is above `norm_limit`: then nothing
        changes. Raises MemoryError when the batch was too much, and nothing has changed."""

    def eval_step(self, batch: Batch) -> tuple[float, int]: ...

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays that later steps do not change."""

    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None: ...
    def peak_memory_gb(self) -> float: ...
    def memory_gb(self) -> Mapping[str, float]:
        """What is used now, under the names that the log's lines have."""
