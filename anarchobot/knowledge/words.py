"""Text to the words that are searched for, in languages with spaces and without.

The index splits text at what is no letter or number (FTS5's tokenizer does). Chinese, Japanese, Thai and some others
write no spaces: there each character is indexed as a word of its own, and two that stand together are what a question
looks for.
"""

import re
import unicodedata
from itertools import pairwise

# Thai, Lao, Myanmar, Khmer, kana, ideographs. The index holds what `spaced` makes of a text, and an entry can be taken
# out of it only by the same words: who changes these ranges must make a new version of the file's format.
_NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
# Soft hyphens, joiners, marks of direction, variation selectors: a word with them is the word without.
_INVISIBLE = re.compile("[\u00ad\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]")
_PICTURES = re.compile("[\U0001f000-\U0001faff]")  # part no words in FTS5, whose Unicode is older than most of them
_CHARACTER = re.compile(f"([{_NO_SPACES}])")
_RUNS = re.compile(f"[{_NO_SPACES}]+|[^{_NO_SPACES}\\s]+")
_PARTS = ("L", "N", "M")  # of Unicode's categories: letters, numbers, marks


def spaced(text: str) -> str:
    """The text as it is indexed: no invisible characters, a space on either side of each of a script without spaces."""
    return _CHARACTER.sub(r" \1 ", _PICTURES.sub(" ", _INVISIBLE.sub("", text)))


def words(text: str) -> list[str]:
    """The different words of a text, in their order: letters and numbers alone, in lower case.

    Of a script without spaces, each two neighbours (`"東 京"`), or the one character where it stands alone.
    """
    visible = _PICTURES.sub(" ", _INVISIBLE.sub("", text.lower()))
    plain = "".join(c if unicodedata.category(c)[0] in _PARTS else " " for c in visible)
    found: dict[str, None] = {}
    for run in _RUNS.findall(plain):
        if not any(c.isalnum() for c in run):  # marks alone, such as an emoji's
            continue
        if len(run) == 1 or not _CHARACTER.match(run):
            found[run] = None
        else:
            found.update(dict.fromkeys(f"{a} {b}" for a, b in pairwise(run)))
    return list(found)
