"""Metrics as ratios of sums over units (documents, answers, questions), and their 95% confidence intervals.

The standard errors are those of a ratio estimator (Cochran, Sampling Techniques, 1977, chapter 6). For two models on
the same units, the interval is that of the paired difference, which is much narrower than either model's own (Miller,
Adding Error Bars to Evals, arXiv 2411.00640, 2024).
"""

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Ratio:
    """The sum of `values` divided by the sum of `weights`, both float64 [units]."""

    values: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]

    @property
    def mean(self) -> float:
        return float(self.values.sum() / self.weights.sum())

    def half_width(self) -> float | None:
        """Half of the 95% confidence interval; None for a single unit."""
        return _half_width(self._influence())

    def difference_half_width(self, other: "Ratio") -> float | None:
        """The same for the difference of the means of both, whose units must be the same."""
        return _half_width(self._influence() - other._influence())

    def _influence(self) -> npt.NDArray[np.float64]:
        """How much each unit moves the mean. The sum is zero."""
        influence: npt.NDArray[np.float64] = (self.values - self.mean * self.weights) / self.weights.sum()
        return influence


def mean_of(values: Any) -> Ratio:
    """The plain mean of one value per unit."""
    array = np.asarray(values, np.float64)
    return Ratio(array, np.ones_like(array))


def _half_width(influence: npt.NDArray[np.float64]) -> float | None:
    n = len(influence)
    return None if n < 2 else Z * math.sqrt(n / (n - 1) * float(np.square(influence).sum()))


@dataclass
class Result:
    """The metrics of a model on one data set. `units` are the names of the units of `ratios`; `counts` are metrics
    without an interval; `answers` holds rows of `row`, `question`, `reference`, `answer` and their scores."""

    units: list[str] = field(default_factory=list)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        means: dict[str, float] = {}
        for name, ratio in self.ratios.items():
            means[name] = ratio.mean
            if name == "loss":
                means["perplexity"] = math.exp(min(ratio.mean, 700.0))
        return means | self.counts

    @property
    def intervals(self) -> dict[str, float]:
        """Half-widths of the metrics that have them."""
        widths = {name: ratio.half_width() for name, ratio in self.ratios.items()}
        return {name: width for name, width in widths.items() if width is not None}


def loss_ratios(nats: Any, tokens: Any, size: Any) -> dict[str, Ratio]:
    """`loss` (nats per token) and `bits_per_byte`, from the cross-entropy, tokens and bytes of each unit."""
    losses, weights, sizes = (np.asarray(x, np.float64) for x in (nats, tokens, size))
    return {"loss": Ratio(losses, weights), "bits_per_byte": Ratio(losses / math.log(2), sizes)}
