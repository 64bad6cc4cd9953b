"""The reference's log-probabilities of all answers: computed once, kept in the run's folder, and known again."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from anarchobot.data.conversations.pairs import Pairs, PairValBatches
from anarchobot.storage.durable import read_sealed, write_sealed

if TYPE_CHECKING:  # it imports MLX
    from anarchobot.training.preference import PreferenceEngine

FILE = "reference.json"
ROWS = 8  # pairs at a time

LogProbs = npt.NDArray[np.float32]


def reference_of(engine: "PreferenceEngine", splits: Sequence[Pairs], folder: Path, model: str) -> list[LogProbs]:
    """float32 [pairs, 2] of each split, under the engine's weights, which must be those that the tuning begins with.

    Read from `folder`, which must be locked, where they are there, of the same answers and the same `model`; else
    computed, and written there.
    """
    key = hashlib.sha256(" ".join([model, *(split.digest() for split in splits)]).encode()).hexdigest()
    file = folder / FILE
    try:
        kept = read_sealed(file)
        if kept["of"] == key:
            return [np.array(values, np.float32).reshape(-1, 2) for values in kept["log_probs"]]
    except (OSError, ValueError, KeyError):
        pass  # none, or damaged: it is made anew
    found = [_of_split(engine, split) for split in splits]
    write_sealed(file, {"of": key, "log_probs": [values.tolist() for values in found]})
    return found


def _of_split(engine: "PreferenceEngine", split: Pairs) -> LogProbs:
    batches = PairValBatches(split, ROWS, None)
    parts = [engine.log_probs(batches[i])[0] for i in range(len(batches))]  # [ROWS, 2] each; the last is filled up
    return np.concatenate([np.zeros((0, 2), np.float32), *parts])[: split.count]
