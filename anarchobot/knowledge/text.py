"""Text processing for the knowledge base: read files, split them into passages, extract search terms.

FTS5 splits text at characters that are neither letters nor digits. Chinese, Japanese, Thai and some other scripts have
no spaces between words: each character is indexed as a word, and a query searches for pairs of adjacent characters.
"""

import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import documents
from anarchobot.data.sources.documents import DocumentCounts
from anarchobot.data.sources.files import FileRange

MAX_CHARS = 1000  # per passage: about 200 English words

# Where to split, best first: after a blank line, a sentence, a line, a word. CJK sentences are not followed by a space.
_BOUNDARIES = (
    re.compile(r"\n[^\S\n]*\n\s*"),
    re.compile(r"""[.!?…]["')\]”’»]*\s+|[。！？][」』”’）]*\s*"""),
    re.compile(r"\n\s*"),
    re.compile(r"\s+"),
)

# Thai, Lao, Myanmar, Khmer, kana, ideographs. Deleting an entry from the index requires the same `index_text` output
# that created it, so changing these ranges requires a new file format version.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
# Soft hyphens, joiners, direction marks, variation selectors: ignored within words.
_INVISIBLE = re.compile("[\u00ad\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]")
_EMOJI = re.compile("[\U0001f000-\U0001faff]")  # not separators in FTS5, whose Unicode version predates most of them
_UNSPACED_CHARACTER = re.compile(f"([{_UNSPACED}])")
_RUNS = re.compile(f"[{_UNSPACED}]+|[^{_UNSPACED}\\s]+")
_TERM_CATEGORIES = ("L", "N", "M")  # Unicode categories: letters, numbers, marks


def read_texts(path: Path, data: DataConfig, counts: DocumentCounts) -> Iterator[tuple[str, str]]:
    """Yields (source, text) for each text of a file; blank and broken texts are counted and skipped.

    `data.text_field` is the field of JSONL and Parquet rows. Raises UserError if the file is empty, not text, or lacks
    that field; OSError if it cannot be read.
    """
    data = data.model_copy(update={"score_min": None})  # all passages, regardless of their score
    for source, text in documents.read_texts(FileRange(path), data):
        counts.read += 1
        if isinstance(text, ValueError):
            counts.add_broken(source, text)
        elif not text or text.isspace():
            counts.add_filtered("blank")
        else:
            counts.kept += 1
            yield source, text


def split_passages(text: str, max_chars: int = MAX_CHARS) -> Iterator[str]:
    """Splits a text into passages of at most `max_chars` (at least 2) code points; joined, they are the text again.

    Each passage is as long as possible: it ends at the last boundary of the best kind in its second half, so that a
    heading stays with its section and short paragraphs stay together. Text without any boundary is cut at `max_chars`.
    Passages do not overlap, so nothing is stored or found twice.
    """
    start = 0
    while len(text) - start > max_chars:
        end = _last_boundary(text, start + max_chars // 2, start + max_chars) or start + max_chars
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _last_boundary(text: str, low: int, high: int) -> int:
    """The end of the last boundary that ends between `low` and `high`, or 0."""
    for boundary in _BOUNDARIES:
        ends = [match.end() for match in boundary.finditer(text, low - 1, high)]
        if ends:
            return ends[-1]
    return 0


def index_text(text: str) -> str:
    """The text as indexed: without invisible characters, and with spaces around each character of unspaced scripts."""
    return _UNSPACED_CHARACTER.sub(r" \1 ", _EMOJI.sub(" ", _INVISIBLE.sub("", text)))


def search_terms(text: str) -> list[str]:
    """The distinct words of a text in order of appearance: letters, digits and marks only, in lower case.

    In unspaced scripts: each pair of adjacent characters (`"東 京"`), or a character that stands alone.
    """
    visible = _EMOJI.sub(" ", _INVISIBLE.sub("", text.lower()))
    plain = "".join(c if unicodedata.category(c)[0] in _TERM_CATEGORIES else " " for c in visible)
    terms: dict[str, None] = {}
    for run in _RUNS.findall(plain):
        if not any(c.isalnum() for c in run):  # marks only, such as an emoji's
            continue
        if len(run) == 1 or not _UNSPACED_CHARACTER.match(run):
            terms[run] = None
        else:
            terms.update(dict.fromkeys(f"{a} {b}" for a, b in pairwise(run)))
    return list(terms)
