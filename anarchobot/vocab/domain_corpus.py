"""The text that a vocabulary is adapted to: documents up to a budget of bytes, no two the same, shuffled, in one file.

What is held out is decided by a document's hash, as pretokenize decides it: what the shards hold out is what no
tokenizer, no vector and no term was learned from.
"""

import json
from array import array
from collections.abc import Iterable, Iterator
from itertools import compress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.document_batches import pieces
from anarchobot.data.sources.documents import Document, DocumentCounts, from_files

PART_CHARS = 8192  # about 2,000 tokens


def write_corpus(
    documents: Iterable[Document], file: Path, *, byte_budget: int, deduplicate: bool, seed: int
) -> dict[str, int]:
    """Writes the documents as JSON lines ({"text": ...}) in an order that is a function of `seed`; the last one is left
    out where it would go over `byte_budget` bytes of UTF-8. They are written as they come first, and then again in
    order: about 30 bytes a document are in memory. A long text file is many documents of about PART_CHARS characters:
    one would be held out whole, or not at all. Returns what became of them: `read`, `duplicates`, `kept`, `bytes`.

    Raises UserError when none is left.
    """
    counts, size = DocumentCounts(), 0
    starts = array("q", [0])
    with TemporaryFile(dir=file.parent) as unordered:
        for unit in pieces(_parts(documents), counts, deduplicate, 0.0):
            ends = size + np.cumsum(unit.sizes)
            fitting = int(np.searchsorted(ends, byte_budget, side="right"))
            for text in unit.texts[:fitting]:
                line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
                starts.append(starts[-1] + unordered.write(line.encode()))
            size = int(ends[fitting - 1]) if fitting else size
            if fitting < len(unit):
                break
        kept = len(starts) - 1
        if not kept:
            raise UserError(
                f"corpus.{file.stem}: no document within {byte_budget:,} bytes: give more text, or a larger budget"
            )
        with file.open("wb") as out:
            for i in np.random.default_rng(seed).permutation(kept):
                unordered.seek(starts[i])
                out.write(unordered.read(starts[i + 1] - starts[i]))
    return {"read": kept + counts.duplicates, "duplicates": counts.duplicates, "kept": kept, "bytes": size}


def _parts(documents: Iterable[Document]) -> Iterator[Document]:
    """Those that may be cut, cut where a line begins, or at least a word."""
    for document in documents:
        text, start = document.text, 0
        while document.splittable and len(text) - start > PART_CHARS:
            most = start + PART_CHARS
            end = text.rfind("\n", start, most) + 1 or text.rfind(" ", start, most) + 1 or most
            yield Document(text[start:end])
            start = end
        yield Document(text[start:])


def read_corpus(file: Path, val_fraction: float, side: Literal["train", "val"]) -> Iterator[str]:
    """The documents of one side, in the file's order."""
    documents = from_files([str(file)], DataConfig(), DocumentCounts())
    for unit in pieces(documents, DocumentCounts(), False, val_fraction):
        yield from compress(unit.texts, unit.is_val if side == "val" else ~unit.is_val)
