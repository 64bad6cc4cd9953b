"""Where a run stands: all that a checkpoint holds of it beside the engine's arrays."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass
class Progress:
    """`position` counts the windows consumed; `norms` are the last gradient norms, which tell what is a spike;
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
