"""Keys and values of earlier prompts, kept so that a prompt that starts like one of them is prefilled from there on.

The next turn of a conversation starts with the whole prompt of this one, so its prefill takes the last answer and the
new question only. Caches are copied without copying their arrays, which MLX never modifies.
"""

import copy
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

MAX_PROMPTS = 64


class _Kept(NamedTuple):
    """A prompt [n] and its caches, one per layer. Only prompts of the same `kind` can share them."""

    ids: npt.NDArray[np.int32]
    kind: object
    caches: list[Any]

    @property
    def bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    def usable(self, ids: npt.NDArray[np.int32]) -> int:
        """How many of the first tokens of a prompt its caches can stand for. Caches that can't be shortened, such as
        states, stand for all their tokens or none."""
        shared = shared_start(self.ids, ids)
        return shared if shared == len(self.ids) or _is_trimmable(self.caches) else 0


class KeptPrefixes:
    """The most recent prompts, up to `max_prompts` and `max_bytes` of keys and values; with 0, none. Not thread-safe.

    Of one model: keys and values of another would be found, too.
    """

    def __init__(self, max_bytes: int, max_prompts: int = MAX_PROMPTS) -> None:
        self._max_bytes, self._max_prompts = max_bytes, max_prompts
        self._kept: list[_Kept] = []  # the least recently used first

    def find(self, prompt: list[int], kind: object) -> tuple[list[Any], int]:
        """New caches of the longest kept start of `prompt`, and its number of tokens; ([], 0) if there is none."""
        ids = np.array(prompt, np.int32)
        lengths = [entry.usable(ids) if entry.kind == kind else 0 for entry in self._kept]
        longest = max(lengths, default=0)
        if not longest:
            return [], 0
        entry = self._kept.pop(lengths.index(longest))
        self._kept.append(entry)
        caches = copy.deepcopy(entry.caches)
        if extra := len(entry.ids) - longest:
            for cache in caches:
                cache.trim(extra)
        return caches, longest

    def keep(self, prompt: list[int], kind: object, caches: list[Any]) -> None:
        """Keeps a copy of the caches of `prompt`, in place of those of its starts if it can stand for them."""
        if not self._max_bytes:
            return
        new = _Kept(np.array(prompt, np.int32), kind, copy.deepcopy(caches))
        if new.bytes > self._max_bytes:
            return
        replaces = _is_trimmable(caches)
        self._kept = [entry for entry in self._kept if not _is_start(entry, new, replaces)] + [new]
        while len(self._kept) > self._max_prompts or sum(entry.bytes for entry in self._kept) > self._max_bytes:
            del self._kept[0]


def shared_start(cached: npt.NDArray[np.int32], ids: npt.NDArray[np.int32]) -> int:
    """How many of the first tokens of `ids` are cached. The last one is always computed, for its logits."""
    n = min(len(cached), len(ids))
    different = np.flatnonzero(cached[:n] != ids[:n])
    return min(int(different[0]) if len(different) else n, len(ids) - 1)


def _is_trimmable(caches: list[Any]) -> bool:
    return all(cache.is_trimmable() for cache in caches)


def _is_start(entry: _Kept, new: _Kept, shorter: bool) -> bool:
    """Whether `new` starts with, or with not `shorter` is, the prompt of `entry`."""
    n = len(entry.ids)
    fits = n <= len(new.ids) if shorter else n == len(new.ids)
    return fits and entry.kind == new.kind and bool((entry.ids == new.ids[:n]).all())
