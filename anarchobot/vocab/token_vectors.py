"""A vector for each token id, learned from texts as a tokenizer cuts them: tokens are near that stand among the same.

CBOW with negative samples (Mikolov et al., 2013), by gensim; fastText's is the same without its pieces of words, for an
id has none.
"""

import importlib
import logging
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.tokenizer import Ids, Tokenizer

SENTENCE_TOKENS = 1000  # gensim passes over what is behind 10,000
UNIT_LINES = 4096

Vectors = npt.NDArray[np.float32]


class Learning(NamedTuple):
    """How vectors are learned; `threads` None: one a core. With one thread they are a function of text and seed."""

    backend: Literal["fasttext", "word2vec"] = "fasttext"
    dim: int = 100
    window: int = 5
    negative: int = 10
    epochs: int = 30
    mincount: int = 1
    lr: float = 0.05
    threads: int | None = None


def token_sentences(texts: Iterable[str], tokenizer: Tokenizer, min_line_length: int) -> Iterator[Ids]:
    """The ids of each line of at least so many characters; long ones in parts of SENTENCE_TOKENS."""
    lines: list[str] = []
    for text in texts:
        lines += [line for line in text.split("\n") if len(line) >= min_line_length]
        if len(lines) >= UNIT_LINES:
            yield from _cut(lines, tokenizer)
            lines = []
    yield from _cut(lines, tokenizer)


def _cut(lines: list[str], tokenizer: Tokenizer) -> Iterator[Ids]:
    for ids in tokenizer.encode_batch(lines):
        yield from (ids[at : at + SENTENCE_TOKENS] for at in range(0, len(ids), SENTENCE_TOKENS))


class _Sentences:
    """Sentences of ids as gensim wants them, lists of words, again and again; kept in a file, four bytes an id."""

    def __init__(self, sentences: Iterable[Ids], vocab_size: int, file: IO[bytes]) -> None:
        self._file, self._lengths = file, array("i")
        self._names = [str(i) for i in range(vocab_size)]
        self.counts = np.zeros(vocab_size, np.int64)
        for ids in sentences:
            file.write(ids.astype(np.int32).tobytes())
            self._lengths.append(len(ids))
            np.add.at(self.counts, ids, 1)

    def __iter__(self) -> Iterator[list[str]]:
        names = self._names
        self._file.seek(0)
        for length in self._lengths:
            yield [names[i] for i in np.frombuffer(self._file.read(4 * length), np.int32).tolist()]


def learn_vectors(
    sentences: Iterable[Ids], vocab_size: int, learning: Learning, seed: int, scratch: Path
) -> tuple[Vectors, npt.NDArray[np.int64]]:
    """Vectors [V, dim], zeros for ids that come fewer than `mincount` times, and how often each id comes [V].
    The ids are in a file in `scratch` meanwhile.

    Raises UserError when gensim is not installed, or no id comes often enough.
    """
    try:
        models: Any = importlib.import_module("gensim.models")
    except ImportError as error:
        raise UserError("token vectors need gensim: pip install 'anarchobot[vocab]'") from error
    logging.getLogger("gensim").setLevel(logging.ERROR)
    with TemporaryFile(dir=scratch) as file:
        corpus = _Sentences(sentences, vocab_size, file)
        return _learnt(models, corpus, learning, seed), corpus.counts


def _learnt(models: Any, corpus: _Sentences, learning: Learning, seed: int) -> Vectors:
    counts = corpus.counts
    if counts.max(initial=0) < learning.mincount:
        raise UserError(
            f"embedding: no token comes {learning.mincount} times in the text: give more, or lower mincount"
        )
    settings: dict[str, Any] = {
        "vector_size": learning.dim, "window": learning.window, "negative": learning.negative, "sg": 0,
        "epochs": learning.epochs, "min_count": learning.mincount, "alpha": learning.lr, "sample": 1e-4,
        "workers": learning.threads or os.cpu_count() or 1, "seed": seed, "sentences": corpus,
    }  # fmt: skip
    if learning.backend == "fasttext":
        found = models.FastText(**settings, min_n=1, max_n=0, bucket=1).wv  # no pieces of an id's digits
    else:
        found = models.Word2Vec(**settings).wv
    vectors = np.zeros((len(counts), learning.dim), np.float32)
    ids = np.array([int(name) for name in found.index_to_key])
    vectors[ids] = found.vectors
    return vectors
