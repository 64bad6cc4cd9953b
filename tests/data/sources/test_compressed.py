"""Compressed files decompress exactly; a truncated or damaged file gives everything before the damage and says so."""

import gzip
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from backports import zstd

from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import compressed
from anarchobot.data.sources.files import FileRange
from tests.data.sources.reading import problem, read

ROWS = b"".join(b'{"text": "row %d"}\n' % i for i in range(40))


def compress(raw: bytes, suffix: str) -> bytes:
    """Flushes after every line, so that truncation anywhere keeps the lines before it."""
    if suffix == ".gz":
        gz = zlib.compressobj(wbits=31)
        parts = [gz.compress(line) + gz.flush(zlib.Z_SYNC_FLUSH) for line in raw.splitlines(keepends=True)]
        return b"".join([*parts, gz.flush()])
    zst = zstd.ZstdCompressor(options={zstd.CompressionParameter.checksum_flag: 1})
    parts = [zst.compress(line, zst.FLUSH_BLOCK) for line in raw.splitlines(keepends=True)]
    return b"".join([*parts, zst.flush()])


def readable(raw: bytes, suffix: str) -> bytes:
    """The output of the library's one-shot decompressor."""
    return zlib.decompressobj(31).decompress(raw) if suffix == ".gz" else zstd.ZstdDecompressor().decompress(raw)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_file_truncated_anywhere_is_read_up_to_the_cut(tmp_path: Path, suffix: str) -> None:
    whole = compress(ROWS, suffix)
    path = tmp_path / f"a.jsonl{suffix}"
    most = 0
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        texts, counts = read(path)
        lines = readable(whole[:length], suffix).count(b"\n")
        assert texts == [f"row {i}" for i in range(lines)]
        assert (counts.read, counts.broken) == (lines + 1, 1)
        assert counts.first_broken.startswith(f"{path}:{lines + 1}: truncated or damaged here: ")
        most = max(most, lines)
    assert most == 40, "the last cuts lose only the checksum"
    path.write_bytes(whole)
    assert read(path)[1].as_manifest() == {"read": 40, "kept": 40, "duplicates": 0, "filtered": 0, "broken": 0}


def test_real_truncated_file(shared_data: Path) -> None:
    """By hand: 113,264 bytes can be decompressed, 198 lines and part of another; no question is repeated."""
    path = shared_data / "messy" / "made_truncated.jsonl.gz"
    texts, counts = read(path, data=DataConfig(text_field="question"))
    assert counts.as_manifest() == {"read": 199, "kept": 198, "duplicates": 0, "filtered": 0, "broken": 1}
    assert counts.first_broken.startswith(f"{path}:199: truncated or damaged here: Compressed file ended before")
    assert texts[0].startswith("Natalia sold clips")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("documents", ["file", "paragraphs", "lines"])
def test_truncated_document_is_broken(tmp_path: Path, suffix: str, documents: str) -> None:
    text = b"one\n\ntwo a\ntwo b\n\nthree\n"
    whole = compress(text, suffix)
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
    place = (
        f"{path}: truncated or damaged after 11 bytes"
        if documents == "file"
        else f"{path}:4: truncated or damaged here"
    )
    assert counts.first_broken.startswith(place)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_concatenated_streams_are_one_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(ROWS[:100], suffix) + compress(ROWS[100:], suffix))
    assert len(read(path)[0]) == 40


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_uncompressed_or_damaged_file_is_counted_as_broken(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(ROWS)
    assert read(path)[1].as_manifest() == {"read": 1, "kept": 0, "duplicates": 0, "filtered": 0, "broken": 1}
    whole = bytearray(gzip.compress(ROWS) if suffix == ".gz" else compress(ROWS, suffix))
    whole[-3 if suffix == ".zst" else -6] ^= 1  # the checksum
    path.write_bytes(whole)
    texts, counts = read(path)
    rows = {".gz": 40, ".zst": 0}[suffix]  # zstd returns nothing from a block with a wrong checksum
    assert (len(texts), counts.broken) == (rows, 1)


def test_empty_compressed_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b""))
    assert problem(tmp_path / "a.jsonl.gz").endswith("the file is empty")


def test_decompression_is_streamed(tmp_path: Path) -> None:
    """Lines are yielded before the rest is decompressed: the 100 MB are never in memory at once."""
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstd.compress(b"x" * 999 + b"\n") * 100_000)
    lines = compressed.read_lines(FileRange(path))
    assert [next(lines) for _ in range(3)] == [(i, b"x" * 999 + b"\n") for i in (1, 2, 3)]
    lines.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "SMALL", 2**20)  # a 32nd, for speed


def pack(raw: bytes, suffix: str) -> bytes:
    return gzip.compress(raw) if suffix == ".gz" else zstd.compress(raw)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.usefixtures("small")
def test_a_line_that_expands_too_much_is_broken_and_the_next_is_read(tmp_path: Path, suffix: str) -> None:
    """Memory: the limit, not the 20 MB of the line."""
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(ROWS + b" " * 20_000_000 + b"\n" + ROWS, suffix))
    tracemalloc.start()
    texts, counts = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == [f"row {i}" for i in range(40)] and counts.as_manifest()["read"] == 81
    size = path.stat().st_size
    assert counts.first_broken == (
        f"{path}:41: expands to more than {max(2**20, 100 * size):,} bytes, which is too much for a file of "
        f"{size:,} bytes"
    )
    assert peak < 2.2 * compressed.most_bytes(path) + 500_000, "a line and the blocks that it is joined from"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.usefixtures("small")
def test_a_document_that_expands_too_much_is_broken(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack(b"x" * 20_000_000, suffix))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"expands to more than [0-9,]+ bytes, which is too much for a file of"):
        compressed.read_all(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * compressed.most_bytes(path) + 500_000


@pytest.mark.usefixtures("small")
def test_the_limit_grows_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    noise = np.random.default_rng(0).bytes(20_000)  # can't be compressed
    path.write_bytes(gzip.compress(noise + b"x" * 1_500_000))
    assert len(compressed.read_all(path)) == 1_520_000 > compressed.SMALL
