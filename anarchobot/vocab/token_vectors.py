"""Trains a vector for each token id of a tokenized text, so that tokens in similar contexts have similar vectors.

CBOW with negative sampling (Mikolov et al., 2013), by gensim. FastText is used without subwords, since ids have none.
"""

import importlib
import logging
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.tokenizer import Ids, Tokenizer

MAX_SENTENCE_TOKENS = 1000  # gensim ignores everything after 10,000
LINES_PER_BATCH, SENTENCES_PER_REPORT = 4096, 1024

Progress = Callable[[float], None]
Vectors = npt.NDArray[np.float32]


class VectorSettings(NamedTuple):
    """Training settings. `threads` None: one per core. The vectors are reproducible only with one thread."""

    backend: Literal["fasttext", "word2vec"] = "fasttext"
    dim: int = 100
    window: int = 5
    negative: int = 10
    epochs: int = 30
    mincount: int = 1
    lr: float = 0.05
    threads: int | None = None


def token_sentences(texts: Iterable[str], tokenizer: Tokenizer, min_line_length: int) -> Iterator[Ids]:
    """Yields the ids of each line with at least `min_line_length` characters, split after MAX_SENTENCE_TOKENS."""
    lines: list[str] = []
    for text in texts:
        lines += [line for line in text.split("\n") if len(line) >= min_line_length]
        if len(lines) >= LINES_PER_BATCH:
            yield from _tokenize(lines, tokenizer)
            lines = []
    yield from _tokenize(lines, tokenizer)


def _tokenize(lines: list[str], tokenizer: Tokenizer) -> Iterator[Ids]:
    for ids in tokenizer.encode_batch(lines):
        yield from (ids[at : at + MAX_SENTENCE_TOKENS] for at in range(0, len(ids), MAX_SENTENCE_TOKENS))


class _Sentences:
    """Restartable iterable of sentences in gensim's form, lists of strings. Stored in a file, 4 bytes per id. gensim
    reads them once to count the ids and once per epoch: `progress` is called with the number of passes so far."""

    def __init__(self, sentences: Iterable[Ids], vocab_size: int, file: IO[bytes], progress: Progress) -> None:
        self._file, self._lengths = file, array("i")
        self._progress, self._passes = progress, 0
        self._names = [str(i) for i in range(vocab_size)]
        self.counts = np.zeros(vocab_size, np.int64)
        for ids in sentences:
            file.write(ids.astype(np.int32).tobytes())
            self._lengths.append(len(ids))
            np.add.at(self.counts, ids, 1)

    def __iter__(self) -> Iterator[list[str]]:
        names = self._names
        self._file.seek(0)
        for number, length in enumerate(self._lengths, 1):
            yield [names[i] for i in np.frombuffer(self._file.read(4 * length), np.int32).tolist()]
            if number % SENTENCES_PER_REPORT == 0:
                self._progress(self._passes + number / len(self._lengths))
        self._passes += 1
        self._progress(self._passes)


def train_vectors(
    sentences: Iterable[Ids],
    vocab_size: int,
    settings: VectorSettings,
    seed: int,
    scratch: Path,
    progress: Progress = lambda fraction: None,
) -> tuple[Vectors, npt.NDArray[np.int64]]:
    """Returns vectors [V, dim], zero for ids with fewer than `mincount` occurrences, and the counts [V] of the ids.

    The ids are kept in a temporary file in `scratch`. Once they are there, `progress` is called with the fraction of
    the work that is done. Raises UserError if gensim is not installed or no id is frequent
    enough.
    """
    try:
        models: Any = importlib.import_module("gensim.models")
    except ImportError as error:
        raise UserError("token vectors require gensim: pip install 'anarchobot[vocab]'") from error
    logging.getLogger("gensim").setLevel(logging.ERROR)
    with TemporaryFile(dir=scratch) as file:
        corpus = _Sentences(sentences, vocab_size, file, lambda passes: progress(passes / (1 + settings.epochs)))
        return _train(models, corpus, settings, seed), corpus.counts


def _train(models: Any, corpus: _Sentences, settings: VectorSettings, seed: int) -> Vectors:
    counts = corpus.counts
    if counts.max(initial=0) < settings.mincount:
        raise UserError(
            f"embedding: no token occurs {settings.mincount} times in the text: use more text, or lower "
            "embedding.fasttext.mincount"
        )
    arguments: dict[str, Any] = {
        "vector_size": settings.dim, "window": settings.window, "negative": settings.negative, "sg": 0,
        "epochs": settings.epochs, "min_count": settings.mincount, "alpha": settings.lr, "sample": 1e-4,
        "workers": settings.threads or os.cpu_count() or 1, "seed": seed, "sentences": corpus,
    }  # fmt: skip
    if settings.backend == "fasttext":
        trained = models.FastText(**arguments, min_n=1, max_n=0, bucket=1).wv  # no subwords
    else:
        trained = models.Word2Vec(**arguments).wv
    vectors = np.zeros((len(counts), settings.dim), np.float32)
    ids = np.array([int(name) for name in trained.index_to_key])
    vectors[ids] = trained.vectors
    return vectors
