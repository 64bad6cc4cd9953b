"""Windows by index: each token a target once, documents separated by the mask; packing against a quadratic best fit."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anarchobot.config.errors import UserError
from anarchobot.data.windows import IGNORE, ConcatWindows, PackedWindows, StreamWindows, best_fit, open_windows

EOD = 999
Ids, Places = npt.NDArray[np.int32], npt.NDArray[np.int64]


class Stream:
    """An in-memory token stream: token t is t, except that each document ends with EOD."""

    folder = Path("shards")
    manifest = SimpleNamespace(eod_id=EOD, dtype="int32")

    def __init__(self, lengths: list[int]) -> None:
        self._starts = np.cumsum([0, *lengths])
        self.tokens = int(self._starts[-1])
        self.ids = np.arange(self.tokens, dtype=np.int32)
        self.ids[self._starts[1:] - 1] = EOD

    def read(self, start: int, stop: int) -> Ids:
        return self.ids[start:stop]

    def rows(self, starts: Places, length: int) -> Ids:
        return np.stack([self.ids[s : s + length] for s in starts.tolist()])

    def slices(self, starts: Places, stops: Places) -> list[memoryview]:
        padded = np.append(np.int32(EOD), self.ids)
        return [padded[a + 1 : b + 1].data for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]

    def concatenate(self, slices: list[memoryview]) -> Ids:
        return np.concatenate([np.asarray(part) for part in slices])

    def document_starts(self) -> Places:
        return self._starts


def all_indices(windows: StreamWindows | PackedWindows) -> npt.NDArray[np.int64]:
    return np.arange(windows.count)


@pytest.mark.parametrize(("lengths", "seq_len"), [([40, 9], 8), ([41, 8], 7), ([50], 49), ([9, 9, 9], 4), ([2], 1)])
def test_each_token_but_the_first_is_a_target_once(lengths: list[int], seq_len: int) -> None:
    stream = Stream(lengths)
    rows = StreamWindows(stream, seq_len).rows(all_indices(StreamWindows(stream, seq_len)))  # type: ignore[arg-type]
    scored = rows.targets != IGNORE
    np.testing.assert_array_equal(rows.targets[scored], stream.ids[1:])
    np.testing.assert_array_equal(rows.inputs[scored], stream.ids[:-1])
    assert scored[:-1].all()


def test_stream_segments_change_at_each_document() -> None:
    stream = Stream([3, 2, 5, 1, 6])
    rows = StreamWindows(stream, 8, document_mask=True).rows(np.array([0, 1]))  # type: ignore[arg-type]
    assert rows.segments is not None
    # Documents begin at 0, 3, 5, 10 and 11; the segment ids of each row begin at zero.
    assert rows.segments.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 2, 2, 2, 2, 2]]


def test_packed_rows_score_each_token_once() -> None:
    """Each from its predecessor, and a document's first token from an end-of-document token, as in generation."""
    stream = Stream([5, 3, 9, 2, 4, 20, 1])
    windows = PackedWindows(stream, 9, document_mask=True)  # type: ignore[arg-type]
    rows = windows.rows(all_indices(windows))
    assert rows.segments is not None
    scored = rows.targets != IGNORE
    assert sorted(rows.targets[scored].tolist()) == sorted(stream.ids.tolist())
    before = {int(target): int(ids) for ids, target in zip(rows.inputs[scored], rows.targets[scored], strict=True)}
    for place, token in enumerate(stream.ids.tolist()):
        if token != EOD:  # all ends of document are equal
            assert before[token] == (stream.ids[place - 1] if place else EOD)
    starts = set(stream.document_starts().tolist())
    for targets, segments in zip(rows.targets, rows.segments, strict=True):
        for i in range(1, 9):
            new = targets[i - 1] == EOD or (targets[i] in starts) or (targets[i] == IGNORE != targets[i - 1])
            if targets[i] not in (IGNORE, EOD) and targets[i] == targets[i - 1] + 1:
                assert segments[i] == segments[i - 1]
            elif new:
                assert segments[i] == segments[i - 1] + (targets[i - 1] != IGNORE)
    assert PackedWindows(stream, 9).rows(np.array([0])).segments is None  # type: ignore[arg-type]


