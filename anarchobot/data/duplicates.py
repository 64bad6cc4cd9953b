"""Exact duplicates by a compact set of hashes, and near duplicates by MinHash over token ids.

MinHash: a document is the set of its shingles, its runs of SHINGLE tokens. Under random orders, the fraction of minima
that two sets have in common estimates their Jaccard similarity |A ∩ B| / |A ∪ B| (Broder 1997). Here a single order
gives all minima: hashes fall into BINS bins and each bin keeps its smallest hash (one-permutation hashing, Li, Owen and
Zhang 2012). An empty bin borrows from another bin, the same one in every document (densification, Shrivastava 2017).
Bins are grouped into bands, and only documents that agree in a whole band are compared.
"""

from array import array
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

SHINGLE = 8  # tokens; a power of two
BINS = 128
BLOCK = 2**15  # tokens hashed at once

Signature = npt.NDArray[np.uint32]
_Hashes = npt.NDArray[np.uint64]

_EMPTY = np.uint32(2**32 - 1)
_NO_TOKEN = 2**32 - 1  # pads a document shorter than a shingle
_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93], np.uint64)  # odd, with well-mixed bits

# KeySet
TABLES = 256  # tables grow independently, so growing never doubles the memory
MAX_LOAD = 2 / 3
SPARE_SLOTS = 256  # slots after the last one, for displaced keys


class KeySet:
    """A set of 64-bit keys taken from sha256, in 12 to 15 bytes per key. A Python set of digests takes 100.

    Two different documents may share a key by chance: in corpora of 100 million documents, one pair in 3,700 corpora.
    """

    def __init__(self) -> None:
        self._tables = [_Table() for _ in range(TABLES)]

    def add(self, keys: Iterable[int]) -> list[bool]:
        """Adds keys in [0, 2**64); returns whether each one is new."""
        tables = self._tables
        return [tables[key >> 56].add(key & 0xFF_FFFF_FFFF_FFFF) for key in keys]


class _Table:
    """Open addressing with linear probing; zero marks an empty slot.

    The home slot increases with the key. To grow, sort the keys and put each one in its home slot or, where that is
    taken, right after the previous key.
    """

    def __init__(self) -> None:
        self._slots = 64
        self._count = 0
        self._keys = array("Q", bytes(8 * (self._slots + SPARE_SLOTS)))

    def add(self, key: int) -> bool:
        key = key or 1
        keys, slot = self._keys, (key >> 24) * self._slots >> 32
        while found := keys[slot]:
            if found == key:
                return False
            slot += 1
        keys[slot] = key
        self._count += 1
        if self._count > MAX_LOAD * self._slots or slot >= len(keys) - 2:
            self._grow()
        return True

    def _grow(self) -> None:
        old = np.frombuffer(self._keys, np.uint64)
        keys = np.sort(old[old > 0])
        self._slots = self._slots * 5 // 4
        home = (keys >> np.uint64(24)) * np.uint64(self._slots) >> np.uint64(32)
        order = np.arange(len(keys))
        slots = np.maximum.accumulate(home.astype(np.int64) - order) + order
        grown = np.zeros(max(self._slots, int(slots[-1])) + SPARE_SLOTS, np.uint64)
        grown[slots] = keys
        self._keys = array("Q", grown.tobytes())


def _combine(left: _Hashes, right: _Hashes) -> _Hashes:
    """An order-dependent hash of each pair; arithmetic is modulo 2**64."""
    mixed: _Hashes = left * _MULTIPLIERS[0]
    mixed += right
    mixed ^= mixed >> np.uint64(29)
    mixed *= _MULTIPLIERS[1]
    mixed ^= mixed >> np.uint64(32)
    return mixed


# Row b: the order in which bin b tries other bins when it is empty. Hashed rather than drawn from a numpy generator,
# whose output may change between versions.
_NUMBERS = np.arange(BINS * BINS, dtype=np.uint64)
_LENDERS = np.argsort(_combine(_NUMBERS, _NUMBERS).reshape(BINS, BINS), axis=1)


def minhash(ids: npt.NDArray[np.integer]) -> Signature:
    """(BINS,): the smallest hash in each bin. `ids` (L,): in [0, 2**32 - 1); L may be 0. Deterministic."""
    if len(ids) < SHINGLE:  # one shingle, which no longer document contains
        ids = np.concatenate([ids.astype(np.uint32), np.full(SHINGLE - len(ids), _NO_TOKEN, np.uint32)])
    smallest = np.full(BINS, _EMPTY, np.uint32)
    for start in range(0, len(ids) - SHINGLE + 1, BLOCK):
        hashes = ids[start : start + BLOCK + SHINGLE - 1].astype(np.uint64)
        width = 1
        while width < SHINGLE:  # hashes of runs of 2, 4, 8 tokens
            hashes = _combine(hashes[:-width], hashes[width:])
            width *= 2
        bins = (hashes >> np.uint64(57)).astype(np.intp)  # the top 7 bits, since BINS is 128
        np.minimum.at(smallest, bins, hashes.astype(np.uint32))
    empty = smallest == _EMPTY
    if empty.any():
        lenders = _LENDERS[empty]
        lender = (~empty)[lenders].argmax(axis=1)
        smallest[empty] = smallest[lenders[np.arange(len(lenders)), lender]]
    return smallest


