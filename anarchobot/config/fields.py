"""The kinds of values that settings have, and what a section of them is."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _whole(value: Any) -> Any:
    """Takes `5e4` for 50000 where a whole number is wanted; anything else is left for the type check."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
# The bounds stand before the validator: behind it they would be missing in the JSON Schema.
Count = Annotated[int, Field(ge=0), WHOLE]
Seed = Annotated[int, Field(ge=0, lt=2**32), WHOLE]
Positive = Annotated[int, Field(ge=1), WHOLE]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
if TYPE_CHECKING:
    PositiveOrAuto = int  # what it is once it is read: TrainConfig turns "auto" into a number
else:
    PositiveOrAuto = Positive | Literal["auto"]
Names = Annotated[list[str], Field(min_length=1)]
Weights = Annotated[list[PositiveFloat], Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """No unknown keys, no silent conversions ('3' is not 3), no change once it is read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
