"""Ids are read as written, across shard boundaries; every kind of damage is reported in one line."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.data.shards import (
    Manifest,
    Shard,
    TokenStream,
    contains_documents,
    first_documents,
    length_histogram,
    read_manifest,
    verify,
    write_manifest,
)
from anarchobot.storage.durable import write_checksummed
from tests.data.conftest import write_shards

MADE = {"name": "made", "file": "made", "sha256": ""}  # the tokenizer
SHARDS = [[5, 6, 7, 0], [0], [1, 2, 0, 4, 5, 0, 7, 0]]  # 0 ends a document


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", 10, train=SHARDS, val=[[4, 0]])
    return tmp_path / "shards"


def problem(do: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        do()
    assert "\n" not in str(error.value)
    return str(error.value)


# Reading


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_any_range_is_read_across_shards(tmp_path: Path, dtype: str) -> None:
    ids = write_shards(tmp_path, 10, dtype, train=SHARDS, val=[[4, 3]])
    stream = TokenStream(tmp_path, "train")
    assert stream.tokens == len(ids) == 13
    for start in range(14):
        for stop in range(start, 14):
            got = stream.read(start, stop)
            assert got.dtype == np.int32 and got.tolist() == ids[start:stop].tolist()
    for length in range(1, 14):
        starts = np.array([*range(14 - length), 0])
        rows = stream.rows(starts, length)
        assert (rows.dtype, rows.shape) == (np.int32, (len(starts), length))
        assert rows.tolist() == [ids[start : start + length].tolist() for start in starts]
    assert TokenStream(tmp_path, "val").read(0, 2).tolist() == [4, 3]


def test_slices_across_shards(tmp_path: Path) -> None:
    """Position -1, before the first id, is an end of document."""
    ids = write_shards(tmp_path, 10, train=SHARDS)
    stream = TokenStream(tmp_path, "train")
    pairs = [(a, b) for a in range(-1, 13) for b in range(max(a, 0), 14)]
    slices = stream.slices(*(np.array(bounds) for bounds in zip(*pairs, strict=True)))
    padded = [0, *ids.tolist()]
    for (start, stop), raw in zip(pairs, slices, strict=True):
        assert stream.concatenate([raw]).tolist() == padded[start + 1 : stop + 1]
    concatenated = stream.concatenate(slices)
    assert concatenated.dtype == np.int32
    assert concatenated.tolist() == [i for start, stop in pairs for i in padded[start + 1 : stop + 1]]


def test_shards_are_memory_mapped(tmp_path: Path) -> None:
    """A sparse file of 8 GB opens instantly; reading it would need 8 GB of memory."""
    path = tmp_path / "train_00000.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype="uint16", shape=(2**32,)).flush()
    shards = [Shard(path.name, "train", 2**32, 1, 1, "", "")]
    write_manifest(tmp_path, Manifest(MADE, 10, "uint16", 0, 0, {}, shards))
    assert TokenStream(tmp_path, "train").read(2**32 - 3, 2**32).tolist() == [0, 0, 0]


def test_split_without_shards_is_empty(tmp_path: Path) -> None:
    write_shards(tmp_path, 10, train=SHARDS)
    stream = TokenStream(tmp_path, "val")
    assert stream.tokens == 0 and stream.read(0, 0).tolist() == [] and stream.document_starts().tolist() == [0]


def test_document_starts_and_first_documents(folder: Path) -> None:
    """Starts are positions in the whole stream, not in a shard."""
    starts = TokenStream(folder, "train").document_starts()
    assert starts.dtype == np.int64 and starts.tolist() == [0, 4, 5, 8, 11, 13]
    assert [ids.tolist() for ids in first_documents(TokenStream(folder, "train"), 3, 2)] == [[5, 6], [], [1, 2]]


def test_documents_are_found_by_their_ids(tmp_path: Path) -> None:
    """Whole, or from their start up to a cut in their second half, where the last two tokens may differ."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 100, n) for n in (1, 5, 16, 17, 40, 100, 1000)]
    cut = documents[-1][:600].copy()
    cut[-1] = 99 - cut[-1]
    kept = [*documents[:-1], cut]
    shards = [np.concatenate([[*ids, 0] for ids in part]).tolist() for part in (kept[:3], kept[3:])]
    write_shards(tmp_path, 101, train=shards)
    changed = [ids.copy() for ids in documents[1:]]
    for ids in changed:
        ids[len(ids) // 2] += 1
    longer, shorter = np.concatenate([documents[4], documents[4], [1]]), documents[5][:60]
    asked = [ids.astype(np.int32) for ids in (*documents, *changed, longer, shorter, np.array([]))]
    assert contains_documents(TokenStream(tmp_path, "train"), asked) == [True] * 7 + [False] * 9


def test_length_histogram_by_powers_of_two(tmp_path: Path) -> None:
    shards = [[[5] * (length - 1) for length in lengths] for lengths in ([1, 2, 3, 4], [7, 8, 31, 32], [33, 1024])]
    ids = [[token for document in documents for token in (*document, 0)] for documents in shards]
    write_shards(tmp_path, 10, train=ids[:2], val=ids[2:])
    expected = {1: 1, 2: 2, 4: 2, 8: 1, 16: 1, 32: 2, 64: 0, 128: 0, 256: 0, 512: 0, 1024: 1}
    assert dict(length_histogram(tmp_path)) == expected


@pytest.mark.parametrize("bad", [10, 65535, 2**31, 2**32 - 1])
def test_id_outside_the_vocabulary_is_an_error(tmp_path: Path, bad: int) -> None:
    """2**31 and above would become negative in the int32 that the model takes."""
    write_shards(tmp_path, 10, "uint32", train=[[1, 2, bad]])
    stream = TokenStream(tmp_path, "train")
    assert stream.read(0, 2).tolist() == [1, 2]
    assert f"token id {bad} is outside the vocabulary of 10" in problem(lambda: stream.read(1, 3))
    assert f"token id {bad} is outside the vocabulary of 10" in problem(lambda: stream.rows(np.array([0, 1]), 2))
    assert f"token id {bad} is outside the vocabulary of 10" in problem(
        lambda: stream.concatenate(stream.slices(np.array([2]), np.array([3])))
    )
    assert dict(verify(tmp_path))["train_00000.npy"] == f"token id {bad} is outside the vocabulary of 10"


# The manifest


def test_manifest_round_trip(folder: Path) -> None:
    manifest = read_manifest(folder)
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    assert [s.file for s in manifest.shards_in("train")] == ["train_00000.npy", "train_00001.npy", "train_00002.npy"]
    assert (manifest.tokens("train"), manifest.tokens("val")) == (13, 2)


def test_manifest_has_the_documented_keys(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    keys = {"format_version", "tokenizer", "vocab_size", "dtype", "eod_id", "seed", "counts", "shards"}
    assert set(values) == {*keys, "content_sha256"}
    assert set(values["tokenizer"]) == {"name", "file", "sha256"}
    assert set(values["counts"]) == {"read", "kept", "duplicates", "filtered", "broken"}
    assert set(values["shards"][0]) == {"file", "split", "tokens", "documents", "bytes", "sha256", "offsets_sha256"}


def test_manifest_digest_depends_on_the_shards(folder: Path) -> None:
    manifest = read_manifest(folder)
    other = Manifest(MADE, 10, "uint16", 0, 0, {}, manifest.shards[1:])
    assert manifest.digest() == read_manifest(folder).digest() != other.digest()


def test_folder_without_shards_is_an_error(tmp_path: Path) -> None:
    expected = "no token shards here (no manifest.json): run `anarchobot pretokenize`"
    (tmp_path / "file").write_text("x")
    for name in ("missing", "file", "."):
        assert expected in problem(lambda name=name: TokenStream(tmp_path / name, "train"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format_version": 2}, "format 2, expected 1: pretokenize again"),
        ({"dtype": "float32"}, "damaged (dtype: "),
        ({"dtype": "nonsense"}, "damaged (dtype: "),
        ({"shards": [{"file": "train_00000.npy"}]}, "damaged (shards.0.split: "),
        ({"unknown": 1}, "damaged (unknown: "),
        ({"tokenizer": {}}, "damaged (: Value error, tokenizer without file)"),
        ({"eod_id": -(2**63)}, "damaged (eod_id: "),
        ({"eod_id": 10}, "eod_id 10, vocab_size 10 and dtype uint16 disagree"),
        ({"counts": {"read": {}}}, "damaged (counts.read: "),
        ({"seed": True}, "damaged (seed: "),
    ],
)
def test_invalid_manifest_is_refused(folder: Path, change: dict[str, Any], expected: str) -> None:
    path = folder / "manifest.json"
    write_checksummed(path, json.loads(path.read_text()) | change)
    assert expected in problem(lambda: read_manifest(folder))


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b'{"format_version": 1}'])
def test_damaged_manifest_is_refused(folder: Path, raw: bytes) -> None:
    (folder / "manifest.json").write_bytes(raw)
    message = problem(lambda: read_manifest(folder))
    assert message.startswith(f"{folder / 'manifest.json'}: ") and "pretokenize" in message


