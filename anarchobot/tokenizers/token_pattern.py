"""Finds added tokens in text, as Hugging Face's library does: the longest one at the leftmost position, then the
whitespace around it that it absorbs (`lstrip`, `rstrip`). Takes time linear in the text, however hostile."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from os.path import commonprefix
from typing import NamedTuple

from anarchobot.tokenizers.special_tokens import AddedToken

# Whitespace as Unicode defines it and the library does; Python's also has U+001C to U+001F.
_SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_AFTER = re.compile(f"[{_SPACES}]*")
_WORD = re.compile(r"\w")


class TokenMatch(NamedTuple):
    """`content` is the token, `start` and `end` include the whitespace that it absorbs."""

    start: int
    end: int
    content: str


@dataclass(frozen=True)
class TokenPattern:
    """Matches any of `tokens`."""

    tokens: tuple[AddedToken, ...]

    @cached_property
    def _by_content(self) -> dict[str, AddedToken]:
        return {token["content"]: token for token in self.tokens}

    @cached_property
    def _contents(self) -> re.Pattern[str]:
        return re.compile(_any_of(self._by_content))

    @cached_property
    def _starts(self) -> re.Pattern[str]:
        return re.compile(f"(?={_any_of(self._by_content)}).", re.DOTALL)

    def finditer(self, text: str, start: int = 0, end: int | None = None) -> Iterator[TokenMatch]:
        """The tokens in text[start:end], from left to right."""
        end = len(text) if end is None else end
        for match in self._contents.finditer(text, start, end):
            content, stop = match[0], match.end()
            token = self._by_content[content]
            if match.start() < start or (token.get("single_word") and _touches_word(text, *match.span())):
                continue
            between = text[start : match.start()]  # after the previous token, so all slices together are no longer
            left = len(between.rstrip(_SPACES)) if token.get("lstrip") else len(between)
            if token.get("rstrip"):
                stop = _AFTER.match(text, stop, end).end()  # type: ignore[union-attr]  # matches the empty string
            yield TokenMatch(start + left, stop, content)
            start = stop

    def search(self, text: str, start: int = 0, end: int | None = None) -> TokenMatch | None:
        """The first token in text[start:end]."""
        return next(self.finditer(text, start, end), None)

    def split_inside(self, text: str) -> list[str]:
        """Splits the text after the first character of every token in it, also of overlapping ones."""
        bounds = [0, *(match.end() for match in self._starts.finditer(text)), len(text)]
        return [text[a:b] for a, b in pairwise(bounds)]


def _touches_word(text: str, start: int, end: int) -> bool:
    return bool((start and _WORD.match(text, start - 1)) or _WORD.match(text, end))


def _any_of(words: Iterable[str]) -> str:
    """A regular expression for the longest of `words`: a trie, in which a text is compared with one branch per
    character. With an alternation of hundreds of similar words it would be compared with each."""
    words = sorted(set(words))
    if not words:
        return "(?!)"
    prefix = commonprefix(words)  # noqa: RUF071  not of paths
    rests = [word[len(prefix) :] for word in words]
    branches = [_any_of(group) for _, group in groupby(filter(None, rests), key=lambda rest: rest[0])]
    optional = "?" if "" in rests else ""
    return re.escape(prefix) + (f"(?:{'|'.join(branches)}){optional}" if branches else "")
