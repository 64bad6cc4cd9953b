"""Documents to shards: deduplicate, hold out a validation split, tokenize and write, counting every document.

The same input gives the same bytes, regardless of the number of threads and of interruptions.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.data.document_batches import TokenizedBatch, batch_documents, id_dtype, tokenize_batches
from anarchobot.data.duplicates import NearDuplicateIndex
from anarchobot.data.resume import FinishedDocuments, Provenance, load_progress, save_progress, shard_files
from anarchobot.data.shard_writer import ShardWriter
from anarchobot.data.shards import Manifest, Shard, write_manifest
from anarchobot.data.sources.documents import Document, DocumentCounts
from anarchobot.storage.lock import FolderLock
from anarchobot.tokenizers.tokenizer import Tokenizer, copy_tokenizer, digest

Progress = Callable[[int, int], None]  # bytes and tokens since the last call
Log = Callable[[str], None]


@dataclass(frozen=True)
class PretokenizeOptions:
    val_fraction: float
    num_workers: int = 1  # threads; does not change the shards
    dedup: bool = True
    near_dedup: float | None = None  # the Jaccard similarity from which a document is dropped
    seed: int = 0
    shard_tokens: int = 2**26  # 128 MiB of uint16


def provenance(tokenizer: Tokenizer, options: PretokenizeOptions, source: Provenance | None) -> dict[str, Any]:
    """Everything the shards' bytes depend on, under readable names. `source`: what the documents depend on."""
    return {
        "tokenizer": f"{tokenizer.files[0].name}, sha256 {digest(tokenizer)}",
        "data.val_fraction": options.val_fraction,
        "data.dedup": options.dedup,
        "data.near_dedup": options.near_dedup,
        "train.seed": options.seed,
        "tokens in a shard": options.shard_tokens,
        **(source or {}),
    }


def pretokenize(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | Path,
    options: PretokenizeOptions,
    *,
    counts: DocumentCounts | None = None,
    source: Provenance | None = None,
    restart: bool = False,
    progress: Progress = lambda size, tokens: None,
    log: Log = lambda line: None,
) -> Manifest:
    """Writes the shards of `documents` and their manifest into `folder`, resuming an earlier run there.

    To resume, `documents` must be the same again from the start. Documents in finished shards are not tokenized again,
    except with `near_dedup`, which compares token ids. `restart` starts over instead: existing shards are replaced once
    all new ones are written. `counts` are those that `documents` updates.

    Raises UserError when no document is left, or when anything but the number of workers has changed since the earlier
    run; BlockingIOError while another process writes to the folder.
    """
    counts = counts if counts is not None else DocumentCounts()
    dtype = id_dtype(tokenizer)

    def unwritten(finished: FinishedDocuments) -> Iterator[TokenizedBatch]:
        batches = batch_documents(documents, counts, options.dedup, options.val_fraction)
        if options.near_dedup is None:
            new = (batch.select(finished.unwritten(batch)) for batch in batches)
            return tokenize_batches((batch for batch in new if len(batch)), tokenizer, dtype, options.num_workers)
        tokenized = tokenize_batches(batches, tokenizer, dtype, options.num_workers)
        distinct = drop_near_duplicates(tokenized, options.near_dedup, counts)
        return (batch.select(finished.unwritten(batch.documents)) for batch in distinct)

    note = "" if options.near_dedup is None else "; tokenizing everything again, because data.near_dedup compares ids"
    with FolderLock(Path(folder)):
        return write_shards(
            unwritten,
            tokenizer,
            Path(folder),
            options,
            counts=counts,
            source=source,
            restart=restart,
            progress=progress,
            log=lambda line: log(line + note),
        )


def write_shards(
    unwritten: Callable[[FinishedDocuments], Iterable[TokenizedBatch]],
    tokenizer: Tokenizer,
    folder: Path,
    options: PretokenizeOptions,
    *,
    counts: DocumentCounts,
    source: Provenance | None,
    restart: bool,
    progress: Progress,
    log: Log,
) -> Manifest:
    """Writes the batches that `unwritten` yields after the finished shards of an earlier run. Needs the FolderLock."""
    made_from = provenance(tokenizer, options, source)
    finished = load_progress(folder, made_from, restart)
    if finished:
        log(f"{folder}: resuming: {len(finished)} shards already done")
    dtype = id_dtype(tokenizer)
    writer = ShardWriter(folder, dtype, options.shard_tokens, finished)
    finished_documents = FinishedDocuments(finished, progress)
    try:
        for batch in unwritten(finished_documents):
            if writer.add(batch):
                save_progress(folder, made_from, writer.finished)
            progress(int(batch.documents.sizes.sum()), len(batch.ids))
        finished_documents.check_exhausted()
        writer.close()
    except BaseException:
        writer.abort()
        raise
    if not writer.finished:
        raise UserError(f"{folder}: no documents left to write ({counts.summary()})")
    save_progress(folder, made_from, writer.finished)
    shards = [f.shard for f in writer.finished]
    _install(folder, shards)
    manifest = Manifest(
        tokenizer={
            "name": tokenizer.files[0].name, "file": copy_tokenizer(tokenizer, folder), "sha256": digest(tokenizer)
        },
        vocab_size=tokenizer.vocab_size,
        dtype=dtype.name,
        eod_id=tokenizer.eod_id,
        seed=options.seed,
        counts=counts.as_manifest(),
        shards=shards,
    )  # fmt: skip
    write_manifest(folder, manifest)
    return manifest


def drop_near_duplicates(
    batches: Iterable[TokenizedBatch], threshold: float, counts: DocumentCounts
) -> Iterator[TokenizedBatch]:
    """The head of a split document decides for its tail, which is in the same batch."""
    index = NearDuplicateIndex(threshold)
    for batch in batches:
        kept: list[bool] = []
        is_tail = batch.documents.is_tail
        ends = np.cumsum(batch.lengths).tolist()
        for tail, length, end in zip(is_tail.tolist(), batch.lengths.tolist(), ends, strict=True):
            kept.append(kept[-1] if tail else index.add_if_new(batch.ids[end - length : end - 1]))
        mask = np.array(kept, bool)
        dropped = int(np.count_nonzero(~mask & ~is_tail))
        counts.duplicates += dropped
        counts.kept -= dropped
        yield batch.select(mask)


def _install(folder: Path, shards: Iterable[Shard]) -> None:
    """Renames the new shards over the old ones. May be interrupted anywhere and repeated."""
    (folder / "manifest.json").unlink(missing_ok=True)  # a half-replaced set of shards must not look complete
    names = {name for shard in shards for name in shard.files}
    for path in shard_files(folder):
        if path.name not in names:
            path.unlink()
    for path in shard_files(folder, ".tmp"):
        path.replace(path.with_suffix(""))
