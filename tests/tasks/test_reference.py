"""The reference's log-probabilities: kept as they come, in smaller batches where memory runs out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.data.conversations.pairs import PairBatch, Pairs
from anarchobot.data.conversations.table import table
from anarchobot.tasks import reference
from anarchobot.tasks.reference import reference_of
from anarchobot.tokenizers.chat_encoder import Encoded


def numbered(count: int, first: int) -> Pairs:
    """Pair n says n + first and then 1, or 2."""
    sides = (
        table((Encoded(np.array([n + first, side]), np.array([False, True])) for n in range(count)), 99)
        for side in (1, 2)
    )
    return Pairs(*sides, seq_len=1, pad_id=0)


class Model:
    """Gives each answer -10 times what it begins with, and minus what it says; runs out of memory above `most` pairs,
    and of patience after `calls`."""

    def __init__(self, most: int = 99, calls: int = 99) -> None:
        self.most, self.calls, self.seen = most, calls, list[int]()

    def log_probs(self, batch: PairBatch) -> Any:
        self.seen.append(batch.inputs.shape[1])
        if batch.inputs.shape[1] > self.most:
            raise MemoryError
        if len(self.seen) > self.calls:
            raise KeyboardInterrupt
        return (-10 * batch.inputs - batch.targets)[..., 0].astype(np.float32)


SPLITS = (numbered(7, 10), numbered(4, 50))
WANTED = [np.array([[-10 * (n + first) - 1, -10 * (n + first) - 2] for n in range(count)], np.float32)
          for count, first in ((7, 10), (4, 50))]  # fmt: skip


def found(model: Model, folder: Path, rows: int = 2, name: str = "m", said: list[str] | None = None) -> None:
    values = reference_of(model, SPLITS, folder, name, rows, (said if said is not None else []).append)  # type: ignore[arg-type]
    for given, wanted in zip(values, WANTED, strict=True):
        np.testing.assert_array_equal(given, wanted)


def test_each_pair_once_and_then_never_again(tmp_path: Path) -> None:
    model, said = Model(), list[str]()
    found(model, tmp_path, said=said)
    assert model.seen == [2] * 6 and said == ["what the model thinks of 11 pairs before it is tuned ..."]
    found(Model(calls=0), tmp_path, said=said)
    assert len(said) == 1
    with pytest.raises(KeyboardInterrupt):
        found(Model(calls=0), tmp_path, name="another")
    (tmp_path / "reference.json").write_text("{}")
    found(model, tmp_path)


def test_what_was_done_before_an_interruption_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SAVED_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        found(Model(calls=5), tmp_path)
    rest, said = Model(), list[str]()
    found(rest, tmp_path, said=said)
    assert len(rest.seen) == 1
    assert said == ["what the model thinks of 2 pairs before it is tuned ...", "11 of 11 pairs"]


def test_out_of_memory_means_smaller_batches_and_at_last_a_line(tmp_path: Path) -> None:
    model, said = Model(most=2), list[str]()
    found(model, tmp_path, rows=5, said=said)
    assert model.seen == [5, 3, 2, 2, 2, 2, 2, 2]
    assert said[1:] == [
        "out of memory: going on with 3 pairs at a time",
        "out of memory: going on with 2 pairs at a time",
    ]
    with pytest.raises(UserError, match="out of memory with one pair at a time") as error:
        found(Model(most=0), tmp_path, name="another")
    assert "\n" not in str(error.value)
