"""Dynamic loss scaling for float16 (Micikevicius et al., 2018): gradients are computed of a multiple of the loss, so
that small ones do not round to zero; a multiple too large shows as inf or nan, costs that step, and is halved."""

from dataclasses import dataclass

GROWTH_INTERVAL = 2000
LARGEST = 2.0**24


@dataclass
class LossScale:
    """`scale` doubles after 2,000 finite steps in a row (`streak` counts them) and halves after one that is not."""

    scale: float = 2.0**16
    streak: int = 0

    def after(self, finite: bool) -> None:
        self.streak = self.streak + 1 if finite else 0
        if not finite:
            self.scale = max(1.0, self.scale / 2)
        elif self.streak == GROWTH_INTERVAL:
            self.scale, self.streak = min(LARGEST, self.scale * 2), 0
