"""The words of a field: frequent in its texts, rare in general ones.

tfidf(w) = tf(w) log((1 + n) / (1 + df(w))), where tf counts w in the field's texts, and df the n general documents that
hold it (Spaerck Jones, 1972, with the usual smoothing).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")  # letters of any script, and hyphens between them


class Term(NamedTuple):
    text: str
    frequency: int
    score: float


def words(text: str) -> list[str]:
    """As they stand, capitals and all: what a tokenizer is to learn is what is written."""
    return _WORD.findall(text)


def mine_terms(
    domain: Iterable[str],
    general: Iterable[str],
    *,
    top_k: int,
    min_frequency: int,
    use_tfidf: bool,
    is_known: Callable[[str], bool] = lambda word: False,
) -> list[Term]:
    """The `top_k` best words of at least two letters that are not known, best first, ties by the alphabet. Without
    `use_tfidf`, or without general documents, they are ranked by frequency alone."""
    frequency = Counter(word for text in domain for word in words(text) if len(word) > 1)
    holding: Counter[str] = Counter()
    documents = 0
    if use_tfidf:
        for text in general:
            holding.update(set(words(text)))
            documents += 1
    terms = [
        Term(word, count, count * (math.log((1 + documents) / (1 + holding[word])) if documents else 1.0))
        for word, count in frequency.items()
        if count >= min_frequency
    ]
    found: list[Term] = []
    for term in sorted(terms, key=lambda term: (-term.score, term.text)):
        if len(found) == top_k:
            break
        if not is_known(term.text):
            found.append(term)
    return found
