"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) by the `rouge-score` package, with Unicode-aware word splitting.

The package's tokenizer keeps only a-z and 0-9, so two identical Russian or Chinese texts would score 0.
"""

import importlib
import re
import unicodedata
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from anarchobot.config.errors import UserError

KINDS = ("rouge1", "rouge2", "rougeL")
# Thai, Lao, Burmese, Khmer, Han, Hiragana, Katakana: written without spaces, so every character counts as a word.
_SINGLE_CHARACTER_WORDS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


def words(text: str) -> list[str]:
    """Lowercase runs of letters, marks and digits (Unicode categories L, M and N); single characters in scripts without
    spaces. For English, the same words as the package's."""
    result, normalized = [], unicodedata.normalize("NFC", text).lower()
    for is_word, run in groupby(normalized, lambda character: unicodedata.category(character)[0] in "LMN"):
        if is_word:
            result += _SINGLE_CHARACTER_WORDS.sub(lambda match: f" {match[0]} ", "".join(run)).split()
    return result


def rouge(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Mean F1 of `rouge1`, `rouge2` and `rougeL` over (reference, text) pairs; 0 without pairs. Raises UserError if the
    package is missing."""
    return {kind: sum(scores) / max(1, len(scores)) for kind, scores in rouge_scores(pairs).items()}


def rouge_scores(pairs: Iterable[tuple[str, str]]) -> dict[str, list[float]]:
    """The F1 of each pair, otherwise like `rouge`."""
    scorer = rouge_package().RougeScorer(list(KINDS), tokenizer=_Tokenizer())
    scores = [scorer.score(reference, text) for reference, text in pairs]
    return {kind: [score[kind].fmeasure for score in scores] for kind in KINDS}


def rouge_package() -> Any:
    """Raises UserError if it is missing."""
    try:
        return importlib.import_module("rouge_score.rouge_scorer")
    except ImportError as error:
        raise UserError("ROUGE needs a package: pip install rouge-score") from error


class _Tokenizer:
    def tokenize(self, text: str) -> list[str]:
        return words(text)
