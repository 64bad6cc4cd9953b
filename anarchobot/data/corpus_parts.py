"""A corpus pretokenized in parts, on several cores or machines, and joined into the same shards, byte for byte, as a
single process would write.

Each part is a folder with the token ids of its documents and what the shards need to know about each document. Exact
duplicates within a part are dropped when it is written. Duplicates across parts, and near duplicates, depend on the
order of the whole corpus and are dropped when the parts are joined.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.data.document_batches import KEY, DocumentBatch, TokenizedBatch, batch_documents, id_dtype, key_words
from anarchobot.data.duplicates import KeySet
from anarchobot.data.pretokenize import Pretokenizer
from anarchobot.data.resume import FinishedDocuments, describe_changes
from anarchobot.data.shard_writer import NpyStream
from anarchobot.data.shards import Manifest
from anarchobot.data.sources.documents import Document, DocumentCounts
from anarchobot.storage.durable import sha256_file, write_atomic
from anarchobot.storage.lock import FolderLock

BATCH_TOKENS = 2**18  # per batch when reading back
COLUMNS: dict[str, npt.DTypeLike] = {
    "lengths": np.int64,
    "sizes": np.int64,
    "keys": KEY,
    "is_val": np.bool_,
    "is_tail": np.bool_,
}


def part_folder(shards: Path, part: int, parts: int) -> Path:
    """Parts are numbered from 0."""
    return shards / "parts" / f"{part:05d}-of-{parts:05d}"


def write_part(job: Pretokenizer, documents: Iterable[Document], part: int, parts: int) -> bool:
    """Writes `documents` as part k of n; returns False when it already exists with the same provenance."""
    folder, provenance = part_folder(job.folder, part, parts), job.provenance
    with FolderLock(folder):
        if _read_record(folder).get("made_of") == json.loads(json.dumps(provenance)):
            return False
        (folder / "part.json").unlink(missing_ok=True)  # a half-written part must not look complete
        dtypes: dict[str, npt.DTypeLike] = {"ids": id_dtype(job.tokenizer), **COLUMNS}
        files = {name: NpyStream(folder / f"{name}.npy", dtype) for name, dtype in dtypes.items()}
        try:
            for batch in job.tokenize(batch_documents(documents, job.counts, job.dedup, job.val_fraction)):
                files["ids"].append(batch.ids)
                files["lengths"].append(batch.lengths)
                for name in ("sizes", "keys", "is_val", "is_tail"):
                    files[name].append(np.ascontiguousarray(getattr(batch.documents, name)))
            digests = {name: file.close() for name, file in files.items()}
        except BaseException:
            for file in files.values():
                file.abort()
            raise
        record = {"made_of": provenance, "counts": asdict(job.counts), "sha256": digests}
        write_atomic(folder / "part.json", json.dumps(record, indent=1) + "\n")
        return True


def join_parts(job: Pretokenizer, parts: int) -> Manifest:
    """Writes the shards that `job.run` would write from the documents of all parts, then deletes the parts.

    Raises UserError when a part is missing, damaged or of a different provenance, and as `job.run` does.
    """
    folders = [part_folder(job.folder, part, parts) for part in range(parts)]
    _add_counts(job.counts, _check_parts(job, folders))

    def unwritten(finished: FinishedDocuments) -> Iterator[TokenizedBatch]:
        batches = job.drop_near_duplicates(_read_parts(folders, job.counts, job.dedup))
        return (batch.select(finished.unwritten(batch.documents)) for batch in batches)

    with FolderLock(job.folder):
        manifest = job.write(unwritten)
        remove_parts(job.folder, parts)
    return manifest


def remove_parts(shards: Path, parts: int) -> None:
    """May be interrupted anywhere and repeated."""
    for part in range(parts):
        shutil.rmtree(part_folder(shards, part, parts), ignore_errors=True)
    with suppress(OSError):  # not empty, or missing
        (shards / "parts").rmdir()


def _check_parts(job: Pretokenizer, folders: list[Path]) -> list[dict[str, Any]]:
    """Returns the record of each part. Raises UserError for a missing, damaged or differently built part."""
    records, parts = [_read_record(folder) for folder in folders], len(folders)
    missing = [part for part, record in enumerate(records) if not record]
    if missing:
        raise UserError(
            f"{job.folder}: {len(missing)} of {parts} parts are missing, the first is {missing[0]}/{parts}: create it "
            f"with --part {missing[0]}/{parts}"
        )
    provenance = job.provenance
    for folder, record in zip(folders, records, strict=True):
        if changes := describe_changes(record["made_of"], provenance):
            raise UserError(f"{folder}: this part was built with different settings: {changes}: rebuild it with --part")
        for name, sha256 in record["sha256"].items():
            file = folder / f"{name}.npy"
            if not file.is_file() or sha256_file(file) != sha256:
                raise UserError(f"{file}: damaged: delete {folder} and rebuild that part with --part")
    return records


def _add_counts(counts: DocumentCounts, records: list[dict[str, Any]]) -> None:
    for record in records:
        part = DocumentCounts(**{**record["counts"], "reasons": Counter(record["counts"]["reasons"]), "used": []})
        for name, value in vars(part).items():
            before = getattr(counts, name)
            setattr(counts, name, before or value if isinstance(value, str) else before + value)


def _read_parts(folders: list[Path], counts: DocumentCounts, dedup: bool) -> Iterator[TokenizedBatch]:
    """Yields the batches of all parts, without documents that an earlier part holds; updates `counts`."""
    seen = KeySet()
    for folder in folders:
        for batch in _read_part(folder):
            if not dedup:
                yield batch
                continue
            heads = ~batch.documents.is_tail
            new_heads = np.array(seen.add(key_words(batch.documents.keys[heads])[:, 1].tolist()), bool)
            new = new_heads[np.cumsum(heads) - 1]  # a tail follows its head
            dropped = int(np.count_nonzero(~new_heads))
            counts.duplicates += dropped
            counts.kept -= dropped
            if new.any():
                yield batch.select(new)


def _read_part(folder: Path) -> Iterator[TokenizedBatch]:
    def column(name: str) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="r")
        return array

    columns = {name: np.asarray(column(name)) for name in COLUMNS}
    ids, ends = column("ids"), np.cumsum(columns["lengths"])
    first = start = 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, start + BATCH_TOKENS)))
        while last < len(ends) and columns["is_tail"][last]:  # keep a tail with its head
            last += 1
        stop = int(ends[last - 1])
        lengths, sizes, keys, is_val, is_tail = (columns[name][first:last] for name in COLUMNS)
        yield TokenizedBatch(DocumentBatch([], sizes, keys, is_val, is_tail), ids[start:stop], lengths)
        first, start = last, stop


def _read_record(folder: Path) -> dict[str, Any]:
    """The content of part.json, which is written last; empty for an incomplete part."""
    try:
        record = json.loads((folder / "part.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
