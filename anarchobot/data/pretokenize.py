"""Documents in, shards out: duplicates dropped, a validation split held out, tokens written, all of it counted.

The same input gives the same bytes, however many threads tokenise and however often the run was stopped.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.data.corpus_parts import Parts, remove_parts
from anarchobot.data.document_batches import Encoded, encoded, id_dtype, pieces
from anarchobot.data.duplicates import NearDuplicateIndex
from anarchobot.data.resume import Passed, Provenance, load_progress, save_progress, shard_files
from anarchobot.data.shard_writer import ShardWriter
from anarchobot.data.shards import Manifest, Shard, write_manifest
from anarchobot.data.sources.documents import Document, DocumentCounts
from anarchobot.storage.lock import FolderLock
from anarchobot.tokenizers.tokenizer import Tokenizer, copy_tokenizer, digest

SHARD_TOKENS = 2**26  # 128 MiB of uint16


def pretokenize(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    counts: DocumentCounts,
    val_fraction: float,
    num_workers: int,
    dedup: bool = True,
    near_dedup: float | None = None,
    seed: int = 0,
    source: Provenance | None = None,
    restart: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int, int], None] = lambda size, tokens: None,
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Writes the shards of `documents` and their manifest into `folder`.

    An earlier run in this folder, stopped or not, is gone on with: `documents` must be the same again, from the start;
    what finished shards hold isn't tokenised again (but with `near_dedup` it is: the ids are compared). `source` says
    what the documents depend on, so that a change is told before they are read. `restart` starts anew: then the shards
    that are there are replaced, once all the new ones are written.

    `progress(bytes, tokens)` is called after every unit of text, `say(line)` when an earlier run is gone on with.
    Raises UserError when no document is left, and when anything but the number of workers has changed since that run;
    BlockingIOError while another process writes here.
    """
    made_of = provenance(tokenizer, val_fraction, dedup, near_dedup, seed, source, shard_tokens)
    dtype = id_dtype(tokenizer)

    def units(passed: Passed) -> Iterator[Encoded]:
        found = pieces(documents, counts, dedup, val_fraction)
        if near_dedup is None:
            new = (unit.only(passed.new_of(unit)) for unit in found)
            return encoded((unit for unit in new if len(unit)), tokenizer, dtype, num_workers)
        far = _without_near_duplicates(encoded(found, tokenizer, dtype, num_workers), near_dedup, counts)
        return (unit.only(passed.new_of(unit.pieces)) for unit in far)

    again = "" if near_dedup is None else "; all is tokenised again, for data.near_dedup compares ids"
    with FolderLock(Path(folder)):
        return _write(
            units, tokenizer, Path(folder), counts, seed, made_of, restart, shard_tokens, progress, say, again
        )


def join(
    parts: Parts,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    counts: DocumentCounts,
    made_of: Provenance,
    dedup: bool = True,
    near_dedup: float | None = None,
    seed: int = 0,
    restart: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int, int], None] = lambda size, tokens: None,
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """What `pretokenize` would have written of the documents of all parts (data/parts.py), which are removed then.
    Raises as it does."""
    parts.add_counts(counts)

    def units(passed: Passed) -> Iterator[Encoded]:
        found = parts.units(counts, dedup)
        far = found if near_dedup is None else _without_near_duplicates(found, near_dedup, counts)
        return (unit.only(passed.new_of(unit.pieces)) for unit in far)

    with FolderLock(Path(folder)):
        written = _write(units, tokenizer, Path(folder), counts, seed, made_of, restart, shard_tokens, progress, say)
        remove_parts(folder, parts.count)
    return written


def provenance(
    tokenizer: Tokenizer,
    val_fraction: float,
    dedup: bool,
    near_dedup: float | None,
    seed: int,
    source: Provenance | None,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """All that the shards' bytes depend on, under names for people."""
    return {
        "tokenizer": f"{tokenizer.files[0].name}, sha256 {digest(tokenizer)}",
        "data.val_fraction": val_fraction,
        "data.dedup": dedup,
        "data.near_dedup": near_dedup,
        "train.seed": seed,
        "tokens in a shard": shard_tokens,
        **(source or {}),
    }


def _write(
    units_of: Callable[[Passed], Iterator[Encoded]],
    tokenizer: Tokenizer,
    out: Path,
    counts: DocumentCounts,
    seed: int,
    made_of: Provenance,
    restart: bool,
    shard_tokens: int,
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
    again: str = "",
) -> Manifest:
    finished = load_progress(out, made_of, restart)
    if finished:
        say(f"{out}: going on with an earlier run, behind {len(finished)} shards{again}")
    dtype = id_dtype(tokenizer)
    writer = ShardWriter(out, dtype, shard_tokens, finished)
    passed = Passed(finished, progress)
    try:
        for unit in units_of(passed):
            if writer.add(unit):
                save_progress(out, made_of, writer.finished)
            progress(int(unit.pieces.sizes.sum()), len(unit.ids))
        passed.check_end()
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    if not writer.finished:
        raise UserError(f"{out}: no document is left to write ({counts.summary()})")
    save_progress(out, made_of, writer.finished)
    shards = [f.shard for f in writer.finished]
    _put_in_place(out, shards)
    manifest = Manifest(
        tokenizer={
            "name": tokenizer.files[0].name, "file": copy_tokenizer(tokenizer, out), "sha256": digest(tokenizer)
        },
        vocab_size=tokenizer.vocab_size,
        dtype=dtype.name,
        eod_id=tokenizer.eod_id,
        seed=seed,
        counts=counts.as_manifest(),
        shards=shards,
    )  # fmt: skip
    write_manifest(out, manifest)
    return manifest


def _without_near_duplicates(units: Iterable[Encoded], threshold: float, counts: DocumentCounts) -> Iterator[Encoded]:
    """The tail of a document, which is in the same unit, goes where its head went."""
    near = NearDuplicateIndex(threshold)
    for unit in units:
        wanted: list[bool] = []
        ends = np.cumsum(unit.lengths).tolist()
        for is_tail, length, end in zip(unit.pieces.is_tail.tolist(), unit.lengths.tolist(), ends, strict=True):
            wanted.append(wanted[-1] if is_tail else near.is_new(unit.ids[end - length : end - 1]))
        lost = ~np.array(wanted, bool)
        dropped = int(np.count_nonzero(lost & ~unit.pieces.is_tail))
        counts.duplicates += dropped
        counts.kept -= dropped
        yield unit.only(~lost)


def _put_in_place(out: Path, shards: Iterable[Shard]) -> None:
    """May be stopped anywhere and done again."""
    (out / "manifest.json").unlink(missing_ok=True)  # half-replaced shards must not pass for whole ones
    names = {name for shard in shards for name in shard.files}
    for path in shard_files(out):
        if path.name not in names:
            path.unlink()
    for path in shard_files(out, ".tmp"):
        path.replace(path.with_suffix(""))