class NearDuplicateIndex:
    """The signatures of all documents kept so far. Deterministic, but depends on the order of the documents.

    Memory: at most 0.7 kB per kept document, 7 GB for ten million. The signature takes 512 bytes, its links and their
    table 192 (more for a threshold below 0.8, whose bands are narrower). Growing briefly takes twice that.

    From a threshold of 0.8, a pair with true similarity s is compared with probability 1 - (1 - s**8)**16 (0.95 at 0.8,
    0.99 at 0.85, 1.00 at 0.9), and counts as near duplicates when its estimate reaches the threshold. The estimate's
    standard deviation is about sqrt(s * (1 - s) / 128), or 0.035 at 0.8.
    """

    def __init__(self, threshold: float) -> None:
        """`threshold`: the Jaccard similarity in (0, 1] from which a document is a near duplicate."""
        self._threshold = threshold
        self._rows = _rows_per_band(threshold)
        self._bands = BINS // self._rows
        # A hash table with chains in each band. Documents are numbered from 1; 0 ends a chain.
        self._size = 1024  # capacity in documents, and slots per band; a power of two
        self._documents = 0
        self._signatures = np.zeros((self._size, BINS), np.uint32)
        self._heads = np.zeros((self._bands, self._size), np.uint32)  # the newest document in each slot
        self._next = np.zeros((self._size, self._bands), np.uint32)  # the previous document in the same slot

    def add_if_new(self, ids: npt.NDArray[np.integer]) -> bool:
        """Adds a document unless it is a near duplicate; returns whether it was added. `ids` (L,) as in `minhash`."""
        signature = minhash(ids)
        slots = self._slots(signature[None, :])[0]
        candidates = self._candidates(slots)
        if candidates:
            matches = (self._signatures[candidates] == signature).sum(axis=1)
            if matches.max() >= self._threshold * BINS:
                return False
        self._add(signature, slots)
        return True

    def _slots(self, signatures: Signature) -> npt.NDArray[np.intp]:
        """(documents, bands): the table slot of each band of each signature."""
        hashes = signatures.reshape(len(signatures), self._bands, self._rows).astype(np.uint64)
        while hashes.shape[2] > 1:
            hashes = _combine(hashes[:, :, ::2], hashes[:, :, 1::2])
        return (hashes[:, :, 0] & np.uint64(self._size - 1)).astype(np.intp)

    def _candidates(self, slots: npt.NDArray[np.intp]) -> list[int]:
        heads, following = self._heads.data, self._next.data  # memoryviews: faster access to single items
        found = set()
        for band, slot in enumerate(slots.tolist()):
            document = heads[band, slot]
            while document:
                found.add(document)
                document = following[document, band]
        return sorted(found)

    def _add(self, signature: Signature, slots: npt.NDArray[np.intp]) -> None:
        self._documents += 1
        if self._documents == self._size:
            self._grow()
            slots = self._slots(signature[None, :])[0]
        bands = np.arange(self._bands)
        self._signatures[self._documents] = signature
        self._next[self._documents] = self._heads[bands, slots]
        self._heads[bands, slots] = self._documents

    def _grow(self) -> None:
        """Doubles the capacity and reinserts every document in order."""
        old = self._signatures
        self._size *= 2
        self._signatures = np.zeros((self._size, BINS), np.uint32)
        self._signatures[: len(old)] = old
        self._heads = np.zeros((self._bands, self._size), np.uint32)
        self._next = np.zeros((self._size, self._bands), np.uint32)
        bands = np.arange(self._bands)
        for start in range(1, len(old), 4096):
            slots = self._slots(old[start : start + 4096])
            for document, row in enumerate(slots, start=start):
                self._next[document] = self._heads[bands, row]
                self._heads[bands, row] = document


def _rows_per_band(threshold: float) -> int:
    """The most rows for which a pair exactly at the threshold is compared with probability above 0.94."""
    enough = (rows for rows in (8, 4, 2) if 1 - (1 - threshold**rows) ** (BINS // rows) > 0.94)
    return next(enough, 1)
