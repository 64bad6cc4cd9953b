"""The cache of a teacher's predictions: what is written is read, and damage and gaps are found."""

from pathlib import Path

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.data.batches import TrainBatches
from anarchobot.data.teacher_cache import (
    CHECKSUMS,
    IDS,
    LOG_PROBS,
    TeacherBatch,
    TeacherCache,
    TeacherWindows,
    record_bytes,
)
from anarchobot.data.windows import IGNORE, Batch, ConcatWindows, Ints

L, K = 6, 2


class Numbered:
    """Window w has its number as inputs, and (w + first) % 5 scored positions at varying places."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def rows(self, indices: Ints) -> Batch:
        numbers = indices + self.first
        inputs = np.repeat(numbers[:, None], L, axis=1).astype(np.int32)
        positions = (np.arange(L) + numbers[:, None]) % L
        return Batch(inputs, np.where(positions < numbers[:, None] % 5, inputs, IGNORE).astype(np.int32))


def records(windows: Numbered, indices: Ints) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities that tell window and position, for the scored positions."""
    batch = windows.rows(indices)
    codes = (100 * batch.inputs + np.arange(L))[batch.targets >= 0]
    return np.stack([codes, codes + 1], axis=1), np.stack([-codes, -codes - 1, -codes - 2], axis=1).astype(np.float16)


def filled(folder: Path, windows: Numbered, indices: Ints) -> TeacherCache:
    cache = TeacherCache(folder, windows, K, 2**16)
    for part in np.array_split(cache.missing(indices), 3):
        cache.write(part, *records(windows, part))
    cache.save()
    return cache


def check(batch: TeacherBatch, windows: Numbered, indices: Ints) -> None:
    scored = batch.targets >= 0
    ids, log_probs = records(windows, indices)
    np.testing.assert_array_equal(batch.teacher_ids[scored], ids)
    np.testing.assert_array_equal(batch.teacher_log_probs[scored], log_probs)
    assert not batch.teacher_ids[~scored].any() and not batch.teacher_log_probs[~scored].any()


def test_records_are_read_in_any_order_by_a_later_run(tmp_path: Path) -> None:
    windows, order = Numbered(20), np.array([7, 3, 3, 19, 0])
    filled(tmp_path, windows, np.arange(20))
    cache = TeacherCache(tmp_path, windows, K, 2**16)
    assert not cache.missing(np.arange(20)).size
    check(cache.read(order, windows.rows(order)), windows, order)
    scored = 4 * sum(range(5))
    assert cache.size(np.arange(20)) == scored * record_bytes(K, 2**16) == scored * (2 * K + 2 * (K + 1))
    assert (tmp_path / IDS).stat().st_size + (tmp_path / LOG_PROBS).stat().st_size == cache.size(np.arange(20))
    assert record_bytes(K, 2**16 + 1) == 4 * K + 2 * (K + 1)


def test_only_missing_windows_are_computed_longest_first(tmp_path: Path) -> None:
    windows = Numbered(20)
    filled(tmp_path, windows, np.array([2, 4, 9]))
    cache = TeacherCache(tmp_path, windows, K, 2**16)
    missing = cache.missing(np.array([2, 3, 4, 6, 9]))
    lengths = {w: int(np.flatnonzero(windows.rows(np.array([w])).targets[0] >= 0)[-1]) for w in (3, 6)}
    assert sorted(missing.tolist()) == [3, 6] and lengths[int(missing[0])] >= lengths[int(missing[1])]
    with pytest.raises(UserError, match=r"no record of training sequence 3, .*--resume-from auto") as error:
        cache.read(np.array([2, 3]), windows.rows(np.array([2, 3])))
    assert "\n" not in str(error.value)


def test_damaged_lost_and_unsaved_records_are_missing(tmp_path: Path) -> None:
    windows, everything = Numbered(20), np.arange(20)

    def missing() -> list[int]:
        return sorted(TeacherCache(tmp_path, windows, K, 2**16).missing(everything).tolist())

    filled(tmp_path, windows, everything)
    for name in (IDS, LOG_PROBS):
        data = bytearray((tmp_path / name).read_bytes())
        data[-1] ^= 1
        (tmp_path / name).write_bytes(data)
        assert missing() == [19]
        data[-1] ^= 1
        (tmp_path / name).write_bytes(data)
    assert missing() == []
    unsaved = TeacherCache(tmp_path, windows, K, 2**16)
    unsaved.missing(everything)
    unsaved.write(np.array([8]), records(windows, np.array([8]))[0] + 1, records(windows, np.array([8]))[1])
    assert missing() == [8]  # as after a crash between `write` and `save`
    content = (tmp_path / CHECKSUMS).read_bytes()
    scored = sorted(np.flatnonzero(everything % 5).tolist())
    for broken in (b"", content[:-5], b"\x93NUMPY" + content[6:40]):
        (tmp_path / CHECKSUMS).write_bytes(broken)
        assert missing() == everything.tolist() and scored
    (tmp_path / CHECKSUMS).unlink()
    assert missing() == everything.tolist()


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]], ids=str)
def test_a_mixture_reads_the_records_of_the_windows_that_it_draws(tmp_path: Path, weights: list[float] | None) -> None:
    """Across the sets' epochs. The windows that a part of the run draws are known before."""
    sets = [Numbered(7), Numbered(9, first=7)]
    taught = [TeacherWindows(s, start) for s, start in zip(sets, (0, 7), strict=True)]
    batches = TrainBatches(taught, 3, weights)
    drawn = batches.drawn(5, 11)
    cache = TeacherCache(tmp_path, ConcatWindows(sets), K, 2**16)
    for w in cache.missing(drawn).tolist():
        cache.write(np.array([w]), *records(Numbered(16), np.array([w])))
    assert not isinstance(batches.at(5, 3, 2), TeacherBatch)
    for windows in taught:
        windows.cache = cache
    batch = batches.at(5, 3, 2)
    assert isinstance(batch, TeacherBatch)
    numbers = batch.inputs[..., 0].reshape(-1)
    assert set(numbers.tolist()) == set(drawn.tolist()) and batch.teacher_ids.shape == (3, 2, L, K)
    check(batch.map(lambda x: x.reshape(6, *x.shape[2:])), Numbered(16), numbers.astype(np.int64))
    assert set(batches.drawn(0, 500).tolist()) == set(range(16))
    assert batches.drawn(4, 4).size == 0
