"""Best fit: nothing lost, nothing cut that fits, rows well filled; against a plain quadratic best fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anarchobot.data.packing import best_fit


def rows_of(lengths: list[int], capacity: int) -> list[list[tuple[int, int]]]:
    ends = np.cumsum(np.array(lengths, np.int64))
    first, starts, stops = best_fit(ends - np.array(lengths, np.int64), ends, capacity)
    return [
        list(zip(starts[a:b].tolist(), stops[a:b].tolist(), strict=True))
        for a, b in zip(first[:-1].tolist(), first[1:].tolist(), strict=True)
    ]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 17))
def test_every_token_is_in_one_row_and_only_what_is_too_long_is_cut(lengths: list[int], capacity: int) -> None:
    rows = rows_of(lengths, capacity)
    tokens = sorted(t for row in rows for start, end in row for t in range(start, end))
    assert tokens == list(range(sum(lengths)))
    assert all(0 < sum(end - start for start, end in row) <= capacity for row in rows)
    pieces = sorted(piece for row in rows for piece in row)
    place, wanted = 0, []
    for length in lengths:
        wanted += [(place + i, place + min(i + capacity, length)) for i in range(0, length, capacity)]
        place += length
    assert pieces == wanted


@given(st.lists(st.integers(1, 12), min_size=1, max_size=50))
def test_it_uses_as_many_rows_as_a_plain_best_fit(lengths: list[int]) -> None:
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting, key=lambda i: room[i])] -= length
        else:
            room.append(12 - length)
    assert len(rows_of(lengths, 12)) == len(room)


def test_a_real_spread_of_lengths_fills_the_rows() -> None:
    """Log-normal lengths around 700 tokens: the published waste is 0.1 %."""
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(np.log(700), 1.0, 5000).astype(int)).tolist()
    rows = rows_of(lengths, 2049)
    assert sum(lengths) / (len(rows) * 2049) > 0.995


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_gives_no_rows(lengths: list[int]) -> None:
    assert rows_of(lengths, 8) == []
