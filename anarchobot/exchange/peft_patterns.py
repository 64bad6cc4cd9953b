"""The keys of PEFT's alpha_pattern: names of modules, or regular expressions from a file that may be hostile.

Python's regular expressions can take exponential time. A key with at most two repetitions, and none of a group, takes
at most cubic time in the length of a module's name, which is short.
"""

import re
from collections.abc import Iterable

MAX_LENGTH = 1000  # characters of a key
MAX_REPEATS = 2
MAX_EXPRESSIONS = 100  # keys with a repetition
_PLAIN = re.compile(r"[\w.-]*")
_ESCAPED = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)  # an escaped character, or a set of characters
_REPEAT = re.compile(r"[*+?]|\{\d*,?\d*\}")
_GROUP_REPEAT = re.compile(r"\)(?:[*+?]|\{\d*,?\d*\})")
_SPECIAL_GROUP = "(?"  # such as a look-ahead, which may contain anything


class ModulePatterns:
    """Finds the key for a module as PEFT does: the first that matches the end of its name, from any dot on."""

    def __init__(self, keys: Iterable[str]) -> None:
        """Raises ValueError if a key is not a regular expression, or one that can take too long."""
        self._keys: dict[str, re.Pattern[str] | None] = {}
        for key in keys:
            self._keys[key] = None if _PLAIN.fullmatch(key) else _compile(key)
        repeats = sum(1 for regex in self._keys.values() if regex is not None and _repeats(regex.pattern))
        if repeats > MAX_EXPRESSIONS:
            raise ValueError(f"{repeats} expressions with repetitions, at most {MAX_EXPRESSIONS}")

    def find(self, name: str) -> str | None:
        starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
        return next((key for key, regex in self._keys.items() if _matches(key, regex, name, starts)), None)


def _matches(key: str, regex: re.Pattern[str] | None, name: str, starts: list[int]) -> bool:
    if regex is not None:
        return any(regex.fullmatch(name, start) for start in starts)
    start = len(name) - len(key)  # a dot in a plain name matches any character, as in the expression that it is
    return start in starts and all(k in (".", c) for k, c in zip(key, name[start:], strict=True))


def _compile(key: str) -> re.Pattern[str]:
    if len(key) > MAX_LENGTH:
        raise ValueError(f"a key of {len(key):,} characters, at most {MAX_LENGTH:,}")
    plain = _ESCAPED.sub("x", key)
    if _SPECIAL_GROUP in plain or _GROUP_REPEAT.search(plain) or _repeats(key) > MAX_REPEATS or re.search(r"\\\d", key):
        raise ValueError(
            f"{key[:80]!r} could take too long to match: expected at most {MAX_REPEATS} repetitions, none of them of a "
            "group, and no (?...) or back-references: list the modules by name"
        )
    try:
        return re.compile(key)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"invalid regular expression: {error}") from error


def _repeats(key: str) -> int:
    return len(_REPEAT.findall(_ESCAPED.sub("x", key)))
