"""What keeps a bad batch, or numbers gone wrong, away from the weights.

An update is left out when its loss or gradient is not finite, or when the gradient's norm is a spike: beyond some
standard deviations from the mean of the steps before it (as OLMo 2 does, arXiv 2501.00656, section 3). A spike goes
into the statistics as well: a run whose norms have risen for good goes on after a few steps.
"""

import math
import statistics

from anarchobot.config.schema import GuardConfig


class Guard:
    """Holds the last norms, oldest first, in the list that it is given, which is part of a checkpoint. How many steps
    in a row were not finite is in none: no checkpoint is made before one is finite again."""

    def __init__(self, settings: GuardConfig, norms: list[float]) -> None:
        self._settings, self._norms = settings, norms
        self._bad_in_a_row = 0

    @property
    def limit(self) -> float:
        """The largest norm that is no spike; infinite until half of the window is known."""
        sigma, window = self._settings.spike_sigma, self._settings.spike_window
        if sigma is None or len(self._norms) < max(2, window // 2):
            return math.inf
        return statistics.fmean(self._norms) + sigma * statistics.stdev(self._norms)

    def saw(self, norm: float, *, finite: bool, overflow: bool) -> None:
        """Takes a step's norm in. An `overflow` is float16's loss scale finding its size: no fault of the numbers."""
        if finite:
            self._norms.append(norm)
            del self._norms[: -self._settings.spike_window]
        if not overflow:
            self._bad_in_a_row = 0 if finite else self._bad_in_a_row + 1

    @property
    def doubts(self) -> bool:
        """Whether the last step was not finite: the weights may be bad, and no checkpoint should be made of them."""
        return self._bad_in_a_row > 0

    @property
    def gives_up(self) -> bool:
        """Whether so many steps in a row were not finite that the weights themselves must be bad."""
        most = self._settings.rollback_after
        return most is not None and self._bad_in_a_row >= most
