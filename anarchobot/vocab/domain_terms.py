"""Mines domain terms: words that are frequent in domain text and rare in general text.

    tfidf(w) = tf(w) log((1 + n) / (1 + df(w)))

tf counts w in the domain text, df counts the general documents that contain w, of n (Spaerck Jones, 1972, smoothed).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple

_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")  # letters of any script, with hyphens between them


class Term(NamedTuple):
    text: str
    frequency: int
    score: float


def words(text: str) -> list[str]:
    """Returns the words of a text in their original case, as a tokenizer sees them."""
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
    """Returns the `top_k` best words of at least two letters that are not known, best first, ties in alphabetical
    order. Without `use_tfidf`, or without general documents, words are ranked by frequency."""
    frequency = Counter(word for text in domain for word in words(text) if len(word) > 1)
    document_frequency: Counter[str] = Counter()
    documents = 0
    if use_tfidf:
        for text in general:
            document_frequency.update(set(words(text)))
            documents += 1
    terms = [
        Term(word, count, count * (math.log((1 + documents) / (1 + document_frequency[word])) if documents else 1.0))
        for word, count in frequency.items()
        if count >= min_frequency
    ]
    ranked = sorted(terms, key=lambda term: (-term.score, term.text))
    return list(islice((term for term in ranked if not is_known(term.text)), top_k))
