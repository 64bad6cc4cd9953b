"""Ranking: BM25, or BM25 and embeddings, scaled by user feedback.

BM25 is FTS5's (k1 1.2, b 0.75). Rare words are weighted heavily, common words barely, so no stop word list is needed.
The best NUM_CANDIDATES passages by BM25 are ranked by

    score = BM25 / (BM25 of the best passage) · (1 + s)

where s, from -1 to 1, is the passage's relevance: feedback can at most double the score, or reduce it to 0.

With embeddings, the sum of reciprocal ranks takes the place of BM25: 1 / (RANK_OFFSET + rank), summed over the best
NUM_CANDIDATES by BM25 and those by embeddings (Cormack et al. 2009, https://doi.org/10.1145/1571941.1572114).

Relevance is a fold over the log of votes. It starts at 0; each vote with reward 1 or -1, in log order, updates it:

    s ← s + feedback_alpha · w · (reward − s)

w, from 0 to 1, is the similarity of the vote's question to the current one: a passage that does not answer one question
may be the best for another. For the same question, w is 1.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

NUM_CANDIDATES = 100
RANK_OFFSET = 2  # with 60, as in the paper, a middling rank in both outweighs the first in one (docs/knowledge.md)
# Terms are added to a query, starting with the rarest, until they match this many passages. The remaining, most common
# terms barely change the ranking but take nearly all the time. This bounds the time of a search.
MAX_MATCHES = 10_000
MAX_TERMS = 100  # only the first terms of a question are used


class RankedPassage(NamedTuple):
    passage: int  # its id
    score: float


def fts_query(passage_counts: Mapping[str, int]) -> str:
    """The FTS5 expression for terms, each with the number of passages that contain it; empty if there are no matches.

    Terms consist of letters, digits, marks and spaces only (see `search_terms`) and are quoted, so user input is never
    parsed as FTS5 syntax.
    """
    terms: list[str] = []
    matches = 0
    for term, count in sorted(passage_counts.items(), key=lambda item: item[1]):
        if terms and matches + count > MAX_MATCHES:
            break
        if count:
            terms.append(term)
            matches += count
    return " OR ".join(f'"{term}"' for term in terms)


def fuse(*rankings: Iterable[int]) -> dict[int, float]:
    """The sum of reciprocal ranks of each passage; a ranking has the best passage first."""
    sums: dict[int, float] = {}
    for ranking in rankings:
        for rank, passage in enumerate(ranking, start=1):
            sums[passage] = sums.get(passage, 0.0) + 1 / (RANK_OFFSET + rank)
    return sums


def rank_passages(values: Mapping[int, float], relevances: Mapping[int, float]) -> list[RankedPassage]:
    """The candidates with their scores, best first; ties go to the passage added first. `values`: BM25 or reciprocal
    ranks, positive."""
    best = max(values.values(), default=1.0)
    scored = [
        RankedPassage(passage, value / best * (1 + relevances.get(passage, 0.0))) for passage, value in values.items()
    ]
    return sorted(scored, key=lambda ranked: (-ranked.score, ranked.passage))


def relevance(votes: Iterable[tuple[float, float]], alpha: float) -> float:
    """s after these (reward, w) votes, oldest first."""
    s = 0.0
    for reward, similarity in votes:
        s += alpha * similarity * (reward - s)
    return s


def idf(matches: int, passages: int, max_matches: int) -> float:
    """BM25's ln(1 + (N - n + 0.5) / (n + 0.5)) for a term in n = `matches` of N = `passages`; 0 above `max_matches`."""
    return 0.0 if matches > max_matches else math.log1p((passages - matches + 0.5) / (matches + 0.5))


def question_similarity(weights: Mapping[str, float], voted: Iterable[str]) -> float:
    """The similarity, from 0 to 1, of the current question (`weights`: the IDF of its terms) to a vote's question.

    The product of two shares: shared terms in the current question's weight, and shared terms in the vote's terms. It
    is 1 for the same terms, 0 for disjoint ones, and small if only common words (what, is, the) are shared.
    """
    voted = set(voted)
    shared = weights.keys() & voted
    if not shared or weights.keys() == voted:
        return float(bool(shared))
    total = sum(weights.values())
    return sum(weights[term] for term in shared) / total * len(shared) / len(voted) if total else 0.0
