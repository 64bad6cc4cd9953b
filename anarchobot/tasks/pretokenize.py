"""Builds token shards from a config: in one process, or in parts by several processes on one or many machines.

Parts are written independently (`Corpus.write_part`) and joined (`Corpus.join`) into the same shards that one process
would write.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig, load_config
from anarchobot.config.schema import Config
from anarchobot.data.corpus_parts import join_parts, remove_parts, write_part
from anarchobot.data.pretokenize import Pretokenizer
from anarchobot.data.resume import is_complete, source_provenance
from anarchobot.data.shards import Manifest, read_manifest
from anarchobot.data.sources import files, hub
from anarchobot.data.sources.documents import (
    Document,
    DocumentCounts,
    from_files,
    from_ranges,
    open_source,
    total_bytes,
)
from anarchobot.data.sources.files import split_files
from anarchobot.tokenizers.fast_tokenizer import engine_name, select_engine
from anarchobot.tokenizers.tokenizer import Tokenizer, load_tokenizer
from anarchobot.training.signals import forward_signals

Log = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Corpus:
    """`names` are files, folders, globs or datasets."""

    names: list[str]
    documents: Iterator[Document]
    job: Pretokenizer

    def is_done(self) -> bool:
        """Whether the shards are complete. Raises UserError when the folder holds shards of a different provenance."""
        return is_complete(self.job.folder, self.job.provenance)

    def pretokenize(self, *, restart: bool, progress: Progress, log: Log) -> Manifest:
        return replace(self.job, restart=restart, progress=progress, log=log).run(self.documents)

    def write_part(self, part: int, parts: int) -> bool:
        """Pretokenizes part k of n, counted from 0; returns False when it already exists."""
        return write_part(self.job, self.documents, part, parts)

    def join(self, parts: int, *, restart: bool, progress: Progress, log: Log) -> Manifest:
        """Joins all parts, unless the shards are already complete.

        Raises UserError when a part is missing, damaged or of a different provenance.
        """
        if not restart and self.is_done():
            remove_parts(self.job.folder, parts)
            return read_manifest(self.job.folder)
        return join_parts(replace(self.job, restart=restart, progress=progress, log=log), parts)


def open_corpus(
    loaded: LoadedConfig, inputs: list[str] | None, log: Log, warn: Log, part: tuple[int, int] | None = None
) -> Corpus:
    """Opens `inputs`, or data.dataset when there are none; with `part` (k, n), only part k of n.

    Raises UserError when something is missing or inconsistent.
    """
    config = loaded.config
    folder, path = config.data.shard_dir, config.train.tokenizer_path
    if not isinstance(folder, str):
        raise UserError(f"{loaded.where('data.shard_dir')}: expected one folder to write to: set it with --output DIR")
    if path is None:
        raise UserError("missing tokenizer: give --tokenizer FILE, or set train.tokenizer_path")
    tokenizer: Tokenizer = load_tokenizer(path)
    if "model.vocab_size" in loaded.sources and tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{loaded.where('model.vocab_size')}: {config.model.vocab_size}, but {path} has "
            f"{tokenizer.vocab_size} tokens: set model.vocab_size: {tokenizer.vocab_size}"
        )
    counts = DocumentCounts()
    names, documents = (
        open_documents(config, inputs, counts, warn) if part is None else _open_part(config, inputs, counts, part)
    )
    settings = config.tokenizer
    tokenizer = select_engine(tokenizer, settings.engine, settings.on_mismatch, log, total_bytes(names))
    source = source_provenance(names, config.data) | {"tokenised with": engine_name(tokenizer)}
    job = Pretokenizer(
        tokenizer,
        Path(folder),
        val_fraction=config.data.val_fraction,
        num_workers=config.data.num_workers,
        dedup=config.data.dedup,
        near_dedup=config.data.near_dedup,
        seed=config.train.seed,
        counts=counts,
        source=source,
    )
    return Corpus(names, documents, job)


def open_documents(
    config: Config, inputs: list[str] | None, counts: DocumentCounts, warn: Log
) -> tuple[list[str], Iterator[Document]]:
    """Returns the names of the sources, and their documents."""
    if inputs:
        return inputs, from_files(inputs, config.data, counts)
    name, documents = open_source(config.data, config.train.seed, counts, warn=warn)
    return [name] if name == "builtin" else config.data.datasets, documents


def _open_part(
    config: Config, inputs: list[str] | None, counts: DocumentCounts, part: tuple[int, int]
) -> tuple[list[str], Iterator[Document]]:
    names = inputs or config.data.datasets
    streams = [name for name in names if name == "builtin" or hub.is_hub_name(name)]
    if not names or streams or (config.data.weights and not inputs):
        reason = (
            "data.weights interleaves documents"
            if names and not streams
            else f"the dataset is {', '.join(streams) or 'not set'}"
        )
        raise UserError(f"only files can be read in parts, but {reason}: name files, or drop --part and --processes")
    ranges = split_files(files.find(names), part[1], config.data)[part[0]]
    return names, from_ranges(ranges, names, config.data, counts)


@dataclass(frozen=True)
class PartOfPretokenize:
    """A pipeline step for datatrove's executors (LocalPipelineExecutor, SlurmPipelineExecutor, RayPipelineExecutor):
    each task writes the part of its rank. Join the parts with `--join TASKS`. `settings` are KEY=VALUE overrides."""

    config: str
    settings: tuple[str, ...] = ()

    def __call__(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        loaded = load_config(self.config, self.settings)
        open_corpus(loaded, None, print, print, (rank, world_size)).write_part(rank, world_size)


def run_part_processes(command: Sequence[str], processes: int) -> int:
    """Runs `command --part k/n` for all n parts at once and returns the first nonzero exit code.

    If a process fails, the others are terminated; the failing one has already reported on stderr.
    """
    running = [
        subprocess.Popen(
            [*command, "--part", f"{part}/{processes}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C reaches each process once, forwarded from here
        )
        for part in range(processes)
    ]
    try:
        with forward_signals(running):
            while any(process.poll() is None for process in running) and not any(p.poll() for p in running):
                time.sleep(0.05)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
        for process in running:
            process.wait()
    failed = [(part, process.returncode) for part, process in enumerate(running) if process.returncode]
    # Prefer a process that failed by itself to one that was terminated here.
    part, code = min(failed, key=lambda failure: failure[1] == -signal.SIGTERM, default=(0, 0))
    if code < 0:
        name = signal.Signals(-code).name
        print(
            f"anarchobot: part {part}/{processes} was killed by {name}: resume with the same command", file=sys.stderr
        )
        return 1
    return code