# Damaged shards


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.save would append .npy to another name
        np.save(file, array)


def longer(path: Path) -> None:
    save(path, np.arange(9, dtype=np.uint16))


def other_dtype(path: Path) -> None:
    save(path, np.load(path).astype(np.uint32))


def other_byte_order(path: Path) -> None:
    save(path, np.load(path).astype(">u2"))


def two_dimensions(path: Path) -> None:
    save(path, np.load(path)[None])


def archive(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), np.load(path))
    path.with_suffix(".npz").replace(path)


def objects(path: Path) -> None:
    np.save(path, np.array([{}] * 4), allow_pickle=True)


def empty_dtype(path: Path) -> None:
    header = "{'descr': '|V0', 'fortran_order': False, 'shape': (-1,), }".ljust(117) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 8)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (Path.unlink, "listed in the manifest, but missing"),
        (truncate, "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(b"some text, and more of it"), "damaged"),
        (archive, "damaged"),
        (empty_dtype, "damaged"),
        (objects, "damaged"),
        (longer, "holds uint16 (9,), the manifest says uint16 (4,)"),
        (other_dtype, "holds uint32 (4,), the manifest says uint16 (4,)"),
        (other_byte_order, "holds >u2 (4,), the manifest says uint16 (4,)"),
        (two_dimensions, "holds uint16 (1, 4), the manifest says uint16 (4,)"),
    ],
)
def test_damaged_shard_is_refused_and_named(folder: Path, damage: Callable[[Path], object], expected: str) -> None:
    path = folder / "train_00000.npy"
    damage(path)
    message = problem(lambda: TokenStream(folder, "train"))
    assert message.startswith(f"{path}: ") and expected in message and "pretokenize again" in message
    found = dict(verify(folder))
    assert expected in found.pop("train_00000.npy") and set(found.values()) == {""}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (Path.unlink, "listed in the manifest, but missing"),
        (truncate, "damaged"),
        (other_dtype, "holds uint32 (5,), the manifest says uint64 (5,)"),
        (lambda path: save(path, np.array([0, 3, 6], np.uint64)), "holds uint64 (3,), the manifest says uint64 (5,)"),
        (lambda path: save(path, np.array([0, 3, 3, 6, 8], np.uint64)), "damaged (not increasing from 0 to 8)"),
        (lambda path: save(path, np.array([0, 3, 6, 8, 9], np.uint64)), "damaged (not increasing from 0 to 8)"),
        (lambda path: save(path, np.array([1, 3, 6, 7, 8], np.uint64)), "damaged (not increasing from 0 to 8)"),
        (lambda path: save(path, np.array([0, 2**63, 1, 7, 8], np.uint64)), "damaged (not increasing from 0 to 8)"),
    ],
)
def test_damaged_offsets_are_refused_and_named(tmp_path: Path, damage: Callable[[Path], object], expected: str) -> None:
    write_shards(tmp_path, 10, train=[[1, 0, 2, 0, 3, 0, 4, 0]])
    path = tmp_path / "train_00000.offsets"
    damage(path)
    message = problem(lambda: TokenStream(tmp_path, "train").document_starts())
    assert message.startswith(f"{path}: ") and expected in message and "pretokenize again" in message
    found = dict(verify(tmp_path))
    assert expected in found["train_00000.offsets"] and found["train_00000.npy"] == ""


