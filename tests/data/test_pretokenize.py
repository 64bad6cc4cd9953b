"""Shards reproduce the text; the same input gives the same bytes; a failed run leaves existing shards intact."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data import document_batches
from anarchobot.data.pretokenize import Pretokenizer
from anarchobot.data.shards import Manifest, TokenStream, read_manifest, verify
from anarchobot.data.sources.documents import SPLIT_FILE_CHARS, Document, DocumentCounts, from_files
from anarchobot.storage.lock import FolderLock
from anarchobot.tokenizers.tokenizer import Tokenizer, digest, load_tokenizer
from tests.data.bytes_tokenizer import Bytes
from tests.data.conftest import SCRIPTS
from tests.storage.disk_calls import DiskCalls


@pytest.fixture
def plain(tmp_path: Path) -> Bytes:
    return Bytes(tmp_path)


def write(
    documents: Any, tokenizer: Tokenizer, folder: Path, counts: DocumentCounts | None = None, **settings: Any
) -> Manifest:
    settings = {"val_fraction": 0.0} | settings
    made = (document if isinstance(document, Document) else Document(document) for document in documents)
    return Pretokenizer(tokenizer, folder, counts=counts or DocumentCounts(), **settings).run(made)


def read(folder: Path, tokenizer: Tokenizer, split: str = "train") -> list[str]:
    """Reads the documents with plain numpy: shards in the order of their names, split after every end of document."""
    texts = []
    for path in sorted(folder.glob(f"{split}_*.npy")):
        ids = np.load(path)
        assert ids.ndim == 1 and ids[-1] == tokenizer.eod_id
        ends = np.flatnonzero(ids == tokenizer.eod_id).tolist()
        texts += [tokenizer.decode(ids[a:b].tolist()) for a, b in zip([0, *(e + 1 for e in ends)], ends, strict=False)]
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def held_out(text: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 < fraction


# Round trip


def test_shards_decode_to_the_documents(tokenizer: Tokenizer, corpus: list[str], tmp_path: Path) -> None:
    texts = [*corpus, SCRIPTS, "x", "</s>", "<|endoftext|>", " \n", "▁"]
    manifest = write(texts, tokenizer, tmp_path / "out", val_fraction=0.2)
    assert read(tmp_path / "out", tokenizer) == [text for text in texts if not held_out(text, 0.2)]
    assert read(tmp_path / "out", tokenizer, "val") == [text for text in texts if held_out(text, 0.2)]
    assert {len(manifest.shards_in("train")), len(manifest.shards_in("val"))} == {1}


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(300, "uint16"), (65536, "uint16"), (65537, "uint32"), (70000, "uint32")]
)
def test_dtype_fits_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    tokenizer = Bytes(tmp_path, vocab_size)
    manifest = write(["zwölf", "\xff\x00"], tokenizer, tmp_path / "out")
    assert manifest.dtype == str(np.load(tmp_path / "out" / "train_00000.npy").dtype) == dtype
    assert read(tmp_path / "out", tokenizer) == ["zwölf", "\xff\x00"]
    assert TokenStream(tmp_path / "out", "train").read(0, 7)[-1] == vocab_size - 1


def test_manifest_describes_the_files(plain: Bytes, tmp_path: Path) -> None:
    texts = [f"{'é' * i} {i}" for i in range(50)]
    counts = DocumentCounts(read=53, filtered=1, broken=1)  # as counted by the reader
    manifest = write([*texts, texts[7]], plain, tmp_path / "out", counts, val_fraction=0.3, seed=5, shard_tokens=500)
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest.shards[0].files == ("train_00000.npy", "train_00000.offsets")
    assert manifest.counts == {"read": 53, "kept": 50, "duplicates": 1, "filtered": 1, "broken": 1}
    assert (manifest.vocab_size, manifest.eod_id, manifest.seed, manifest.format_version) == (300, 299, 5, 1)
    assert manifest.tokenizer == {
        "name": "bytes.model",
        "file": "tokenizer.model",
        "sha256": hashlib.sha256(b"bytes").hexdigest(),
    }
    for shard in manifest.shards:
        raw = (tmp_path / "out" / shard.file).read_bytes()
        ids = np.load(tmp_path / "out" / shard.file)
        assert shard.sha256 == hashlib.sha256(raw).hexdigest()
        np.save(tmp_path / "again.npy", ids)
        assert raw == (tmp_path / "again.npy").read_bytes(), "the bytes of np.save"
        offsets = np.load(tmp_path / "out" / shard.files[1])
        assert shard.offsets_sha256 == hashlib.sha256((tmp_path / "out" / shard.files[1]).read_bytes()).hexdigest()
        assert offsets.dtype == np.uint64 and offsets.tolist() == [0, *(np.flatnonzero(ids == 299) + 1).tolist()]
        assert shard.tokens == len(ids) and shard.documents == (ids == 299).sum()
        assert shard.bytes == shard.tokens - shard.documents, "one id per byte"
    assert sum(shard.bytes for shard in manifest.shards) == sum(len(text.encode()) for text in texts)
    shards = {name for s in manifest.shards for name in s.files}
    assert set(contents(tmp_path / "out")) == shards | {"manifest.json", "progress.json", "tokenizer.model"}


def test_dedup_keeps_the_first(plain: Bytes, tmp_path: Path) -> None:
    counts = DocumentCounts()
    write(["b", "a", "b", "c", "a", "b"], plain, tmp_path / "out", counts)
    assert read(tmp_path / "out", plain) == ["b", "a", "c"]
    assert (counts.kept, counts.duplicates) == (3, 3)


def test_dedup_can_be_disabled(plain: Bytes, tmp_path: Path) -> None:
    counts = DocumentCounts()
    write(["b", "a", "b"], plain, tmp_path / "out", counts, dedup=False)
    assert read(tmp_path / "out", plain) == ["b", "a", "b"]
    assert (counts.kept, counts.duplicates) == (3, 0)


def test_near_dedup_does_not_depend_on_batches(plain: Bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a long file decides for its tail, even with batches of one document."""
    text = "".join(f"{i:05d} " for i in range(20_000))
    other = "".join(f"{i:05d}, " for i in range(50_000, 65_000))
    documents = [Document(text, True), Document("short"), Document(text + "more", True), Document(other, True)]
    made = []
    for name, batch_chars, workers in (("a", 1, 3), ("b", 10**9, 1)):
        monkeypatch.setattr(document_batches, "BATCH_CHARS", batch_chars)
        counts = DocumentCounts()
        settings = {"near_dedup": 0.8, "val_fraction": 0.1, "num_workers": workers}
        write(documents, plain, tmp_path / name, counts, **settings)
        assert (counts.kept, counts.duplicates) == (3, 1)
        made.append(contents(tmp_path / name))
    assert made[0] == made[1]
    heads, tails = read(tmp_path / "a", plain), read(tmp_path / "a", plain, "val")
    assert [heads[0] + tails[0], heads[-1] + tails[-1]] == [text, other] and len(heads + tails) == 5


