"""The domain text in one file."""

import json
import tracemalloc
from pathlib import Path

import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.document_batches import batch_documents
from anarchobot.data.sources.documents import Document, DocumentCounts, from_files
from anarchobot.vocab.domain_corpus import MAX_PART_CHARS, read_corpus, write_corpus

TEXTS = [f"document {i} über alles" for i in range(500)]


def write(
    file: Path, texts: list[str] = TEXTS, budget: int = 10**9, dedup: bool = True, seed: int = 0
) -> dict[str, int]:
    return write_corpus(map(Document, texts), file, byte_budget=budget, deduplicate=dedup, seed=seed)


def texts_of(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    counts = write(tmp_path / "a.jsonl", [*TEXTS, *TEXTS[:7]])
    assert (counts["read"], counts["duplicates"], counts["kept"]) == (507, 7, 500)
    assert counts["bytes"] == sum(len(t.encode()) for t in TEXTS)
    assert sorted(texts_of(tmp_path / "a.jsonl")) == sorted(TEXTS)
    assert write(tmp_path / "a.jsonl", [*TEXTS, *TEXTS[:7]], dedup=False)["kept"] == 507


def test_the_order_depends_on_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / name, seed=seed)
    a, b, c = (texts_of(tmp_path / name) for name in "abc")
    assert a == b != c
    assert a != TEXTS
    assert sum(x == y for x, y in zip(a, TEXTS, strict=True)) < 20  # one expected in a random order


def test_the_byte_budget_is_exact(tmp_path: Path) -> None:
    size = len(b"aaaa")
    texts = ["aaaa", "bbbb", "cccc", "dddd"]
    assert write(tmp_path / "a.jsonl", texts, budget=3 * size)["kept"] == 3
    assert write(tmp_path / "a.jsonl", texts, budget=3 * size - 1) == {
        "read": 2,
        "duplicates": 0,
        "kept": 2,
        "bytes": 8,
    }
    with pytest.raises(UserError, match="no document fits in 3 bytes"):
        write(tmp_path / "a.jsonl", texts, budget=3)


@pytest.mark.parametrize("line", [f"{'word ' * 30}\n", "word " * 999, "x" * 999])
def test_a_long_text_file_is_split_into_documents(line: str, tmp_path: Path) -> None:
    (tmp_path / "domain.txt").write_text("".join(f"{i}{line}" for i in range(3000)))
    documents = from_files([str(tmp_path / "domain.txt")], DataConfig(), DocumentCounts())
    counts = write_corpus(documents, tmp_path / "a.jsonl", byte_budget=10**9, deduplicate=True, seed=0)
    texts = texts_of(tmp_path / "a.jsonl")
    assert counts["bytes"] == (tmp_path / "domain.txt").stat().st_size == sum(map(len, texts))
    assert max(map(len, texts)) <= MAX_PART_CHARS
    assert counts["kept"] == len(texts) < 1.5 * counts["bytes"] / MAX_PART_CHARS
    assert line[-1] == "x" or all(text.endswith(line[-1]) for text in texts)
    held_out = list(read_corpus(tmp_path / "a.jsonl", 0.1, "val"))
    assert 0.02 < sum(map(len, held_out)) / counts["bytes"] < 0.2


def test_the_text_is_not_held_in_memory(tmp_path: Path) -> None:
    """20 MB in documents of 10,000 bytes."""
    texts = (f"{i} {'ü' * 4998}" for i in range(2000))
    tracemalloc.start()
    counts = write_corpus(map(Document, texts), tmp_path / "a.jsonl", byte_budget=10**9, deduplicate=True, seed=0)
    total = sum(len(text.encode()) for text in read_corpus(tmp_path / "a.jsonl", 0.0, "train"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts["bytes"] == total > 2e7
    assert peak < 8e6  # a few batches of a million characters


def test_the_splits_match_the_shards(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    train, val = (set(read_corpus(tmp_path / "a.jsonl", 0.1, split)) for split in ("train", "val"))  # type: ignore[arg-type]
    held_out = {
        text
        for batch in batch_documents(map(Document, TEXTS), DocumentCounts(), False, 0.1)
        for text, is_val in zip(batch.texts, batch.is_val.tolist(), strict=True)
        if is_val
    }
    assert val == held_out
    assert 20 < len(val) < 90
    assert train | val == set(TEXTS)
    assert not train & val
