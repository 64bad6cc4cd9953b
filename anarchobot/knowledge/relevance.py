"""What people said of passages, as a number: a fold over the log of their votes, and nothing else.

A passage's relevance s begins at 0. Each vote on it moves it, in the log's order, towards the vote's reward, 1 or -1:

    s ← s + feedback_alpha · w · (reward − s)

so s stays within -1 and 1. w, from 0 to 1, is how near the vote's question was to the one that is asked now: a passage
that was no help with one question may be the best for another, and one vote is not to spoil it. With the same question
w is 1.
"""

import math
from collections.abc import Iterable, Mapping


def relevance(votes: Iterable[tuple[float, float]], alpha: float) -> float:
    """s after these votes, each (reward, w), oldest first."""
    s = 0.0
    for reward, nearness in votes:
        s += alpha * nearness * (reward - s)
    return s


def weight(holders: int, passages: int, most: int) -> float:
    """What a word counts in `nearness`: BM25's idf, ln(1 + (N - n + 0.5) / (n + 0.5)), of a word that `holders` (n) of
    `passages` (N) hold; 0 when more than `most` do."""
    return 0.0 if holders > most else math.log1p((passages - holders + 0.5) / (holders + 0.5))


def nearness(asked: Mapping[str, float], voted: Iterable[str]) -> float:
    """From 0 to 1: how near the question of a vote is to the one that is asked, by the words they share.

    `asked` holds the weight of each word of the question asked. It is the share of these weights that the words in both
    have, times the share of the vote's words that are in both: 1 for the same words, 0 for none, and little where only
    common words (what, is, the) are the same.
    """
    voted = set(voted)
    both = asked.keys() & voted
    if not both or asked.keys() == voted:
        return float(bool(both))
    total = sum(asked.values())
    return sum(asked[word] for word in both) / total * len(both) / len(voted) if total else 0.0
