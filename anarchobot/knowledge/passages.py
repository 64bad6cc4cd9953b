"""Text to passages: pieces short enough for a prompt, cut where a reader would pause."""

import re
from collections.abc import Iterator

CHARS = 1000  # of a passage at most: about 200 English words

# Where to cut, best first: behind a blank line, a sentence, a line, a word. CJK sentences have no space behind them.
_PAUSES = (
    re.compile(r"\n[^\S\n]*\n\s*"),
    re.compile(r"""[.!?…]["')\]”’»]*\s+|[。！？][」』”’）]*\s*"""),
    re.compile(r"\n\s*"),
    re.compile(r"\s+"),
)


def passages(text: str, chars: int = CHARS) -> Iterator[str]:
    """Passages of at most `chars` characters (code points), at least 2; joined, they are the text again.

    Each is as long as can be: it ends at the last pause of the best kind in its second half, so that a heading stays
    with what it heads and short paragraphs come together. A text without any pause is cut at `chars`. Passages don't
    overlap: nothing is found twice, and nothing is stored twice.
    """
    start = 0
    while len(text) - start > chars:
        end = _last_pause(text, start + chars // 2, start + chars) or start + chars
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _last_pause(text: str, low: int, high: int) -> int:
    """The end of the last pause that ends within `low` and `high`; 0 when there is none."""
    for pause in _PAUSES:
        ends = [match.end() for match in pause.finditer(text, low - 1, high)]
        if ends:
            return ends[-1]
    return 0
