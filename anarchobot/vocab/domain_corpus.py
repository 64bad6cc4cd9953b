"""The text used to adapt a vocabulary: deduplicated documents up to a byte budget, shuffled, in one file.

The validation split is decided by document hash, as in pretokenize, so that held-out documents are the same in the
shards and in the training of tokenizer, terms and vectors.
"""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import compress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.document_batches import batch_documents
from anarchobot.data.sources.documents import Document, DocumentCounts, from_files

MAX_PART_CHARS = 8192  # about 2,000 tokens


def write_corpus(
    documents: Iterable[Document],
    file: Path,
    *,
    byte_budget: int,
    deduplicate: bool,
    seed: int,
    progress: Callable[[int], None] = lambda size: None,
) -> dict[str, int]:
    """Writes documents as JSON lines ({"text": ...}) in an order that depends on `seed`, up to `byte_budget` bytes.

    Documents are first written to a temporary file, so memory use is about 30 bytes per document. Long text files are
    split into documents of about MAX_PART_CHARS characters; otherwise a file would be held out completely or not at
    all. `progress` is called with the bytes so far. Returns the counts `read`, `duplicates`, `kept` and `bytes`. Raises
    UserError if no document is left.
    """
    counts, size = DocumentCounts(), 0
    starts = array("q", [0])
    with TemporaryFile(dir=file.parent) as unordered:
        for batch in batch_documents(_split(documents), counts, deduplicate, 0.0):
            ends = size + np.cumsum(batch.sizes)
            fitting = int(np.searchsorted(ends, byte_budget, side="right"))
            for text in batch.texts[:fitting]:
                line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
                starts.append(starts[-1] + unordered.write(line.encode()))
            size = int(ends[fitting - 1]) if fitting else size
            progress(size)
            if fitting < len(batch):
                break
        kept = len(starts) - 1
        if not kept:
            raise UserError(
                f"corpus.{file.stem}: no document fits in {byte_budget:,} bytes: use more text or a larger budget"
            )
        with file.open("wb") as out:
            for i in np.random.default_rng(seed).permutation(kept):
                unordered.seek(starts[i])
                out.write(unordered.read(starts[i + 1] - starts[i]))
    return {"read": kept + counts.duplicates, "duplicates": counts.duplicates, "kept": kept, "bytes": size}


def _split(documents: Iterable[Document]) -> Iterator[Document]:
    """Splits splittable documents at the start of a line, or else of a word."""
    for document in documents:
        text, start = document.text, 0
        while document.splittable and len(text) - start > MAX_PART_CHARS:
            limit = start + MAX_PART_CHARS
            end = text.rfind("\n", start, limit) + 1 or text.rfind(" ", start, limit) + 1 or limit
            yield Document(text[start:end])
            start = end
        yield Document(text[start:])


def read_corpus(file: Path, val_fraction: float, split: Literal["train", "val"]) -> Iterator[str]:
    """Yields the documents of a split in file order."""
    documents = from_files([str(file)], DataConfig(), DocumentCounts())
    for batch in batch_documents(documents, DocumentCounts(), False, val_fraction):
        yield from compress(batch.texts, batch.is_val if split == "val" else ~batch.is_val)
