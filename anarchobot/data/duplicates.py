"""Near duplicates by MinHash over token ids: documents that share most of their shingles with one before.

A document is the set of its shingles, its runs of SHINGLE tokens. The share of the minima that two sets have in common,
under random orders, estimates their Jaccard similarity |A ∩ B| / |A ∪ B| (Broder 1997). One order gives all minima
here: hashes fall into BINS bins, each keeps its smallest (one-permutation hashing, Li, Owen and Zhang 2012), and an
empty bin borrows from another, the same one in every document (densification, Shrivastava 2017). Bins are grouped into
bands, and only documents that agree in a whole band are compared.
"""

from array import array
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

SHINGLE = 8  # tokens; a power of two
BINS = 128
BLOCK = 2**15  # tokens hashed at a time

Signature = npt.NDArray[np.uint32]
_Hashes = npt.NDArray[np.uint64]

_EMPTY = np.uint32(2**32 - 1)
_NO_TOKEN = 2**32 - 1  # fills up a document that is shorter than a shingle
_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93], np.uint64)  # odd, bits well spread


def _joined(left: _Hashes, right: _Hashes) -> _Hashes:
    """A hash of each pair, in its order; arithmetic is modulo 2**64."""
    mixed: _Hashes = left * _MULTIPLIERS[0]
    mixed += right
    mixed ^= mixed >> np.uint64(29)
    mixed *= _MULTIPLIERS[1]
    mixed ^= mixed >> np.uint64(32)
    return mixed


# Row b: the bins in the order in which bin b asks them when it is empty. A hash and no generator of numpy's, whose
# numbers may change from one version to the next.
_NUMBERS = np.arange(BINS * BINS, dtype=np.uint64)
_LENDERS = np.argsort(_joined(_NUMBERS, _NUMBERS).reshape(BINS, BINS), axis=1)


def signature(ids: npt.NDArray[np.integer]) -> Signature:
    """(BINS,): the smallest hash in each bin. `ids` (L,): from 0, below 2**32 - 1; L may be 0. No state, no chance."""
    if len(ids) < SHINGLE:  # one shingle, which no longer document has
        ids = np.concatenate([ids.astype(np.uint32), np.full(SHINGLE - len(ids), _NO_TOKEN, np.uint32)])
    smallest = np.full(BINS, _EMPTY, np.uint32)
    for start in range(0, len(ids) - SHINGLE + 1, BLOCK):
        hashes = ids[start : start + BLOCK + SHINGLE - 1].astype(np.uint64)
        width = 1
        while width < SHINGLE:  # to hashes of runs of 2, 4, 8 tokens
            hashes = _joined(hashes[:-width], hashes[width:])
            width *= 2
        bins = (hashes >> np.uint64(57)).astype(np.intp)  # the top 7 bits: BINS is 128
        np.minimum.at(smallest, bins, hashes.astype(np.uint32))
    empty = smallest == _EMPTY
    if empty.any():
        lenders = _LENDERS[empty]
        lender = (~empty)[lenders].argmax(axis=1)
        smallest[empty] = smallest[lenders[np.arange(len(lenders)), lender]]
    return smallest