# verify


def test_verify_checks_every_file(folder: Path) -> None:
    shards = ["train_00000", "train_00001", "train_00002", "val_00000"]
    assert list(verify(folder)) == [(f"{name}.{kind}", "") for name in shards for kind in ("npy", "offsets")]


@pytest.mark.parametrize("kind", ["npy", "offsets"])
def test_verify_detects_any_flipped_bit(tmp_path: Path, kind: str) -> None:
    """Including the header, which numpy evaluates as Python, so damage raises many kinds of errors. The other file is
    reported as intact."""
    write_shards(tmp_path, 65536, train=[SHARDS[0]])
    path = tmp_path / f"train_00000.{kind}"
    good = path.read_bytes()
    assert len(good) == 128 + {"npy": 2 * 4, "offsets": 8 * 2}[kind]
    for place in range(len(good)):
        for bit in (0, 3, 5, 7):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            assert [file for file, found in verify(tmp_path) if found] == [path.name], (place, bit)


@pytest.mark.parametrize(("ids", "starts"), [([1, 2, 0, 3, 0], [0, 2, 5]), ([1, 0, 2, 3, 0], [0, 5])])
def test_verify_detects_offsets_that_are_not_document_ends(tmp_path: Path, ids: list[int], starts: list[int]) -> None:
    """With matching digests, as from a faulty writer: an offset that is no document end, and a missing one."""
    write_shards(tmp_path, 10, train=[ids])
    save(tmp_path / "train_00000.offsets", np.array(starts, np.uint64))
    manifest = read_manifest(tmp_path)
    sha = hashlib.sha256((tmp_path / "train_00000.offsets").read_bytes()).hexdigest()
    shard = replace(manifest.shards[0], documents=len(starts) - 1, offsets_sha256=sha)
    write_manifest(tmp_path, replace(manifest, shards=[shard]))
    expected = "does not match the ends of documents in train_00000.npy"
    assert dict(verify(tmp_path)) == {"train_00000.npy": "", "train_00000.offsets": expected}


def test_verify_detects_swapped_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, 10, train=[[1, 0], [3, 0]])
    shutil.move(tmp_path / "train_00000.npy", tmp_path / "kept.npy")
    shutil.move(tmp_path / "train_00001.npy", tmp_path / "train_00000.npy")
    shutil.move(tmp_path / "kept.npy", tmp_path / "train_00001.npy")
    differs = "content differs from the manifest (sha256)"
    assert [found for _, found in verify(tmp_path)] == [differs, "", differs, ""]
