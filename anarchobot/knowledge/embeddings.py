"""The optional second index of a knowledge base: an embedding of each passage, in the same SQLite file.

A vector is stored as float16 (2 bytes per dimension) and searched by comparing the question with all of them: for
100,000 passages, one product of 150 MB in memory, which takes less time than the search by keyword.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from anarchobot.knowledge.database import KnowledgeBaseError, transaction, translate_errors

BATCH = 256  # passages per transaction

Float32 = npt.NDArray[np.float32]


class Encoder(Protocol):
    """Texts to vectors of length 1 (inference/text_encoder.py). Vectors of the same `digest` can be compared."""

    name: str
    digest: str
    dimensions: int

    def encode_passages(self, texts: Sequence[str]) -> Float32:
        """[texts, dimensions]"""

    def encode_question(self, text: str) -> Float32:
        """[dimensions]"""


# The trigger keeps the vectors of existing passages only, also when an AnarchoBot without this index removes some.
_SCHEMA = (
    "CREATE TABLE embedding_model (name TEXT NOT NULL, digest TEXT NOT NULL)",
    "CREATE TABLE passage_vectors (passage INTEGER PRIMARY KEY, vector BLOB NOT NULL)",
    """CREATE TRIGGER vector_is_removed_with_its_passage AFTER DELETE ON passages
        BEGIN DELETE FROM passage_vectors WHERE passage = old.id; END""",
)


class VectorIndex:
    """The vectors of an open knowledge base. Raises KnowledgeBaseError if they are those of another model."""

    def __init__(self, database: sqlite3.Connection, path: Path, encoder: Encoder) -> None:
        self._database, self._path, self._encoder = database, path, encoder
        self._loaded: tuple[tuple[int, int], npt.NDArray[np.int64], Float32] | None = None
        with translate_errors(path):
            self._check_model()

    def _exists(self) -> bool:
        query = "SELECT 1 FROM sqlite_master WHERE name = 'passage_vectors'"
        return self._database.execute(query).fetchone() is not None

    def _check_model(self) -> None:
        row = self._database.execute("SELECT name, digest FROM embedding_model").fetchone() if self._exists() else None
        if row is not None and row[1] != self._encoder.digest:
            raise KnowledgeBaseError(
                f"{self._path}: embedded with {row[0]}, not with this version of {self._encoder.name}: use that model, "
                "or rebuild with: anarchobot kb embed --rebuild"
            )

    def missing(self) -> int:
        """The number of passages without a vector."""
        with translate_errors(self._path), transaction(self._database, "DEFERRED"):
            (passages,) = self._database.execute("SELECT count(*) FROM passages").fetchone()
            if not self._exists():
                return int(passages)
            # Every vector belongs to a passage. Counted by rowid: without reading the vectors.
            with_vector = "SELECT count(*) FROM passages WHERE id IN (SELECT passage FROM passage_vectors)"
            return int(passages) - int(self._database.execute(with_vector).fetchone()[0])

    def embed(self) -> Iterator[int]:
        """Adds the missing vectors, in transactions of BATCH passages, and yields the number after each one. It can be
        interrupted at any time; the next call continues."""
        with translate_errors(self._path):
            with transaction(self._database, "IMMEDIATE"):
                if not self._exists():
                    for statement in _SCHEMA:
                        self._database.execute(statement)
                    model = (self._encoder.name, self._encoder.digest)
                    self._database.execute("INSERT INTO embedding_model (name, digest) VALUES (?, ?)", model)
            last = 0
            select = """SELECT id, text FROM passages
                WHERE id > ? AND NOT EXISTS (SELECT 1 FROM passage_vectors WHERE passage = id) ORDER BY id LIMIT ?"""
            while rows := self._database.execute(select, (last, BATCH)).fetchall():
                last = rows[-1][0]
                vectors = self._encoder.encode_passages([text for _, text in rows]).astype("<f2")
                with transaction(self._database, "IMMEDIATE"):
                    self._check_model()  # another process may have rebuilt the index, or removed a passage
                    self._database.executemany(
                        """INSERT OR REPLACE INTO passage_vectors (passage, vector)
                        SELECT ?1, ?2 WHERE EXISTS (SELECT 1 FROM passages WHERE id = ?1)""",
                        [(number, vector.tobytes()) for (number, _), vector in zip(rows, vectors, strict=True)],
                    )
                yield len(rows)

    def nearest(self, question: str, count: int) -> list[int]:
        """The passages most similar to the question, best first. Inside a transaction."""
        numbers, vectors = self._load()
        similarities = vectors @ self._encoder.encode_question(question)
        best = np.argpartition(-similarities, count)[:count] if count < len(numbers) else np.arange(len(numbers))
        return [int(number) for number in numbers[best[np.lexsort((numbers[best], -similarities[best]))]]]

    def _load(self) -> tuple[npt.NDArray[np.int64], Float32]:
        """Passage ids and their vectors, from memory unless the knowledge base has changed."""
        (others,) = self._database.execute("PRAGMA data_version").fetchone()
        version = (int(others), self._database.total_changes)
        if self._loaded is None or self._loaded[0] != version:
            self._check_model()
            select = "SELECT passage, vector FROM passage_vectors ORDER BY passage"
            rows = self._database.execute(select).fetchall() if self._exists() else []
            size = 2 * self._encoder.dimensions
            if any(not isinstance(vector, bytes) or len(vector) != size for _, vector in rows):
                raise sqlite3.DatabaseError("a vector has the wrong size")
            vectors = np.frombuffer(b"".join(vector for _, vector in rows), "<f2").astype(np.float32)
            numbers = np.array([number for number, _ in rows], np.int64)
            self._loaded = version, numbers, vectors.reshape(len(rows), self._encoder.dimensions)
        return self._loaded[1:]


def remove_vectors(database: sqlite3.Connection) -> None:
    """Removes the index, for a rebuild with any model."""
    with transaction(database, "IMMEDIATE"):
        database.execute("DROP TRIGGER IF EXISTS vector_is_removed_with_its_passage")
        database.execute("DROP TABLE IF EXISTS passage_vectors")
        database.execute("DROP TABLE IF EXISTS embedding_model")
