"""Near duplicates against exact Jaccard similarity and against datasketch, on documents and versions of them."""

import random
import sys
from collections import defaultdict

import datasketch
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anarchobot.data.duplicates import BINS, BLOCK, SHINGLE, NearDuplicateIndex, Seen, signature

Ids = npt.NDArray[np.int32]
THRESHOLD = 0.8


def shingles(ids: Ids) -> frozenset[bytes]:
    return frozenset(ids[i : i + SHINGLE].tobytes() for i in range(max(1, len(ids) - SHINGLE + 1)))


def jaccard(a: frozenset[bytes], b: frozenset[bytes]) -> float:
    return len(a & b) / len(a | b)


def changed(ids: Ids, share: float, rng: np.random.Generator) -> Ids:
    """A version with about `share` of the tokens replaced by others, in a place for every 300 tokens."""
    ids, places = ids.copy(), 1 + len(ids) // 300
    length = max(1, round(share * len(ids) / places))
    for place in rng.integers(0, max(1, len(ids) - length), places):
        ids[place : place + length] = rng.integers(0, 32000, len(ids[place : place + length]))
    return ids


def corpus() -> list[Ids]:
    """500 documents, lengths log-normal around 700 tokens, tokens Zipf's: 300 of their own, of which a fifth share a
    licence that is up to half of them; 100 versions with changes as small as those of a manual, 100 with large ones.
    Few pairs are right at the threshold, where any estimate is a coin toss."""
    rng = np.random.default_rng(7)
    licence = rng.integers(0, 32000, 400).astype(np.int32)
    own = []
    for i in range(300):
        ids = (rng.zipf(1.2, int(rng.lognormal(np.log(700), 0.8)) + 1) % 32000).astype(np.int32)
        own.append(np.concatenate([licence, ids[:400]]) if i % 5 == 0 else ids)
    small = [changed(own[i], share, rng) for i, share in enumerate(rng.uniform(0, 0.03, 100))]
    large = [changed(own[i], share, rng) for i, share in enumerate(rng.uniform(0.2, 0.6, 100), start=100)]
    documents = own + small + large
    return [documents[i] for i in rng.permutation(len(documents))]


@pytest.fixture(scope="module")
def documents() -> list[Ids]:
    return corpus()


def repeats(is_new: list[bool]) -> set[int]:
    return {i for i, new in enumerate(is_new) if not new}


def test_versions_are_found_and_nothing_else(documents: list[Ids]) -> None:
    """Recall of at least 0.99 and precision of at least 0.98 against exact similarity; no less than datasketch has,
    with the same shingles, bins and bands, but for one document."""
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
    ours = repeats([near.is_new(ids) for ids in documents])
    assert len(exact) >= 90
    assert len(ours & exact) >= 0.99 * len(exact)
    assert len(ours & exact) >= 0.98 * len(ours)
    assert len(ours ^ exact) <= len(theirs ^ exact) + 1


@pytest.mark.parametrize("length", [12, 60, 300, 3000])
def test_the_estimate_is_that_of_minhash(length: int) -> None:
    """Over pairs of every similarity: not biased, and spread as the formula says, in short documents too, where most
    bins are borrowed (their spread is that of as many draws as there are shingles)."""
    rng = np.random.default_rng(length)
    errors = []
    for share in rng.uniform(0, 0.7, 400):
        a = rng.integers(0, 32000, length).astype(np.int32)
        b = changed(a, share, rng)
        true = jaccard(shingles(a), shingles(b))
        draws = min(BINS, length - SHINGLE + 1)
        spread = np.sqrt(max(true * (1 - true), 0.01) / draws)
        errors.append(((signature(a) == signature(b)).mean() - true) / spread)
    assert abs(np.mean(errors)) < 5 / np.sqrt(len(errors))
    assert np.std(errors) < 1.25


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.9])
def test_the_bands_suit_the_threshold(threshold: float) -> None:
    """Pairs a little more alike than the threshold are found, pairs much less alike are not, whatever it is."""
    rng = np.random.default_rng(1)
    found: dict[bool, list[bool]] = {True: [], False: []}
    for _ in range(150):
        base = rng.integers(0, 32000, 2000).astype(np.int32)
        for alike, wanted in ((True, min(threshold + 0.1, 0.99)), (False, threshold - 0.2)):
            cut = round(len(base) * wanted)  # a part of the document: its similarity is its share
            near = NearDuplicateIndex(threshold)
            assert near.is_new(base)
            found[alike].append(not near.is_new(base[:cut]))
    assert np.mean(found[True]) >= 0.95
    assert np.mean(found[False]) <= 0.01


@given(st.lists(st.lists(st.integers(0, 2**32 - 2), max_size=40), max_size=30), st.floats(0.05, 1))
def test_an_identical_document_is_never_new(made: list[list[int]], threshold: float) -> None:
    near = NearDuplicateIndex(threshold)
    for ids in made:
        near.is_new(np.array(ids, np.uint32))
    assert not any(near.is_new(np.array(ids, np.uint32)) for ids in made)


def test_every_document_is_found_again_after_the_tables_have_grown() -> None:
    rng = np.random.default_rng(0)
    made = rng.integers(0, 32000, (5000, 50)).astype(np.int32)
    near = NearDuplicateIndex(THRESHOLD)
    assert all(near.is_new(ids) for ids in made)
    assert not any(near.is_new(ids) for ids in made)


def test_a_document_shorter_than_a_shingle_is_alike_only_to_itself() -> None:
    near = NearDuplicateIndex(0.1)
    made = [[], [1], [1, 2], [2, 1], list(range(7)), list(range(8)), [0] * 7, [0] * 8]
    assert all(near.is_new(np.array(ids, np.int32)) for ids in made)
    assert not near.is_new(np.array([0] * 100, np.int32)), "one shingle, again and again"


def test_a_long_document_is_hashed_in_blocks_that_miss_no_shingle() -> None:
    """The minima of a whole are the smaller ones of its parts that overlap by a shingle but one."""
    ids = np.random.default_rng(0).integers(0, 32000, 2 * BLOCK + 1000).astype(np.int32)
    for cut in (BLOCK - 3, BLOCK, BLOCK + 5):
        parts = signature(ids[:cut]), signature(ids[cut - SHINGLE + 1 :])
        assert np.array_equal(signature(ids), np.minimum(*parts))


def joined(left: int, right: int) -> int:
    mixed = (left * 0x9E3779B97F4A7C15 + right) % 2**64
    mixed = (mixed ^ mixed >> 29) * 0xD6E8FEB86659FD93 % 2**64
    return mixed ^ mixed >> 32


@pytest.mark.parametrize("length", [3, 8, 40, 2000])
def test_signatures_never_change(length: int) -> None:
    """They are what this says in whole numbers, on every machine and with every numpy: shards depend on them."""
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
    assert signature(ids).tolist() == [bins.get(i, bins.get(~i)) for i in range(BINS)]


def test_it_knows_what_a_set_knows() -> None:
    """Keys close together, at both ends of the tables, and of other tables with the same low bits."""
    chance, seen, truth = random.Random(0), Seen(), set()
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


def test_zero_is_a_key_like_another() -> None:
    """It is what an empty place holds."""
    seen = Seen()
    assert seen.add([0, 0]) == [True, False]


def test_it_is_compact() -> None:
    seen, chance = Seen(), random.Random(1)
    seen.add(chance.getrandbits(64) for _ in range(300_000))
    size = sum(sys.getsizeof(table._keys) for table in seen._tables)
    assert size < 17 * 300_000