def test_packing_cuts_no_document_that_fits() -> None:
    stream = Stream([7, 6, 5, 4, 3, 3, 2])
    windows = PackedWindows(stream, 10)  # type: ignore[arg-type]
    rows = windows.rows(all_indices(windows))
    assert windows.count == 3  # 30 tokens in rows of ten: 7 + 3, 6 + 4, 5 + 3 + 2
    starts = stream.document_starts()
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        inside = [set(range(start, end - 1)) <= set(row.tolist()) for row in rows.targets]
        assert any(inside)


def test_concat_windows() -> None:
    a, b = StreamWindows(Stream([17]), 4), StreamWindows(Stream([9]), 4)  # type: ignore[arg-type]
    windows = ConcatWindows([a, b])
    assert windows.count == 6
    rows = windows.rows(np.array([5, 0, 4, 3]))
    np.testing.assert_array_equal(rows.inputs[[1, 3]], a.rows(np.array([0, 3])).inputs)
    np.testing.assert_array_equal(rows.targets[[2, 0]], b.rows(np.array([0, 1])).targets)


def test_a_single_row_of_several_sets() -> None:
    a, b = StreamWindows(Stream([17]), 4), StreamWindows(Stream([9]), 4)  # type: ignore[arg-type]
    np.testing.assert_array_equal(ConcatWindows([a, b]).rows(np.array([4])).inputs, b.rows(np.array([0])).inputs)


@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_stream_shorter_than_one_sequence_is_an_error(pack: str) -> None:
    with pytest.raises(UserError, match=r"shards: 8 training tokens are fewer than one sequence of data.seq_len 8"):
        open_windows(Stream([8]), 8, pack, False)  # type: ignore[arg-type]
    assert open_windows(Stream([9]), 8, pack, False).count >= 1  # type: ignore[arg-type]


def rows_of(lengths: list[int], capacity: int) -> list[list[tuple[int, int]]]:
    ends = np.cumsum(np.array(lengths, np.int64))
    first, starts, stops = best_fit(ends - np.array(lengths, np.int64), ends, capacity)
    return [
        list(zip(starts[a:b].tolist(), stops[a:b].tolist(), strict=True))
        for a, b in zip(first[:-1].tolist(), first[1:].tolist(), strict=True)
    ]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 17))
def test_best_fit_cuts_only_documents_longer_than_a_row(lengths: list[int], capacity: int) -> None:
    rows = rows_of(lengths, capacity)
    tokens = sorted(t for row in rows for start, end in row for t in range(start, end))
    assert tokens == list(range(sum(lengths)))
    assert all(0 < sum(end - start for start, end in row) <= capacity for row in rows)
    chunks = sorted(chunk for row in rows for chunk in row)
    start, expected = 0, []
    for length in lengths:
        expected += [(start + i, start + min(i + capacity, length)) for i in range(0, length, capacity)]
        start += length
    assert chunks == expected


@given(st.lists(st.integers(1, 12), min_size=1, max_size=50))
def test_best_fit_uses_as_many_rows_as_a_plain_implementation(lengths: list[int]) -> None:
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting, key=lambda i: room[i])] -= length
        else:
            room.append(12 - length)
    assert len(rows_of(lengths, 12)) == len(room)


def test_best_fit_fills_rows_with_realistic_lengths() -> None:
    """Log-normal lengths around 700 tokens; the published waste is 0.1%."""
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(np.log(700), 1.0, 5000).astype(int)).tolist()
    rows = rows_of(lengths, 2049)
    assert sum(lengths) / (len(rows) * 2049) > 0.995


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_best_fit_of_nothing_is_empty(lengths: list[int]) -> None:
    assert rows_of(lengths, 8) == []
