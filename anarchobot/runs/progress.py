"""The state of a training run that a checkpoint stores in addition to the engine's arrays."""

import math
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Self

from anarchobot.config.errors import UserError

SMOOTHING = 0.02  # weight of the newest step in the smoothed loss
OVERFITTING_RISES = 3  # consecutive rises of validation loss that count as overfitting


@dataclass
class Progress:
    """The fields are keys of state.json.

    position:       windows consumed (`data_position` in state.json)
    norms:          last gradient norms, for spike detection
    smooth_loss:    running mean of the training loss, weighted toward later steps
    since:          sum and count of training losses since the last validation
    curve:          last validations: (validation loss, mean training loss before it)
    returns:        consecutive rollbacks to step `returned_to`
    stale:          validations since the best one
    skipped_steps:  steps whose update was not applied
    """

    step: int = 0
    position: int = 0
    tokens: int = 0
    loss: float | None = None
    best_val_loss: float | None = None
    best_val_bpb: float | None = None
    wall_seconds: float = 0.0
    norms: list[float] = field(default_factory=list)
    smooth_loss: float | None = None
    since: tuple[float, int] = (0.0, 0)
    curve: list[tuple[float, float]] = field(default_factory=list)
    returns: int = 0
    returned_to: int = 0
    stale: int = 0
    skipped_steps: int = 0

    def to_state(self, seed: int) -> dict[str, Any]:
        """Returns the keys of state.json, except for the step. There is no generator state to save: dropout and data
        order are functions of seed and step."""
        values = asdict(self)
        del values["step"]
        values["data_position"] = values.pop("position")
        values["wall_seconds"] = round(self.wall_seconds, 3)
        return values | {"random_state": {"seed": seed, "step": self.step}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Raises UserError if `state` has no data position."""
        if "data_position" not in state:
            raise UserError("state.json has no data_position: the checkpoint can't be resumed")
        values = {name: state[name] for name in cls.__dataclass_fields__ if name in state and name != "position"}
        return cls(position=state["data_position"], **values)

    def record_train_loss(self, loss: float) -> float:
        """Records the loss of step `self.step`. Returns the smoothed loss."""
        self.loss = loss
        before = loss if self.smooth_loss is None else self.smooth_loss
        self.smooth_loss = before + (loss - before) * max(SMOOTHING, 2 / (self.step + 1))
        self.since = (self.since[0] + loss, self.since[1] + 1)
        return self.smooth_loss

    def record_val_loss(self, loss: float) -> bool:
        """Returns whether the model is overfitting: validation loss has risen OVERFITTING_RISES times in a row while
        training loss fell. It is next reported after as many further rises."""
        if not math.isfinite(loss):  # can't be compared, and JSON has no NaN
            self.curve, self.since = [], (0.0, 0)
            return False
        total, count = self.since
        if count:
            self.curve = [*self.curve, (loss, total / count)][-1 - OVERFITTING_RISES :]
            self.since = (0.0, 0)
        rising = all(later[0] > earlier[0] for earlier, later in pairwise(self.curve))
        overfitting = len(self.curve) > OVERFITTING_RISES and rising and self.curve[-1][1] < self.curve[0][1]
        self.curve = self.curve[-1:] if overfitting else self.curve
        return overfitting