def test_id_outside_the_vocabulary_is_an_error(plain: Bytes, tmp_path: Path) -> None:
    """In 16 bits, 65536 + 7 would become 7."""
    plain.encode_batch = lambda texts: [np.array([7, 65536 + 7], np.int32)]  # type: ignore[method-assign]
    with pytest.raises(UserError, match="produced token id 65543, outside its vocabulary of 300"):
        write(["x"], plain, tmp_path / "out")


def test_no_document_spans_two_shards(plain: Bytes, tmp_path: Path) -> None:
    texts = [f"{i:09d}" for i in range(25)]  # ten tokens each
    manifest = write(texts, plain, tmp_path / "out", shard_tokens=35)
    assert [shard.tokens for shard in manifest.shards] == [40, 40, 40, 40, 40, 40, 10]
    assert [shard.file for shard in manifest.shards] == [f"train_{i:05d}.npy" for i in range(7)]
    assert read(tmp_path / "out", plain) == texts


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_tokenizer_is_copied_beside_the_shards(trained: dict[str, Path], tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(trained[kind])
    manifest = write(["some text"], tokenizer, tmp_path)
    assert digest(load_tokenizer(tmp_path / manifest.tokenizer["file"])) == digest(tokenizer)
    assert manifest.tokenizer["sha256"] == digest(tokenizer)


def test_real_files_are_written_to_the_last_byte(shared_data: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(trained["gpt2"])
    names = ["text/rust_book.jsonl", "messy/crlf_book.md", "text/botchan_en.txt"]
    counts = DocumentCounts()
    documents = from_files([str(shared_data / name) for name in names], DataConfig(), counts)
    write(documents, tokenizer, tmp_path / "out", counts, num_workers=2)
    rows = [json.loads(line)["text"] for line in (shared_data / names[0]).read_bytes().split(b"\n") if line]
    plain = [(shared_data / name).read_bytes().decode("utf-8-sig") for name in names[1:]]
    assert read(tmp_path / "out", tokenizer) == [*dict.fromkeys(rows), *plain]


# Determinism


def test_bytes_do_not_depend_on_workers_or_batches(
    trained: dict[str, Path], corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(trained["unigram"])
    made = []
    for name, workers, batch_chars in (("a", 1, 2**20), ("a", 1, 2**20), ("b", 2, 5000), ("c", 5, 1)):
        monkeypatch.setattr(document_batches, "BATCH_CHARS", batch_chars)
        write(corpus, tokenizer, tmp_path / name, num_workers=workers, val_fraction=0.3, shard_tokens=9000)
        made.append(contents(tmp_path / name))
    assert made[0] == made[1] == made[2] == made[3]
    assert len(made[0]) > 4


def test_documents_are_read_lazily(plain: Bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise memory would grow with the corpus. Progress adds up to all bytes and all tokens."""
    monkeypatch.setattr(document_batches, "BATCH_CHARS", 100)  # ten documents
    taken, sizes, tokens, ahead = 0, 0, 0, []

    def documents() -> Iterator[str]:
        nonlocal taken
        for taken in range(1, 1001):
            yield f"{taken:010d}"

    def progress(size: int, count: int) -> None:
        nonlocal sizes, tokens
        sizes, tokens = sizes + size, tokens + count
        ahead.append(taken - sizes // 10)

    write(documents(), plain, tmp_path / "out", num_workers=3, progress=progress)
    assert (sizes, tokens, len(ahead)) == (10_000, 11_000, 100)
    assert max(ahead) <= 10 * 2 * 3


# Train and validation


def test_validation_split_is_stable_when_documents_are_added(plain: Bytes, tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(3000)]
    write(texts[1000:2000], plain, tmp_path / "some", val_fraction=0.1)
    write(texts, plain, tmp_path / "all", val_fraction=0.1)
    few, many = (set(read(tmp_path / name, plain, "val")) for name in ("some", "all"))
    assert few == many & set(texts[1000:2000])
    assert set(read(tmp_path / "some", plain)) == set(texts[1000:2000]) - few
    assert abs(len(many) - 300) < 5 * (3000 * 0.1 * 0.9) ** 0.5
    write(texts, plain, tmp_path / "more", val_fraction=0.2)
    assert many < set(read(tmp_path / "more", plain, "val")), "a larger split contains the smaller one"


def test_zero_val_fraction_holds_out_nothing(plain: Bytes, tmp_path: Path) -> None:
    texts = [Document("long\n" * SPLIT_FILE_CHARS, splittable=True), *(f"{i}" for i in range(200))]
    manifest = write(texts, plain, tmp_path / "out", val_fraction=0.0)
    assert manifest.shards_in("val") == [] and len(read(tmp_path / "out", plain)) == 201


LINES = "".join(f"{i:07d}\n" for i in range(20_000))  # 160,000 characters
WORDS = LINES.replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "tail"),
    [
        (LINES, LINES[144_000:]),
        (LINES + "x\r\n", LINES[144_000:] + "x\r\n"),
        (WORDS, WORDS[144_000:]),
        ("x" * 160_000, "x" * 16_000),
        ("Title\n" + "x" * 159_994, "x" * 16_000),
        ("y" * 140_000 + "\n" + "x" * 19_999, "x" * 19_999),
    ],
)
def test_long_text_file_contributes_its_tail(plain: Bytes, tmp_path: Path, text: str, tail: str) -> None:
    """Split at a line start if one is nearby; a title line must not send everything after it to validation."""
    manifest = write([Document(text, splittable=True)], plain, tmp_path / "out", val_fraction=0.1)
    assert read(tmp_path / "out", plain) == [text.removesuffix(tail)]
    assert read(tmp_path / "out", plain, "val") == [tail]
    assert manifest.counts["kept"] == 1
    assert sum(shard.bytes for shard in manifest.shards) == len(text)


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 0.999999])
def test_both_parts_of_a_split_file_are_nonempty(plain: Bytes, tmp_path: Path, fraction: float) -> None:
    write([Document("x" * SPLIT_FILE_CHARS, splittable=True)], plain, tmp_path / "out", val_fraction=fraction)
    (head,), (tail,) = read(tmp_path / "out", plain), read(tmp_path / "out", plain, "val")
    assert head and tail and abs(len(tail) - SPLIT_FILE_CHARS * fraction) <= 1


# Failed runs and existing shards


def test_no_documents_left_is_an_error_with_counts(plain: Bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": 1}\nno\n')
    counts = DocumentCounts()
    with pytest.raises(UserError) as error:
        write(from_files([str(tmp_path / "a.jsonl")], DataConfig(), counts), plain, tmp_path / "out", counts)
    first = f"{tmp_path / 'a.jsonl'}:2: no text in 'text'"
    counted = "read 3, broken 2, filtered 1, duplicates 0; filtered: blank 1"
    said = f"no documents left to write ({counted}; first broken: {first})"
    assert str(error.value) == f"{tmp_path / 'out'}: {said}"
    assert set(contents(tmp_path / "out")) == {"progress.json"}
    write(["a text"], plain, tmp_path / "out", val_fraction=0.5)  # the folder is still usable


def test_failed_run_leaves_old_shards_intact(plain: Bytes, tmp_path: Path) -> None:
    write(["old", "older"], plain, tmp_path / "out", shard_tokens=1)
    before = contents(tmp_path / "out")
    del before["progress.json"]
    for documents in (["new", None], []):  # None has no text
        with pytest.raises((TypeError, UserError)):
            write(documents, plain, tmp_path / "out", shard_tokens=1, restart=True)
        assert before.items() <= contents(tmp_path / "out").items()
    assert {found for _, found in verify(tmp_path / "out")} == {""}


def test_shards_are_on_the_disk_before_the_manifest_names_them(
    plain: Bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = DiskCalls(monkeypatch, tmp_path / "out")
    write(["one", "two"], plain, tmp_path / "out")
    lines = calls.in_order()
    names = ("train_00000.npy", "train_00000.offsets")
    flushed, renamed = (
        [lines.index(line.format(name)) for name in names] for line in ("fsync {0}", "rename {0}.tmp {0}")
    )
    manifest = lines.index("rename manifest.json.tmp manifest.json")
    assert max(flushed) < min(renamed) < max(renamed) < manifest
    assert lines[max(renamed) + 1] == "fsync ."


def test_leftovers_of_a_larger_run_are_removed_and_nothing_else(plain: Bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write([f"{i}" for i in range(40)], plain, out, shard_tokens=1, val_fraction=0.5)
    (out / "manifest.json").unlink()  # as if that run was killed
    (out / "train_00033.npy.tmp").write_text("half a shard")
    (out / "train_00033.offsets.tmp").write_text("half its offsets")
    (out / "train_notes.npy").write_text("mine")
    manifest = write(["one"], plain, out, restart=True)
    assert [shard.file for shard in manifest.shards] == ["train_00000.npy"]
    shard = {"train_00000.npy", "train_00000.offsets"}
    assert set(contents(out)) == {*shard, "train_notes.npy", "manifest.json", "progress.json", "tokenizer.model"}
    assert read_manifest(out) == manifest and {found for _, found in verify(out)} == {""}


@pytest.mark.parametrize(
    ("change", "changes"),
    [
        ({"seed": 3}, "holds shards built with different settings: train.seed changed from 0 to 3"),
        (
            {"source": {"a.txt": "5 bytes"}},
            "holds shards built with different settings: a.txt changed from absent to 5 bytes",
        ),
    ],
)
def test_finished_shards_are_replaced_only_by_restart(
    plain: Bytes, tmp_path: Path, change: dict[str, Any], changes: str
) -> None:
    out = tmp_path / "out"
    write(["old"], plain, out)
    before = contents(out)
    with pytest.raises(UserError) as error:
        write(["new"], plain, out, **change)
    assert str(error.value) == f"{out}: {changes}: choose another folder, or replace them with --restart"
    with pytest.raises(UserError, match=r"from other documents: start over with --restart"):
        write(["new"], plain, out)
    assert contents(out) == before
    write(["new"], plain, out, **change, restart=True)
    assert read(out, plain) == ["new"]
    (out / "progress.json").unlink()  # as left by an older version
    with pytest.raises(UserError, match=r"out: holds shards but no progress.json .*, or replace them with --restart"):
        write(["newer"], plain, out)
    assert read(out, plain) == ["new"]


def test_repeated_run_tokenizes_nothing(plain: Bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, texts = tmp_path / "out", [f"{i}" for i in range(50)]
    first, before = write(texts, plain, out, shard_tokens=20, val_fraction=0.2), contents(out)
    monkeypatch.setattr(plain, "encode_batch", lambda texts: pytest.fail(f"asked for {texts}"))
    assert write(texts, plain, out, shard_tokens=20, val_fraction=0.2) == first and contents(out) == before


def test_concurrent_run_into_one_folder_is_refused(plain: Bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with FolderLock(out), pytest.raises(BlockingIOError, match="is writing here: wait until it ends"):
        write(["a"], plain, out)
    assert contents(out) == {}
    write(["a"], plain, out)
