"""Near duplicates against exact Jaccard similarity and datasketch; exact duplicates against a Python set."""

import random
import sys
from collections import defaultdict

import datasketch
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anarchobot.data.duplicates import BINS, BLOCK, SHINGLE, KeySet, NearDuplicateIndex, minhash

Ids = npt.NDArray[np.int32]
THRESHOLD = 0.8


def shingles(ids: Ids) -> frozenset[bytes]:
    return frozenset(ids[i : i + SHINGLE].tobytes() for i in range(max(1, len(ids) - SHINGLE + 1)))


def jaccard(a: frozenset[bytes], b: frozenset[bytes]) -> float:
    return len(a & b) / len(a | b)


def changed(ids: Ids, share: float, rng: np.random.Generator) -> Ids:
    """A copy with about `share` of the tokens replaced, in one stretch per 300 tokens."""
    ids, places = ids.copy(), 1 + len(ids) // 300
    length = max(1, round(share * len(ids) / places))
    for place in rng.integers(0, max(1, len(ids) - length), places):
        ids[place : place + length] = rng.integers(0, 32000, len(ids[place : place + length]))
    return ids


def corpus() -> list[Ids]:
    """500 documents with log-normal lengths around 700 tokens and Zipf-distributed tokens: 300 originals, a fifth of
    which share a license text of up to half their length, 100 copies with small changes and 100 with large ones. Few
    pairs are near the threshold, where any estimate is a coin toss."""
    rng = np.random.default_rng(7)
    license = rng.integers(0, 32000, 400).astype(np.int32)
    own = []
    for i in range(300):
        ids = (rng.zipf(1.2, int(rng.lognormal(np.log(700), 0.8)) + 1) % 32000).astype(np.int32)
        own.append(np.concatenate([license, ids[:400]]) if i % 5 == 0 else ids)
    small = [changed(own[i], share, rng) for i, share in enumerate(rng.uniform(0, 0.03, 100))]
    large = [changed(own[i], share, rng) for i, share in enumerate(rng.uniform(0.2, 0.6, 100), start=100)]
    documents = own + small + large
    return [documents[i] for i in rng.permutation(len(documents))]


@pytest.fixture(scope="module")
def documents() -> list[Ids]:
    return corpus()


def repeats(is_new: list[bool]) -> set[int]:
    return {i for i, new in enumerate(is_new) if not new}


def test_recall_and_precision_match_datasketch(documents: list[Ids]) -> None:
    """Recall of at least 0.99 and precision of at least 0.98 against exact similarity, and at most one error more than
    datasketch with the same shingles, bins and bands."""
    sets = [shingles(ids) for ids in documents]
    exact, holders = set(), defaultdict(list)
    theirs, lsh = set(), datasketch.MinHashLSH(params=(16, 8), num_perm=BINS)
    minhashes: list[datasketch.MinHash] = []
    for i, own in enumerate(sets):
        if any(jaccard(own, sets[j]) >= THRESHOLD for j in {j for shingle in own for j in holders[shingle]}):
            exact.add(i)
        else:
            for shingle in own:
                holders[shingle].append(i)
        minhashes.append(minhash := datasketch.MinHash(BINS, seed=1))
        minhash.update_batch(own)
        if any(minhashes[j].jaccard(minhash) >= THRESHOLD for j in lsh.query(minhash)):
            theirs.add(i)
        else:
            lsh.insert(i, minhash)
    near = NearDuplicateIndex(THRESHOLD)
    ours = repeats([near.add_if_new(ids) for ids in documents])
    assert len(exact) >= 90
    assert len(ours & exact) >= 0.99 * len(exact)
    assert len(ours & exact) >= 0.98 * len(ours)
    assert len(ours ^ exact) <= len(theirs ^ exact) + 1


@pytest.mark.parametrize("length", [12, 60, 300, 3000])
def test_estimate_is_unbiased(length: int) -> None:
    """For pairs of every similarity, with the standard deviation of the formula. In short documents most bins are
    borrowed, and the number of draws is the number of shingles."""
    rng = np.random.default_rng(length)
    errors = []
    for share in rng.uniform(0, 0.7, 400):
        a = rng.integers(0, 32000, length).astype(np.int32)
        b = changed(a, share, rng)
        true = jaccard(shingles(a), shingles(b))
        draws = min(BINS, length - SHINGLE + 1)
        spread = np.sqrt(max(true * (1 - true), 0.01) / draws)
        errors.append(((minhash(a) == minhash(b)).mean() - true) / spread)
    assert abs(np.mean(errors)) < 5 / np.sqrt(len(errors))
    assert np.std(errors) < 1.25


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.9])
def test_bands_suit_the_threshold(threshold: float) -> None:
    """At any threshold, pairs slightly above it are found and pairs well below it are not."""
    rng = np.random.default_rng(1)
    found: dict[bool, list[bool]] = {True: [], False: []}
    for _ in range(150):
        base = rng.integers(0, 32000, 2000).astype(np.int32)
        for alike, wanted in ((True, min(threshold + 0.1, 0.99)), (False, threshold - 0.2)):
            cut = round(len(base) * wanted)  # a prefix of the document: its similarity is its share
            near = NearDuplicateIndex(threshold)
            assert near.add_if_new(base)
            found[alike].append(not near.add_if_new(base[:cut]))
    assert np.mean(found[True]) >= 0.95
    assert np.mean(found[False]) <= 0.01


