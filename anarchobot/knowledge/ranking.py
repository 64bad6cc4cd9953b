"""Which passages answer a question best: BM25, moved by what people said of them.

BM25 is FTS5's own (k1 1.2, b 0.75): rare words count much, common ones next to nothing, so no list of stop words is
needed. The best CANDIDATES by BM25 are put in the order of

    score = BM25 / (the best passage's BM25) · (1 + s)

where s, from -1 to 1, is the passage's relevance (relevance.py): a passage can at most double its score, or lose it.
"""

from collections.abc import Mapping
from typing import NamedTuple

CANDIDATES = 100
# Words are taken from the rarest on until the passages that hold them are so many; the rest, the commonest, hardly
# change the order and take nearly all the time. So the time of a search does not grow with the base.
MOST_PASSAGES = 10_000
MOST_WORDS = 100  # of a question: the first ones


class Ranked(NamedTuple):
    """A passage's id, and its score."""

    passage: int
    score: float


def query(holders: Mapping[str, int]) -> str:
    """FTS5's expression for a question whose words are in so many passages each; empty when none is in any.

    Words hold letters, numbers, marks and spaces alone (words.py) and are quoted, so nothing that was typed is syntax.
    """
    taken: list[str] = []
    passages = 0
    for word, count in sorted(holders.items(), key=lambda item: item[1]):
        if taken and passages + count > MOST_PASSAGES:
            break
        if count:
            taken.append(word)
            passages += count
    return " OR ".join(f'"{word}"' for word in taken)


def ranked(bm25: Mapping[int, float], relevances: Mapping[int, float]) -> list[Ranked]:
    """The candidates with their scores, best first; of equal ones the one added first. `bm25` is above 0."""
    best = max(bm25.values(), default=1.0)
    scored = [Ranked(passage, value / best * (1 + relevances.get(passage, 0.0))) for passage, value in bm25.items()]
    return sorted(scored, key=lambda one: (-one.score, one.passage))
