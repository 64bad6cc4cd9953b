"""Packed files give the bytes that were packed; one that breaks off gives all before the break, and says so."""

import gzip
import zlib
from pathlib import Path

import pytest
from backports import zstd

from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import compressed
from tests.data.sources.reading import problem, read

ROWS = b"".join(b'{"text": "row %d"}\n' % i for i in range(40))


def packed(raw: bytes, suffix: str) -> bytes:
    """Flushed after every line, so that a break anywhere leaves the lines before it."""
    if suffix == ".gz":
        gz = zlib.compressobj(wbits=31)
        parts = [gz.compress(line) + gz.flush(zlib.Z_SYNC_FLUSH) for line in raw.splitlines(keepends=True)]
        return b"".join([*parts, gz.flush()])
    zst = zstd.ZstdCompressor(options={zstd.CompressionParameter.checksum_flag: 1})
    parts = [zst.compress(line, zst.FLUSH_BLOCK) for line in raw.splitlines(keepends=True)]
    return b"".join([*parts, zst.flush()])


def readable(raw: bytes, suffix: str) -> bytes:
    """What the library's one-shot decompressor gets out of it."""
    return zlib.decompressobj(31).decompress(raw) if suffix == ".gz" else zstd.ZstdDecompressor().decompress(raw)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_cut_anywhere_is_read_up_to_the_cut_and_the_break_counted_once(tmp_path: Path, suffix: str) -> None:
    whole = packed(ROWS, suffix)
    path = tmp_path / f"a.jsonl{suffix}"
    most = 0
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        texts, counts = read(path)
        lines = readable(whole[:length], suffix).count(b"\n")
        assert texts == [f"row {i}" for i in range(lines)]
        assert (counts.read, counts.broken) == (lines + 1, 1)
        assert counts.first_broken.startswith(f"{path}:{lines + 1}: the file breaks off here: ")
        most = max(most, lines)
    assert most == 40, "the last cuts lose the check sum alone"
    path.write_bytes(whole)
    assert read(path)[1].as_manifest() == {"read": 40, "kept": 40, "duplicates": 0, "filtered": 0, "broken": 0}


def test_the_real_truncated_file(shared_data: Path) -> None:
    """By hand: 113,264 bytes can be unpacked, 198 lines and the start of another; no question comes twice."""
    path = shared_data / "messy" / "made_truncated.jsonl.gz"
    texts, counts = read(path, data=DataConfig(text_field="question"))
    assert counts.as_manifest() == {"read": 199, "kept": 198, "duplicates": 0, "filtered": 0, "broken": 1}
    assert counts.first_broken.startswith(f"{path}:199: the file breaks off here: Compressed file ended before")
    assert texts[0].startswith("Natalia sold clips")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("documents", ["file", "paragraphs", "lines"])
def test_the_document_that_the_break_falls_in_is_the_broken_one(tmp_path: Path, suffix: str, documents: str) -> None:
    text = b"one\n\ntwo a\ntwo b\n\nthree\n"
    whole = packed(text, suffix)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(whole)
    expected = {"file": [text.decode()], "paragraphs": ["one", "two a\ntwo b", "three"]}
    data = DataConfig(documents=documents)  # type: ignore[arg-type]
    assert read(path, data=data)[0] == expected.get(documents, ["one", "two a", "two b", "three"])
    cut = max(n for n in range(len(whole)) if readable(whole[:n], suffix) == b"one\n\ntwo a\n")
    path.write_bytes(whole[:cut])
    texts, counts = read(path, data=data)
    assert texts == {"file": [], "paragraphs": ["one"], "lines": ["one", "two a"]}[documents]
    assert counts.broken == 1
    place = f"{path}: the file breaks off after 11 bytes" if documents == "file" else f"{path}:4: the file breaks off"
    assert counts.first_broken.startswith(place)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_parts_packed_one_after_the_other_are_one_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed(ROWS[:100], suffix) + packed(ROWS[100:], suffix))
    assert len(read(path)[0]) == 40


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_is_not_packed_or_damaged_is_counted_as_broken(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(ROWS)
    assert read(path)[1].as_manifest() == {"read": 1, "kept": 0, "duplicates": 0, "filtered": 0, "broken": 1}
    whole = bytearray(gzip.compress(ROWS) if suffix == ".gz" else packed(ROWS, suffix))
    whole[-3 if suffix == ".zst" else -6] ^= 1  # the check sum
    path.write_bytes(whole)
    texts, counts = read(path)
    rows = {".gz": 40, ".zst": 0}[suffix]  # zstd gives nothing of the block with the wrong sum
    assert (len(texts), counts.broken) == (rows, 1)


def test_an_empty_packed_text_is_refused_as_an_empty_file_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b""))
    assert problem(tmp_path / "a.jsonl.gz").endswith("the file is empty")


def test_unpacking_is_streamed(tmp_path: Path) -> None:
    """Lines come while the rest is still packed: 100 MB of one line end after another are never in memory."""
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstd.compress(b"x" * 999 + b"\n") * 100_000)
    lines = compressed.read_lines(path)
    assert [next(lines) for _ in range(3)] == [(i, b"x" * 999 + b"\n") for i in (1, 2, 3)]
    lines.close()
