"""A corpus tokenised in parts, by as many programs as there are cores or machines, and joined to the shards that one
program would have written, byte for byte.

Each part is a folder: the ids of its pieces, and what the shards need to know of each. Duplicates within a part are
left out by it; those of another part, and near duplicates, when the parts are joined: both depend on the order of all.
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
from anarchobot.data.document_batches import KEY, Encoded, Pieces, encoded, id_dtype, numbers_of, pieces
from anarchobot.data.duplicates import Seen
from anarchobot.data.resume import Provenance, difference
from anarchobot.data.shard_writer import NpyStream
from anarchobot.data.sources.documents import Document, DocumentCounts
from anarchobot.storage.durable import sha256_file, write_atomic
from anarchobot.storage.lock import FolderLock
from anarchobot.tokenizers.tokenizer import Tokenizer

UNIT_TOKENS = 2**18  # read at a time
COLUMNS: dict[str, npt.DTypeLike] = {
    "lengths": np.int64,
    "sizes": np.int64,
    "keys": KEY,
    "is_val": np.bool_,
    "is_tail": np.bool_,
}


def part_folder(shards: str | Path, part: int, parts: int) -> Path:
    """Parts count from 0, as ranks do."""
    return Path(shards) / "parts" / f"{part:05d}-of-{parts:05d}"


def write_part(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    counts: DocumentCounts,
    made_of: Provenance,
    val_fraction: float,
    dedup: bool,
    num_workers: int,
) -> bool:
    """Writes the part that `documents` are; False when it is there already, made of the same."""
    with FolderLock(folder):
        if _record(folder).get("made_of") == json.loads(json.dumps(dict(made_of))):
            return False
        (folder / "part.json").unlink(missing_ok=True)  # a half-written part must not pass for a whole one
        dtype = id_dtype(tokenizer)
        kinds: dict[str, npt.DTypeLike] = {"ids": dtype, **COLUMNS}
        files = {name: NpyStream(folder / f"{name}.npy", kind) for name, kind in kinds.items()}
        try:
            for unit in encoded(pieces(documents, counts, dedup, val_fraction), tokenizer, dtype, num_workers):
                files["ids"].append(unit.ids)
                files["lengths"].append(unit.lengths)
                for name in ("sizes", "keys", "is_val", "is_tail"):
                    files[name].append(np.ascontiguousarray(getattr(unit.pieces, name)))
            digests = {name: file.close() for name, file in files.items()}
        except BaseException:
            for file in files.values():
                file.abandon()
            raise
        record = {"made_of": dict(made_of), "counts": asdict(counts), "sha256": digests}
        write_atomic(folder / "part.json", json.dumps(record, indent=1) + "\n")
        return True


class Parts:
    """All parts of a corpus, in their order."""

    def __init__(self, shards: str | Path, parts: int, made_of: Provenance) -> None:
        """Raises UserError when one is missing, damaged, or made of something else."""
        self.count = parts
        self._folders = [part_folder(shards, part, parts) for part in range(parts)]
        missing = [part for part, folder in enumerate(self._folders) if not _record(folder)]
        if missing:
            raise UserError(
                f"{shards}: {len(missing)} of {parts} parts are not there yet, the first is {missing[0]}/{parts}: make "
                f"them with --part {missing[0]}/{parts} and so on"
            )
        self._records = [_record(folder) for folder in self._folders]
        for folder, record in zip(self._folders, self._records, strict=True):
            if told := difference(record["made_of"], made_of):
                raise UserError(f"{folder}: this part was made otherwise: {told}: make it again with --part")
            for name, sha256 in record["sha256"].items():
                file = folder / f"{name}.npy"
                if not file.is_file() or sha256_file(file) != sha256:
                    raise UserError(f"{file}: damaged: remove {folder} and make that part again with --part")

    def add_counts(self, counts: DocumentCounts) -> None:
        for record in self._records:
            of_part = DocumentCounts(**{**record["counts"], "reasons": Counter(record["counts"]["reasons"]), "used": []})
            for name, value in vars(of_part).items():
                before = getattr(counts, name)
                setattr(counts, name, before or value if isinstance(value, str) else before + value)

    def units(self, counts: DocumentCounts, dedup: bool) -> Iterator[Encoded]:
        """The tokenised pieces, without those of a document that an earlier part has: `counts` is told of them."""
        seen = Seen()
        for folder in self._folders:
            for unit in _units(folder):
                if not dedup:
                    yield unit
                    continue
                heads = ~unit.pieces.is_tail
                new_heads = np.array(seen.add(numbers_of(unit.pieces.keys[heads])[:, 1].tolist()), bool)
                new = new_heads[np.cumsum(heads) - 1]  # a tail goes where its head went
                lost = int(np.count_nonzero(~new_heads))
                counts.duplicates += lost
                counts.kept -= lost
                if new.any():
                    yield unit.only(new)


def remove_parts(shards: str | Path, parts: int) -> None:
    """Once they are joined. May be stopped anywhere and done again."""
    for part in range(parts):
        shutil.rmtree(part_folder(shards, part, parts), ignore_errors=True)
    with suppress(OSError):  # there are others, or none
        (Path(shards) / "parts").rmdir()


def _units(folder: Path) -> Iterator[Encoded]:
    def column(name: str) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="r")
        return found

    columns = {name: np.asarray(column(name)) for name in COLUMNS}
    ids, ends = column("ids"), np.cumsum(columns["lengths"])
    first = start = 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, start + UNIT_TOKENS)))
        while last < len(ends) and columns["is_tail"][last]:  # with its head
            last += 1
        stop = int(ends[last - 1])
        lengths, sizes, keys, is_val, is_tail = (columns[name][first:last] for name in COLUMNS)
        yield Encoded(Pieces([], sizes, keys, is_val, is_tail), ids[start:stop], lengths)
        first, start = last, stop


def _record(folder: Path) -> dict[str, Any]:
    """What was written last; empty where the part is not whole."""
    try:
        found = json.loads((folder / "part.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