@pytest.mark.parametrize("bins", [64, 90, 96, 112, 127])
def test_threshold_is_inclusive(bins: int) -> None:
    """Against exact similarity: prefixes of a document with `bins` / 128 of its shingles, one bin more and one less.
    The documents are those whose estimates are exact. Similarity at the threshold is a near duplicate."""
    rng, unit = np.random.default_rng(bins), 20  # shingles per 1/128
    exact = 0
    while exact < 5:
        ids = rng.integers(0, 2**31, BINS * unit + SHINGLE - 1).astype(np.int32)
        parts = [ids[: share * unit + SHINGLE - 1] for share in (bins - 1, bins, bins + 1)]
        if [(minhash(part) == minhash(ids)).sum() for part in parts] != [bins - 1, bins, bins + 1]:
            continue
        exact += 1
        below, at, above = (jaccard(shingles(part), shingles(ids)) for part in parts)
        assert below < at == bins / BINS < above
        for part, is_new in zip(parts, (True, False, False), strict=True):
            near = NearDuplicateIndex(at)
            assert near.add_if_new(ids) and near.add_if_new(part) == is_new
        near = NearDuplicateIndex(np.nextafter(at, 1))
        assert near.add_if_new(ids) and near.add_if_new(parts[1])


@given(st.lists(st.lists(st.integers(0, 2**32 - 2), max_size=40), max_size=30), st.floats(0.05, 1))
def test_identical_document_is_never_new(made: list[list[int]], threshold: float) -> None:
    near = NearDuplicateIndex(threshold)
    for ids in made:
        near.add_if_new(np.array(ids, np.uint32))
    assert not any(near.add_if_new(np.array(ids, np.uint32)) for ids in made)


def test_documents_are_found_after_the_table_grows() -> None:
    rng = np.random.default_rng(0)
    made = rng.integers(0, 32000, (5000, 50)).astype(np.int32)
    near = NearDuplicateIndex(THRESHOLD)
    assert all(near.add_if_new(ids) for ids in made)
    assert not any(near.add_if_new(ids) for ids in made)


def test_document_shorter_than_a_shingle_matches_only_itself() -> None:
    near = NearDuplicateIndex(0.1)
    made = [[], [1], [1, 2], [2, 1], list(range(7)), list(range(8)), [0] * 7, [0] * 8]
    assert all(near.add_if_new(np.array(ids, np.int32)) for ids in made)
    assert not near.add_if_new(np.array([0] * 100, np.int32)), "the same shingle, repeated"


def test_blocks_of_a_long_document_miss_no_shingle() -> None:
    """The minima of the whole are the smaller ones of two parts that overlap by SHINGLE - 1 tokens."""
    ids = np.random.default_rng(0).integers(0, 32000, 2 * BLOCK + 1000).astype(np.int32)
    for cut in (BLOCK - 3, BLOCK, BLOCK + 5):
        parts = minhash(ids[:cut]), minhash(ids[cut - SHINGLE + 1 :])
        assert np.array_equal(minhash(ids), np.minimum(*parts))


def joined(left: int, right: int) -> int:
    mixed = (left * 0x9E3779B97F4A7C15 + right) % 2**64
    mixed = (mixed ^ mixed >> 29) * 0xD6E8FEB86659FD93 % 2**64
    return mixed ^ mixed >> 32


@pytest.mark.parametrize("length", [3, 8, 40, 2000])
def test_signatures_are_stable(length: int) -> None:
    """Shards depend on them, so they must equal this pure-integer version on every machine and with every numpy."""
    ids = np.random.default_rng(length).integers(0, 2**31, length).astype(np.int32)
    hashes = [*ids.tolist(), *[2**32 - 1] * (SHINGLE - length)]
    for width in (1, 2, 4):
        hashes = [joined(left, right) for left, right in zip(hashes, hashes[width:], strict=False)]
    bins: dict[int, int] = {}
    for value in hashes:
        bins[value >> 57] = min(bins.get(value >> 57, 2**32), value % 2**32)
    for number in sorted(set(range(BINS)) - set(bins)):
        order = sorted(range(BINS), key=lambda i: joined(BINS * number + i, BINS * number + i))
        bins[~number] = bins[next(i for i in order if i in bins)]
    assert minhash(ids).tolist() == [bins.get(i, bins.get(~i)) for i in range(BINS)]


def test_key_set_matches_a_python_set() -> None:
    """Keys close together, at both ends of the tables, and in different tables with the same low bits."""
    chance, seen, truth = random.Random(0), KeySet(), set()
    for _ in range(60_000):
        key = chance.choice(
            [
                chance.getrandbits(64),
                chance.getrandbits(64) & ~0xFFFF,
                2 + chance.getrandbits(8),
                2**64 - 1 - chance.getrandbits(8),
                chance.getrandbits(8) << 56 | 5 << 50,
            ]
        )
        assert seen.add([key]) == [key not in truth], hex(key)
        truth.add(key)
    assert not any(seen.add(truth))


def test_zero_is_a_valid_key() -> None:
    """Zero also marks an empty slot."""
    seen = KeySet()
    assert seen.add([0, 0]) == [True, False]


def test_key_set_is_compact() -> None:
    seen, chance = KeySet(), random.Random(1)
    seen.add(chance.getrandbits(64) for _ in range(300_000))
    size = sum(sys.getsizeof(table._keys) for table in seen._tables)
    assert size < 17 * 300_000
