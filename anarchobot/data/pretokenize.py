"""Documents to shards: deduplicate, hold out a validation split, tokenize and write, counting every document.

The same input gives the same bytes, regardless of the number of threads and of interruptions.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.data.document_batches import DocumentBatch, TokenizedBatch, batch_documents, id_dtype, tokenize_batches
from anarchobot.data.duplicates import NearDuplicateIndex
from anarchobot.data.resume import FinishedDocuments, Provenance, is_complete, load_progress, save_progress, shard_files
from anarchobot.data.shard_writer import ShardWriter
from anarchobot.data.shards import Manifest, Shard, write_manifest
from anarchobot.data.sources.documents import Document, DocumentCounts
from anarchobot.storage.durable import fsync_dir
from anarchobot.storage.lock import FolderLock
from anarchobot.tokenizers.tokenizer import Tokenizer, copy_tokenizer, digest


@dataclass(frozen=True)
class Pretokenizer:
    """Writes shards and their manifest into `folder`, resuming an earlier run there."""

    tokenizer: Tokenizer
    folder: Path
    val_fraction: float
    num_workers: int = 1  # threads; does not change the shards
    dedup: bool = True
    near_dedup: float | None = None  # the Jaccard similarity from which a document is dropped
    seed: int = 0
    shard_tokens: int = 2**26  # 128 MiB of uint16
    counts: DocumentCounts = field(default_factory=DocumentCounts)  # also updated by the reader of the documents
    source: Provenance = field(default_factory=dict)  # what the documents depend on
    restart: bool = False  # start over; existing shards are replaced once all new shards are written
    progress: Callable[[int, int], None] = lambda size, tokens: None  # called with new bytes and tokens
    log: Callable[[str], None] = lambda line: None

    @property
    def provenance(self) -> dict[str, Any]:
        """Everything the shards' bytes depend on, under readable names."""
        return {
            "tokenizer": f"{self.tokenizer.files[0].name}, sha256 {digest(self.tokenizer)}",
            "data.val_fraction": self.val_fraction,
            "data.dedup": self.dedup,
            "data.near_dedup": self.near_dedup,
            "train.seed": self.seed,
            "tokens in a shard": self.shard_tokens,
            **self.source,
        }

    def run(self, documents: Iterable[Document]) -> Manifest:
        """To resume, `documents` must be the same again from the start. Those in finished shards are not tokenized
        again, except with `near_dedup`, which compares token ids.

        Raises UserError when no document is left, or when anything but the number of workers has changed since the
        earlier run; BlockingIOError while another process writes to the folder.
        """

        def unwritten(finished: FinishedDocuments) -> Iterator[TokenizedBatch]:
            batches = batch_documents(documents, self.counts, self.dedup, self.val_fraction)
            if self.near_dedup is not None:
                tokenized = self.drop_near_duplicates(self.tokenize(batches))
                return (batch.select(finished.unwritten(batch.documents)) for batch in tokenized)
            new = (batch.select(finished.unwritten(batch)) for batch in batches)
            return self.tokenize(batch for batch in new if len(batch))

        retokenizes = "" if self.near_dedup is None else "; tokenizing everything again: data.near_dedup compares ids"
        with FolderLock(self.folder):
            return self.write(unwritten, retokenizes)

    def tokenize(self, batches: Iterable[DocumentBatch]) -> Iterator[TokenizedBatch]:
        return tokenize_batches(batches, self.tokenizer, id_dtype(self.tokenizer), self.num_workers)

    def drop_near_duplicates(self, batches: Iterable[TokenizedBatch]) -> Iterator[TokenizedBatch]:
        """The head of a split document decides for its tail, which is in the same batch."""
        if self.near_dedup is None:
            yield from batches
            return
        index = NearDuplicateIndex(self.near_dedup)
        for batch in batches:
            kept: list[bool] = []
            is_tail = batch.documents.is_tail
            ends = np.cumsum(batch.lengths).tolist()
            for tail, length, end in zip(is_tail.tolist(), batch.lengths.tolist(), ends, strict=True):
                kept.append(kept[-1] if tail else index.add_if_new(batch.ids[end - length : end - 1]))
            mask = np.array(kept, bool)
            dropped = int(np.count_nonzero(~mask & ~is_tail))
            self.counts.duplicates += dropped
            self.counts.kept -= dropped
            yield batch.select(mask)

    def write(self, unwritten: Callable[[FinishedDocuments], Iterable[TokenizedBatch]], note: str = "") -> Manifest:
        """Writes the batches that `unwritten` yields after the finished shards of an earlier run. Needs the lock."""
        provenance, dtype = self.provenance, id_dtype(self.tokenizer)
        finished = load_progress(self.folder, provenance, self.restart)
        if finished:
            state = f"resuming: {len(finished)} shards already done{note}"
            if is_complete(self.folder, provenance):
                state = "already finished: reading the documents again to count them"
            self.log(f"{self.folder}: {state}")
        writer = ShardWriter(self.folder, dtype, self.shard_tokens, finished)
        finished_documents = FinishedDocuments(finished, self.progress)
        try:
            for batch in unwritten(finished_documents):
                if writer.add(batch):
                    save_progress(self.folder, provenance, writer.finished)
                self.progress(int(batch.documents.sizes.sum()), len(batch.ids))
            finished_documents.check_exhausted()
            writer.close()
        except BaseException:
            writer.abort()
            raise
        if not writer.finished:
            raise UserError(f"{self.folder}: no documents left to write ({self.counts.summary()})")
        save_progress(self.folder, provenance, writer.finished, complete=True)
        shards = [f.shard for f in writer.finished]
        _install(self.folder, shards)
        tokenizer = {
            "name": self.tokenizer.files[0].name,
            "file": copy_tokenizer(self.tokenizer, self.folder),
            "sha256": digest(self.tokenizer),
        }
        size, eod_id = self.tokenizer.vocab_size, self.tokenizer.eod_id
        manifest = Manifest(tokenizer, size, dtype.name, eod_id, self.seed, self.counts.as_manifest(), shards)
        write_manifest(self.folder, manifest)
        return manifest


def _install(folder: Path, shards: Iterable[Shard]) -> None:
    """Replaces the old shards with the new. May be interrupted anywhere and repeated."""
    (folder / "manifest.json").unlink(missing_ok=True)  # a half-replaced set of shards must not look complete
    names = {name for shard in shards for name in shard.files}
    for path in shard_files(folder):
        if path.name not in names:
            path.unlink()
    for path in shard_files(folder, ".tmp"):
        path.replace(path.with_suffix(""))
    fsync_dir(folder)
