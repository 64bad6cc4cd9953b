"""Where a run stands: all that a checkpoint holds of it beside the engine's arrays."""

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Self

SMOOTHING = 0.02  # of the loss that people look at: the weight of the newest step
RISES = 3  # of the validation loss, one after another, before it is called overfitting


@dataclass
class Progress:
    """`position` counts the windows consumed; `norms` are the last gradient norms, which tell what is a spike;
    `smooth_loss` is a running mean that counts later steps more; `since` the last validation, the sum of
    losses and their count; `curve` has the last validations' losses, each with the mean of the steps before it;
    `returns` counts how often the run went back to the step `returned_to`; `stale`, validations since the
    best one."""

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

    def state(self, seed: int) -> dict[str, Any]:
        """As a checkpoint's state.json has it. Dropout and the order of the data are functions of the seed and the
        step: there is no generator to save."""
        values = asdict(self)
        del values["step"]
        values["data_position"] = values.pop("position")
        values["wall_seconds"] = round(self.wall_seconds, 3)
        return values | {"random_state": {"seed": seed, "step": self.step}}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self:
        """What `state` gave, with the step."""
        values = {name: state[name] for name in cls.__dataclass_fields__ if name in state and name != "position"}
        return cls(position=state["data_position"], **values)

    def trained(self, loss: float) -> None:
        """A step was made; `step` is its number."""
        self.loss = loss
        before = loss if self.smooth_loss is None else self.smooth_loss
        self.smooth_loss = before + (loss - before) * max(SMOOTHING, 2 / (self.step + 1))
        self.since = (self.since[0] + loss, self.since[1] + 1)

    def validated(self, loss: float) -> bool:
        """Whether validation has risen RISES times in a row while training fell: the model learns by heart. The next
        one to say so comes after as many."""
        total, count = self.since
        if count:
            self.curve = [*self.curve, (loss, total / count)][-1 - RISES :]
            self.since = (0.0, 0)
        rising = all(later[0] > earlier[0] for earlier, later in pairwise(self.curve))
        by_heart = len(self.curve) > RISES and rising and self.curve[-1][1] < self.curve[0][1]
        self.curve = self.curve[-1:] if by_heart else self.curve
        return by_heart
