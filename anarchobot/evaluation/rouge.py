"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) by the `rouge-score` package, with words of every script.

The package's own words are runs of a-z and 0-9: two identical Russian or Chinese texts have none, and score 0.
"""

import importlib
import re
import unicodedata
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from anarchobot.config.errors import UserError

KINDS = ("rouge1", "rouge2", "rougeL")
# Thai, Lao, Burmese, Khmer, Han, Hiragana, Katakana: written without spaces, so that each character counts as a word.
_ALONE = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


def words(text: str) -> list[str]:
    """Lower-case runs of letters, marks and digits (Unicode categories L, M, N); of _ALONE's scripts, each character.

    Of English these are the package's own words.
    """
    found = []
    for is_word, run in groupby(unicodedata.normalize("NFC", text).lower(), _is_of_a_word):
        if is_word:
            found += _ALONE.sub(lambda match: f" {match[0]} ", "".join(run)).split()
    return found


def _is_of_a_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"


def rouge(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Mean F1 of `rouge1`, `rouge2` and `rougeL` over (reference, text) pairs; 0 without pairs.

    Raises UserError when the package is missing.
    """
    scorer = rouge_package().RougeScorer(list(KINDS), tokenizer=_Words())
    scores = [scorer.score(reference, text) for reference, text in pairs]
    return {kind: sum(score[kind].fmeasure for score in scores) / max(1, len(scores)) for kind in KINDS}


def rouge_package() -> Any:
    """Raises UserError when it is missing."""
    try:
        return importlib.import_module("rouge_score.rouge_scorer")
    except ImportError as error:
        raise UserError("ROUGE needs a package: pip install rouge-score") from error


class _Words:
    """What the package calls a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)
