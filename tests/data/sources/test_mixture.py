"""Shares hold at every moment, and nothing is taken that isn't given out."""

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from anarchobot.data.sources.mixture import mix


@given(st.lists(st.tuples(st.floats(0.01, 100), st.lists(st.integers(1, 50), max_size=80)), min_size=1, max_size=4))
def test_bytes_follow_the_weights_until_the_first_source_runs_out(sources: list[tuple[float, list[int]]]) -> None:
    """Sizes stand for items. No source is more than one item ahead of its share; of two, none is behind by more."""
    weights, items = [weight for weight, _ in sources], [sizes for _, sizes in sources]
    drawn = [0] * len(sources)

    def draw(i: int) -> Iterator[int]:
        for size in items[i]:
            drawn[i] += 1
            yield size

    sums, seen = [0] * len(sources), [0] * len(sources)
    for i, size, item in mix([draw(i) for i in range(len(sources))], weights, lambda size: size):
        assert size == item == items[i][seen[i]], "each source keeps its order"
        seen[i] += 1
        sums[i] += size
        shares = [sum(sums) * weight / sum(weights) for weight in weights]
        assert all(had <= share + 50 for had, share in zip(sums, shares, strict=True))
        assert drawn == seen
    assert any(drawn[i] == len(items[i]) for i in range(len(sources)))


def test_it_ends_when_the_next_turn_finds_nothing() -> None:
    given_out = [item for _, _, item in mix([iter(["a", "b"]), iter(["c"])], [1, 1], len)]
    assert given_out == ["a", "c", "b"]
