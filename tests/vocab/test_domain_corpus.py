"""The field's text in one file."""

import json
import tracemalloc
from pathlib import Path

import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.document_batches import pieces
from anarchobot.data.sources.documents import DocumentCounts, Document, from_files
from anarchobot.vocab.domain_corpus import PART_CHARS, read_corpus, write_corpus

TEXTS = [f"document {i} über alles" for i in range(500)]


def write(
    file: Path, texts: list[str] = TEXTS, budget: int = 10**9, dedup: bool = True, seed: int = 0
) -> dict[str, int]:
    return write_corpus(map(Document, texts), file, byte_budget=budget, deduplicate=dedup, seed=seed)


def texts_of(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def test_duplicates_are_counted_and_left_out(tmp_path: Path) -> None:
    told = write(tmp_path / "a.jsonl", [*TEXTS, *TEXTS[:7]])
    assert (told["read"], told["duplicates"], told["kept"]) == (507, 7, 500)
    assert told["bytes"] == sum(len(t.encode()) for t in TEXTS)
    assert sorted(texts_of(tmp_path / "a.jsonl")) == sorted(TEXTS)
    assert write(tmp_path / "a.jsonl", [*TEXTS, *TEXTS[:7]], dedup=False)["kept"] == 507


def test_it_is_shuffled_by_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / name, seed=seed)
    a, b, c = (texts_of(tmp_path / name) for name in "abc")
    assert a == b != c
    assert a != TEXTS
    assert sum(x == y for x, y in zip(a, TEXTS, strict=True)) < 20  # of a random order, one is at its place


def test_the_budget_holds_to_the_byte(tmp_path: Path) -> None:
    size = len(b"aaaa")
    texts = ["aaaa", "bbbb", "cccc", "dddd"]
    assert write(tmp_path / "a.jsonl", texts, budget=3 * size)["kept"] == 3
    assert write(tmp_path / "a.jsonl", texts, budget=3 * size - 1) == {
        "read": 2,
        "duplicates": 0,
        "kept": 2,
        "bytes": 8,
    }
    with pytest.raises(UserError, match="no document within 3 bytes"):
        write(tmp_path / "a.jsonl", texts, budget=3)


@pytest.mark.parametrize("line", [f"{'word ' * 30}\n", "word " * 999, "x" * 999])
def test_a_long_text_file_is_many_documents(line: str, tmp_path: Path) -> None:
    (tmp_path / "field.txt").write_text("".join(f"{i}{line}" for i in range(3000)))
    documents = from_files([str(tmp_path / "field.txt")], DataConfig(), DocumentCounts())
    told = write_corpus(documents, tmp_path / "a.jsonl", byte_budget=10**9, deduplicate=True, seed=0)
    texts = texts_of(tmp_path / "a.jsonl")
    assert told["bytes"] == (tmp_path / "field.txt").stat().st_size == sum(map(len, texts))
    assert max(map(len, texts)) <= PART_CHARS
    assert told["kept"] == len(texts) < 1.5 * told["bytes"] / PART_CHARS
    assert line[-1] == "x" or all(text.endswith(line[-1]) for text in texts)
    held_out = list(read_corpus(tmp_path / "a.jsonl", 0.1, "val"))
    assert 0.02 < sum(map(len, held_out)) / told["bytes"] < 0.2


def test_the_text_is_not_in_memory(tmp_path: Path) -> None:
    """20 MB in documents of 10,000 bytes."""
    texts = (f"{i} {'ü' * 4998}" for i in range(2000))
    tracemalloc.start()
    told = write_corpus(map(Document, texts), tmp_path / "a.jsonl", byte_budget=10**9, deduplicate=True, seed=0)
    sides = sum(len(text.encode()) for text in read_corpus(tmp_path / "a.jsonl", 0.0, "train"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert told["bytes"] == sides > 2e7
    assert peak < 8e6  # a unit of a million characters, a few times


def test_the_sides_are_those_of_the_shards(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    train, val = (set(read_corpus(tmp_path / "a.jsonl", 0.1, side)) for side in ("train", "val"))  # type: ignore[arg-type]
    held_out = {
        text
        for unit in pieces(map(Document, TEXTS), DocumentCounts(), False, 0.1)
        for text, is_val in zip(unit.texts, unit.is_val.tolist(), strict=True)
        if is_val
    }
    assert val == held_out
    assert 20 < len(val) < 90
    assert train | val == set(TEXTS)
    assert not train & val
