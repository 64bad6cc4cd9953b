"""The reference's log-probabilities of all answers: computed once, kept in the run's folder, and known again."""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.data.conversations.pairs import Pairs
from anarchobot.storage.durable import read_sealed, write_sealed

if TYPE_CHECKING:  # it imports MLX
    from anarchobot.training.preference_engine import PreferenceEngine

FILE = "reference.json"
SAVED_EVERY = 60.0  # seconds: no more is lost when it is interrupted

LogProbs = npt.NDArray[np.float32]


def reference_of(
    engine: "PreferenceEngine",
    splits: Sequence[Pairs],
    folder: Path,
    model: str,
    rows: int,
    say: Callable[[str], object] = lambda text: None,
) -> list[LogProbs]:
    """float32 [pairs, 2] of each split, under the engine's weights, which must be those that the tuning begins with.

    Read from `folder`, which must be locked, as far as they are there, of the same answers and the same `model`; the
    others are computed, `rows` pairs at a time or fewer where memory runs out, and written there. `say` takes lines
    for a person. Raises UserError when there is not the memory for one pair.
    """
    key = hashlib.sha256(" ".join([model, *(split.digest() for split in splits)]).encode()).hexdigest()
    file, total = folder / FILE, sum(split.count for split in splits)
    found = _kept(file, key) or [np.zeros((0, 2), np.float32) for _ in splits]
    if (there := sum(map(len, found))) == total:
        return found
    say(f"what the model thinks of {total - there:,} pairs before it is tuned ...")
    saved = time.monotonic()
    for i, split in enumerate(splits):
        while (first := len(found[i])) < split.count:
            try:
                values = engine.log_probs(split.batch(np.arange(first, first + rows)[None]))[0]  # the last is filled up
            except MemoryError as error:
                if rows == 1:
                    raise UserError(
                        "out of memory with one pair at a time, before training: make data.seq_len or the model smaller"
                    ) from error
                rows = -(-rows // 2)
                say(f"out of memory: going on with {rows} pairs at a time")
                continue
            found[i] = np.concatenate([found[i], values])[: split.count]
            if time.monotonic() - saved >= SAVED_EVERY:
                _keep(file, key, found)
                say(f"{sum(map(len, found)):,} of {total:,} pairs")
                saved = time.monotonic()
    _keep(file, key, found)
    return found


def _keep(file: Path, key: str, found: list[LogProbs]) -> None:
    write_sealed(file, {"of": key, "log_probs": [values.tolist() for values in found]})


def _kept(file: Path, key: str) -> list[LogProbs] | None:
    """Of each split the first ones; None where there are none of these answers and this model, or they are damaged."""
    try:
        kept = read_sealed(file)
        if kept["of"] != key:
            return None
        return [np.array(values, np.float32).reshape(-1, 2) for values in kept["log_probs"]]
    except (OSError, ValueError, KeyError):
        return None
