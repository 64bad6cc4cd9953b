"""A config's text to shards: by one program, or in parts, by several on one machine or on many.

Parts are made apart (`make_part`) and then joined (`join_parts`) to the shards that one program would have written.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig, load_config
from anarchobot.config.schema import Config
from anarchobot.data.corpus_parts import Parts, part_folder, remove_parts, write_part
from anarchobot.data.pretokenize import join, pretokenize, provenance
from anarchobot.data.resume import check_provenance, source_provenance
from anarchobot.data.shards import Manifest, read_manifest
from anarchobot.data.sources import files, hub
from anarchobot.data.sources.documents import Document, DocumentCounts, from_files, from_ranges, open_source
from anarchobot.data.sources.file_ranges import split_files
from anarchobot.tasks.launch import forward_signals
from anarchobot.tokenizers.fast_tokenizer import engine_name, select_engine
from anarchobot.tokenizers.tokenizer import Tokenizer, load_tokenizer

Say = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Corpus:
    """What the shards in `folder` are to be made of: `names` are files, folders, globs or a dataset; `counts` says what
    became of the documents read so far."""

    config: Config
    folder: Path
    tokenizer: Tokenizer
    names: list[str]
    documents: Iterator[Document]
    counts: DocumentCounts
    source: dict[str, Any]

    @property
    def made_of(self) -> dict[str, Any]:
        data, seed = self.config.data, self.config.train.seed
        return provenance(self.tokenizer, data.val_fraction, data.dedup, data.near_dedup, seed, self.source)


def open_corpus(
    loaded: LoadedConfig, inputs: list[str] | None, say: Say, warn: Say, part: tuple[int, int] | None = None
) -> Corpus:
    """`inputs` stand for data.dataset, where they are given; `part` k of n is read alone. Raises UserError when
    something is not there, or does not fit."""
    config = loaded.config
    folder, path = config.data.shard_dir, config.train.tokenizer_path
    if not isinstance(folder, str):
        raise UserError(
            f"{loaded.where('data.shard_dir')}: several folders: give the one to write to with --output DIR"
        )
    if path is None:
        raise UserError("which tokenizer? Give --tokenizer FILE, or set train.tokenizer_path")
    tokenizer = load_tokenizer(path)
    if "model.vocab_size" in loaded.sources and tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{loaded.where('model.vocab_size')}: {config.model.vocab_size}, but {path} has "
            f"{tokenizer.vocab_size} tokens: set model.vocab_size: {tokenizer.vocab_size}"
        )
    counts = DocumentCounts()
    names, documents = read(config, inputs, counts, warn) if part is None else _read_part(config, inputs, counts, part)
    tokenizer = select_engine(tokenizer, config.tokenizer.engine, config.tokenizer.on_mismatch, say)
    source = source_provenance(names, config.data) | {"tokenised with": engine_name(tokenizer)}
    return Corpus(config, Path(folder), tokenizer, names, documents, counts, source)


def read(config: Config, inputs: list[str] | None, counts: DocumentCounts, warn: Say) -> tuple[list[str], Iterator[Document]]:
    """The names of what is read, and its documents."""
    if inputs:
        return inputs, from_files(inputs, config.data, counts)
    name, documents = open_source(config.data, config.train.seed, counts, warn=warn)
    dataset = config.data.dataset
    return [name] if name == "builtin" or not isinstance(dataset, list) else dataset, documents


def _read_part(
    config: Config, inputs: list[str] | None, counts: DocumentCounts, part: tuple[int, int]
) -> tuple[list[str], Iterator[Document]]:
    dataset = inputs or config.data.dataset or []
    names = [dataset] if isinstance(dataset, str) else dataset
    streams = [name for name in names if name == "builtin" or hub.is_hub_name(name)]
    if not names or streams or (config.data.weights and not inputs):
        what = (
            "data.weights mixes documents one by one" if names and not streams else f"{', '.join(streams) or 'nothing'}"
        )
        raise UserError(f"only files can be read in parts, and here is {what}: name files, or leave the parts out")
    spans = split_files(files.find(names), part[1], config.data)[part[0]]
    return names, from_ranges(spans, names, config.data, counts)


def make_shards(corpus: Corpus, *, restart: bool, progress: Progress, say: Say) -> Manifest:
    """Raises UserError and BlockingIOError as data/pretokenize.py says."""
    data = corpus.config.data
    return pretokenize(
        corpus.documents,
        corpus.tokenizer,
        corpus.folder,
        counts=corpus.counts,
        val_fraction=data.val_fraction,
        num_workers=data.num_workers,
        dedup=data.dedup,
        near_dedup=data.near_dedup,
        seed=corpus.config.train.seed,
        source=corpus.source,
        restart=restart,
        progress=progress,
        say=say,
    )


def is_made(corpus: Corpus) -> bool:
    """Whether the shards are there, whole. Raises UserError when they are, or were begun, of something else."""
    check_provenance(corpus.folder, corpus.made_of)
    return (corpus.folder / "manifest.json").exists()


def make_part(corpus: Corpus, part: int, parts: int) -> bool:
    """Tokenises part k of n, counted from 0; False when that was done before."""
    data = corpus.config.data
    return write_part(
        corpus.documents,
        corpus.tokenizer,
        part_folder(corpus.folder, part, parts),
        counts=corpus.counts,
        made_of=corpus.made_of,
        val_fraction=data.val_fraction,
        dedup=data.dedup,
        num_workers=data.num_workers,
    )


def join_parts(corpus: Corpus, parts: int, *, restart: bool, progress: Progress, say: Say) -> Manifest:
    """What is joined already is left as it is. Raises UserError when a part is missing, damaged or made of something
    else, and as `make_shards`."""
    data = corpus.config.data
    if is_made(corpus) and not restart:
        remove_parts(corpus.folder, parts)
        return read_manifest(corpus.folder)
    return join(
        Parts(corpus.folder, parts, corpus.made_of),
        corpus.tokenizer,
        corpus.folder,
        counts=corpus.counts,
        made_of=corpus.made_of,
        dedup=data.dedup,
        near_dedup=data.near_dedup,
        seed=corpus.config.train.seed,
        restart=restart,
        progress=progress,
        say=say,
    )


@dataclass(frozen=True)
class PartOfPretokenize:
    """A step for the pipeline of datatrove's executors (LocalPipelineExecutor, SlurmPipelineExecutor,
    RayPipelineExecutor): each of its tasks makes the part of its rank. Join them with `--join TASKS`. `settings` are
    KEY=VALUE words."""

    config: str
    settings: tuple[str, ...] = ()

    def __call__(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        loaded = load_config(self.config, self.settings)
        corpus = open_corpus(loaded, None, print, print, (rank, world_size))
        make_part(corpus, rank, world_size)


def in_processes(command: Sequence[str], processes: int) -> int:
    """Runs `command --part k/n` for all n parts at once; returns the first exit code that is not 0, for which the
    others are ended: what they say of it is on stderr already."""
    running = [
        subprocess.Popen(
            [*command, "--part", f"{part}/{processes}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # so that a Ctrl-C reaches each once, from here
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
    # Those that were ended for another's sake come after it.
    part, code = min(failed, key=lambda found: found[1] == -signal.SIGTERM, default=(0, 0))
    if code < 0:
        told = f"part {part}/{processes} was ended by {signal.Signals(-code).name}: the same command goes on from there"
        print(f"anarchobot: {told}", file=sys.stderr)
        return 1
    return code
