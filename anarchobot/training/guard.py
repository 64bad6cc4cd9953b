"""Skips updates with NaN, infinite or spiking gradients, and decides when to roll back.

An update is skipped if its loss or gradient is not finite, or if the gradient norm is a spike: more than spike_sigma
standard deviations above the mean of the last spike_window steps (OLMo 2, arXiv 2501.00656, section 3). Spikes enter
the statistics too, so a run whose norms have risen permanently continues after a few steps.
"""

import math
import statistics

from anarchobot.config.schema import GuardConfig


class Guard:
    """Appends to `norms`, the last gradient norms (oldest first), which are part of the checkpoint. The count of
    consecutive non-finite steps is not: no checkpoint is saved until a step is finite again."""

    def __init__(self, settings: GuardConfig, norms: list[float]) -> None:
        self._settings, self._norms = settings, norms
        self._bad_steps = 0  # consecutive

    @property
    def norm_limit(self) -> float:
        """The largest norm that is not a spike; infinite until half of the window is filled."""
        sigma, window = self._settings.spike_sigma, self._settings.spike_window
        if sigma is None or len(self._norms) < max(2, window // 2):
            return math.inf
        return statistics.fmean(self._norms) + sigma * statistics.stdev(self._norms)

    def observe(self, norm: float, *, finite: bool, overflow: bool) -> None:
        """Records a step's norm. An `overflow` means only that float16's loss scale was too large."""
        if finite:
            self._norms.append(norm)
            del self._norms[: -self._settings.spike_window]
        if not overflow:
            self._bad_steps = 0 if finite else self._bad_steps + 1

    @property
    def last_step_was_bad(self) -> bool:
        """Whether the last step was not finite. The weights may be bad, so they should not be saved."""
        return self._bad_steps > 0

    @property
    def should_roll_back(self) -> bool:
        """Whether rollback_after consecutive steps were not finite."""
        limit = self._settings.rollback_after
        return limit is not None and self._bad_steps >= limit
