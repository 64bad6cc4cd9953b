"""The field's text in one file."""

import json
from pathlib import Path

import pytest

from anarchobot.config.errors import UserError
from anarchobot.data.pieces import pieces
from anarchobot.data.sources.documents import Counts, Document
from anarchobot.vocab.corpus import read_corpus, write_corpus

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


def test_the_sides_are_those_of_the_shards(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    train, val = (set(read_corpus(tmp_path / "a.jsonl", 0.1, side)) for side in ("train", "val"))  # type: ignore[arg-type]
    held_out = {
        text
        for unit in pieces(map(Document, TEXTS), Counts(), False, 0.1)
        for text, is_val in zip(unit.texts, unit.is_val.tolist(), strict=True)
        if is_val
    }
    assert val == held_out
    assert 20 < len(val) < 90
    assert train | val == set(TEXTS)
    assert not train & val
