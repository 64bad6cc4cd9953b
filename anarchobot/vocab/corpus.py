"""The text that a vocabulary is adapted to: documents up to a budget of bytes, no two the same, shuffled, in one file.

What is held out is decided by a document's hash, as pretokenize decides it: what the shards hold out is what no
tokenizer, no vector and no term was learned from.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import compress
from pathlib import Path
from typing import Literal

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.pieces import pieces
from anarchobot.data.sources.documents import Counts, Document, from_files


def write_corpus(
    documents: Iterable[Document], file: Path, *, byte_budget: int, deduplicate: bool, seed: int
) -> dict[str, int]:
    """Writes the documents as JSON lines ({"text": ...}) in an order that is a function of `seed`; the last one is left
    out where it would go over `byte_budget` bytes of UTF-8. They are all in memory at once. Returns what became of
    them: `read`, `duplicates`, `kept`, `bytes`.

    Raises UserError when none is left.
    """
    counts, size = Counts(), 0
    kept: list[str] = []
    whole = (Document(document.text) for document in documents)  # not cut: a document is on one side or the other
    for unit in pieces(whole, counts, deduplicate, 0.0):
        ends = size + np.cumsum(unit.sizes)
        fitting = int(np.searchsorted(ends, byte_budget, side="right"))
        kept += unit.texts[:fitting]
        if fitting < len(unit):
            size = int(ends[fitting - 1]) if fitting else size
            break
        size = int(ends[-1])
    if not kept:
        raise UserError(f"{file.stem}: no document within {byte_budget:,} bytes: give more text, or a larger budget")
    with file.open("w", encoding="utf-8", newline="\n") as out:
        for i in np.random.default_rng(seed).permutation(len(kept)).tolist():
            out.write(json.dumps({"text": kept[i]}, ensure_ascii=False) + "\n")
    read = len(kept) + counts.duplicates
    return {"read": read, "duplicates": counts.duplicates, "kept": len(kept), "bytes": size}


def read_corpus(file: Path, val_fraction: float, side: Literal["train", "val"]) -> Iterator[str]:
    """The documents of one side, in the file's order."""
    documents = from_files([str(file)], DataConfig(), Counts())
    for unit in pieces(documents, Counts(), False, val_fraction):
        yield from compress(unit.texts, unit.is_val if side == "val" else ~unit.is_val)