class NearDuplicateIndex:
    """The documents so far, and whether another is like one of them. Deterministic: the order of documents decides.

    Memory: at most 0.7 kB a document that was new, 7 GB for ten million: its signature takes 512 bytes, its links and
    their table 192 (more for a threshold below 0.8, whose bands are narrower). Twice that for a moment when it grows.

    From a threshold of 0.8, a pair of true similarity s is compared with probability 1 - (1 - s**8)**16 (0.95 at 0.8,
    0.99 at 0.85, 1.00 at 0.9), and is alike when its estimate reaches the threshold; the estimate's standard deviation
    is about sqrt(s * (1 - s) / 128), that is 0.035 at 0.8.
    """

    def __init__(self, threshold: float) -> None:
        """`threshold`: the Jaccard similarity, above 0 and at most 1, from which a document is a near duplicate."""
        self._threshold = threshold
        self._rows = _rows(threshold)
        self._bands = BINS // self._rows
        # A hash table with chains in each band. Documents count from 1; 0 ends a chain.
        self._size = 1024  # documents there is room for, and slots of a band; a power of two
        self._documents = 0
        self._signatures = np.zeros((self._size, BINS), np.uint32)
        self._heads = np.zeros((self._bands, self._size), np.uint32)  # the newest document of a slot
        self._next = np.zeros((self._size, self._bands), np.uint32)  # the one before it in its slot

    def is_new(self, ids: npt.NDArray[np.integer]) -> bool:
        """Whether no document before is this alike; then it is added. `ids` (L,) as in `signature`."""
        own = signature(ids)
        slots = self._slots(own[None, :])[0]
        candidates = self._candidates(slots)
        if candidates:
            alike = (self._signatures[candidates] == own).sum(axis=1)
            if alike.max() >= self._threshold * BINS:
                return False
        self._add(own, slots)
        return True

    def _slots(self, signatures: Signature) -> npt.NDArray[np.intp]:
        """(documents, bands): where in the table each band of each signature belongs."""
        hashes = signatures.reshape(len(signatures), self._bands, self._rows).astype(np.uint64)
        while hashes.shape[2] > 1:
            hashes = _joined(hashes[:, :, ::2], hashes[:, :, 1::2])
        return (hashes[:, :, 0] & np.uint64(self._size - 1)).astype(np.intp)

    def _candidates(self, slots: npt.NDArray[np.intp]) -> list[int]:
        heads, following = self._heads.data, self._next.data  # single items come faster so
        found = set()
        for band, slot in enumerate(slots.tolist()):
            document = heads[band, slot]
            while document:
                found.add(document)
                document = following[document, band]
        return sorted(found)

    def _add(self, own: Signature, slots: npt.NDArray[np.intp]) -> None:
        self._documents += 1
        if self._documents == self._size:
            self._grow()
            slots = self._slots(own[None, :])[0]
        bands = np.arange(self._bands)
        self._signatures[self._documents] = own
        self._next[self._documents] = self._heads[bands, slots]
        self._heads[bands, slots] = self._documents

    def _grow(self) -> None:
        """Twice the room; every document is put into the table anew, in its order."""
        before = self._signatures
        self._size *= 2
        self._signatures = np.zeros((self._size, BINS), np.uint32)
        self._signatures[: len(before)] = before
        self._heads = np.zeros((self._bands, self._size), np.uint32)
        self._next = np.zeros((self._size, self._bands), np.uint32)
        bands = np.arange(self._bands)
        for start in range(1, len(before), 4096):
            slots = self._slots(before[start : start + 4096])
            for document, places in enumerate(slots, start=start):
                self._next[document] = self._heads[bands, places]
                self._heads[bands, places] = document


def _rows(threshold: float) -> int:
    """Rows of a band: the most that leave a pair right at the threshold a chance of 0.94 to be compared."""
    enough = (rows for rows in (8, 4, 2) if 1 - (1 - threshold**rows) ** (BINS // rows) > 0.94)
    return next(enough, 1)


TABLES = 256  # tables that grow one by one, so that growing never needs twice the memory
FULL = 2 / 3
SPARE = 256  # places behind the last for keys that their own place was taken from


class Seen:
    """A set of 64-bit keys, taken from sha256.

    Two different documents share a key by chance: among 100 million, one such pair in 3,700 corpora.
    """

    def __init__(self) -> None:
        self._tables = [_Table() for _ in range(TABLES)]

    def add(self, keys: Iterable[int]) -> list[bool]:
        """Whether each of `keys`, in [0, 2**64), is new."""
        tables = self._tables
        return [tables[key >> 56].add(key & 0xFF_FFFF_FFFF_FFFF) for key in keys]


class _Table:
    """Open addressing with linear probing. A key's place grows with the key, so a larger table is the keys sorted,
    each at its place or, where that is taken, behind the one before. Zero is an empty place."""

    def __init__(self) -> None:
        self._places = 64
        self._count = 0
        self._keys = array("Q", bytes(8 * (self._places + SPARE)))

    def add(self, key: int) -> bool:
        key = key or 1
        keys, place = self._keys, (key >> 24) * self._places >> 32
        while found := keys[place]:
            if found == key:
                return False
            place += 1
        keys[place] = key
        self._count += 1
        if self._count > FULL * self._places or place >= len(keys) - 2:
            self._grow()
        return True

    def _grow(self) -> None:
        old = np.frombuffer(self._keys, np.uint64)
        keys = np.sort(old[old > 0])
        self._places = self._places * 5 // 4
        wanted = (keys >> np.uint64(24)) * np.uint64(self._places) >> np.uint64(32)
        order = np.arange(len(keys))
        places = np.maximum.accumulate(wanted.astype(np.int64) - order) + order
        grown = np.zeros(max(self._places, int(places[-1])) + SPARE, np.uint64)
        grown[places] = keys
        self._keys = array("Q", grown.tobytes())
