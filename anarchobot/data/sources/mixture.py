"""Several sources as one, in given shares of bytes at every moment."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def mix(
    sources: Sequence[Iterator[Item]], weights: Sequence[float], size: Callable[[Item], int]
) -> Iterator[tuple[int, int, Item]]:
    """(index of its source, its size, item), always from the source that lags furthest behind its share; the first of
    several. No chance is in it. It ends with the first source to run out.

    With w_i the weights divided by their sum and b_i what source i has given, source i lags by w_i * sum(b) - b_i. Of
    two sources, each is never further from its share than the largest item. An item is taken only to be given out.
    """
    given = [0] * len(sources)
    total = sum(weights)
    while True:
        behind = [weight * sum(given) / total - b for weight, b in zip(weights, given, strict=True)]
        i = behind.index(max(behind))
        try:
            item = next(sources[i])
        except StopIteration:
            return
        taken = size(item)
        given[i] += taken
        yield i, taken, item
