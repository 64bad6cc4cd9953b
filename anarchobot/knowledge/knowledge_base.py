"""A knowledge base: files split into passages, search over them, and user feedback on the results.

Everything is stored in one SQLite file (database.py). A document is one file; it is added, replaced or removed in one
transaction.
"""

import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Self

from anarchobot.config.errors import UserError, did_you_mean
from anarchobot.config.schema import DataConfig, KnowledgeBaseConfig
from anarchobot.data.sources.documents import DocumentCounts
from anarchobot.data.sources.files import EmptyFile, Unread, UnreadableFile
from anarchobot.knowledge.database import KnowledgeBaseError, open_database, transaction, translate_errors
from anarchobot.knowledge.embeddings import Encoder, VectorIndex, remove_vectors
from anarchobot.knowledge.retrieval import (
    MAX_MATCHES,
    MAX_TERMS,
    NUM_CANDIDATES,
    fts_query,
    fuse,
    idf,
    question_similarity,
    rank_passages,
    relevance,
)
from anarchobot.knowledge.text import index_text, read_texts, search_terms, split_passages
from anarchobot.storage.durable import sha256_file

Outcome = Literal["added", "replaced", "equal"]


class Hit(NamedTuple):
    """A search result. `source` is the file, or file and row; `score`, from 0 to 2, is defined in retrieval.py."""

    passage_id: int
    text: str
    source: str
    score: float


class Document(NamedTuple):
    name: str
    passages: int
    votes: int  # on its current passages


class KnowledgeBase:
    """An open knowledge base; a context manager. `create` creates the file if there is none.

    With an `encoder`, passages are also searched by their embeddings. `rebuild` removes those that exist; otherwise
    they must be of the same model. The constructor and every method raise KnowledgeBaseError (a UserError) if the file
    is missing, corrupt or locked, or has embeddings of another model.
    """

    def __init__(
        self,
        path: str | Path,
        settings: KnowledgeBaseConfig,
        create: bool = False,
        encoder: Encoder | None = None,
        rebuild: bool = False,
    ) -> None:
        self._path, self._settings = Path(path), settings
        self._vectors: VectorIndex | None = None
        self._database = open_database(self._path, create)
        try:
            if rebuild:
                with translate_errors(self._path):
                    remove_vectors(self._database)
            if encoder is not None:
                self._vectors = VectorIndex(self._database, self._path, encoder)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    # --- Documents

    def add(self, path: Path, data: DataConfig, counts: DocumentCounts) -> Outcome:
        """Adds a file under the name `path`, atomically. A document of that name is replaced, or left unchanged if the
        file's bytes and `data.text_field` are the same.

        Passages with unchanged text keep their ids, and so their votes. Raises UserError if the file has no text or is
        not supported, OSError if it cannot be read.
        """
        if not str(path).isprintable():
            raise UserError(f"{path}: the file name has unprintable characters; rename the file")
        digest = sha256_file(path)  # before reading: if the file grows meanwhile, the next `add` picks up the rest
        with translate_errors(self._path), transaction(self._database, "IMMEDIATE"):
            query = "SELECT id, sha256, text_field FROM documents WHERE name = ?"
            existing = self._database.execute(query, (str(path),)).fetchone()
            if existing and existing[1:] == (digest, data.text_field):
                return "equal"
            if existing:
                document = int(existing[0])
                changed = (digest, data.text_field, document)
                self._database.execute("UPDATE documents SET sha256 = ?, text_field = ? WHERE id = ?", changed)
            else:
                insert = "INSERT INTO documents (name, sha256, text_field) VALUES (?, ?, ?)"
                document = _row_id(self._database.execute(insert, (str(path), digest, data.text_field)))
            self._update_passages(path, document, data, counts)
        return "replaced" if existing else "added"

    def _update_passages(self, path: Path, document: int, data: DataConfig, counts: DocumentCounts) -> None:
        old_ids: dict[bytes, list[int]] = {}
        for number, text in self._passages_of(document):
            old_ids.setdefault(_digest(text), []).append(number)
        any_text = False
        for source, text in read_texts(path, data, counts):
            any_text = True
            for passage in split_passages(text):
                if same := old_ids.get(_digest(passage)):
                    self._database.execute("UPDATE passages SET source = ? WHERE id = ?", (source, same.pop(0)))
                else:
                    self._insert(document, source, passage)
        if not any_text:
            raise UserError(f"{path}: no text to add: {'; '.join(counts.details())}")
        self._delete([number for ids in old_ids.values() for number in ids])

    def _passages_of(self, document: int) -> sqlite3.Cursor:
        return self._database.execute("SELECT id, text FROM passages WHERE document = ? ORDER BY id", (document,))

    def _insert(self, document: int, source: str, passage: str) -> None:
        insert = "INSERT INTO passages (document, source, text) VALUES (?, ?, ?)"
        number = _row_id(self._database.execute(insert, (document, source, passage)))
        self._database.execute("INSERT INTO passage_words (rowid, text) VALUES (?, ?)", (number, index_text(passage)))

    def _delete(self, numbers: Sequence[int]) -> None:
        """A contentless FTS5 index needs the original text to delete an entry."""
        delete = "INSERT INTO passage_words (passage_words, rowid, text) VALUES ('delete', ?, ?)"
        for number in numbers:
            self._database.execute(delete, (number, index_text(self._passage(number)[0])))
            self._database.execute("DELETE FROM passages WHERE id = ?", (number,))

    def _passage(self, number: int) -> tuple[str, str]:
        """Text and source of a passage that the index or a document refers to."""
        row = self._database.execute("SELECT text, source FROM passages WHERE id = ?", (number,)).fetchone()
        if row is None or not all(isinstance(text, str) for text in row):
            raise sqlite3.DatabaseError(f"passage {number} is missing")
        return row[0], row[1]

    def remove(self, name: str) -> int:
        """Removes a document and returns its number of passages. Raises UserError if there is none of this name."""
        with translate_errors(self._path), transaction(self._database, "IMMEDIATE"):
            document = self._database.execute("SELECT id FROM documents WHERE name = ?", (name,)).fetchone()
            if document is None:
                near = did_you_mean(name, [document.name for document in self.documents()])
                raise UserError(f"{self._path}: no document '{name}'{near or '; list them with: anarchobot kb list'}")
            numbers = [number for number, _ in self._passages_of(document[0])]
            self._delete(numbers)
            self._database.execute("DELETE FROM documents WHERE id = ?", document)
        return len(numbers)

    def documents(self) -> list[Document]:
        """All documents, sorted by name."""
        with translate_errors(self._path):
            rows = self._database.execute(
                """SELECT name, count(*), sum((SELECT count(*) FROM feedback WHERE passage = passages.id))
                FROM documents JOIN passages ON document = documents.id GROUP BY documents.id ORDER BY name"""
            )
            documents = [Document(*row) for row in rows]
            if not all(isinstance(document.name, str) for document in documents):
                raise sqlite3.DatabaseError("a document's name is missing")
        return documents

    # --- Embeddings

    def without_embedding(self) -> int:
        """The number of passages that only a search by keyword finds; 0 without an encoder."""
        return 0 if self._vectors is None else self._vectors.missing()

    def embed(self) -> Iterator[int]:
        """Embeds the passages that have no embedding yet, and yields the number of each batch; none without an
        encoder."""
        return iter(()) if self._vectors is None else self._vectors.embed()

    # --- Search

    def search(self, question: str, k: int | None = None) -> list[Hit]:
        """The best `k` passages (default: `retrieval_k`), best first: those that share a word with the question and,
        with an encoder, those with the most similar embeddings."""
        k = self._settings.retrieval_k if k is None else k
        with translate_errors(self._path), transaction(self._database, "DEFERRED"):
            counts = self._passage_counts(question)
            # The inner limit only takes effect if even the question's rarest word matches that many passages.
            select = """SELECT number, bm25 FROM (
                SELECT rowid AS number, -rank AS bm25 FROM passage_words WHERE passage_words MATCH ? LIMIT ?
            ) ORDER BY bm25 DESC LIMIT ?"""
            candidates, match = max(k, NUM_CANDIDATES), fts_query(counts)
            rows = self._database.execute(select, (match, MAX_MATCHES, candidates)).fetchall() if match else []
            values: dict[int, float] = dict(rows)
            if self._vectors is not None:
                values = fuse(values, self._vectors.nearest(question, candidates))
            hits = []
            for number, score in rank_passages(values, self._relevances(counts, list(values)))[:k]:
                text, source = self._passage(number)
                hits.append(Hit(number, text, source, score))
        return hits

    def _passage_counts(self, question: str) -> dict[str, int]:
        """For each term of a question, the number of passages that contain it, counted up to MAX_MATCHES + 1."""
        count = "SELECT count(*) FROM (SELECT 1 FROM passage_words WHERE passage_words MATCH ? LIMIT ?)"
        return {
            term: int(self._database.execute(count, (f'"{term}"', MAX_MATCHES + 1)).fetchone()[0])
            for term in search_terms(question)[:MAX_TERMS]
        }

    # --- Feedback

    def feedback(self, question: str, passage_ids: Sequence[int], reward: float) -> None:
        """Appends a vote on each passage to the log: 1.0 if it helped with this question, -1.0 if not.

        Raises UserError if a passage does not exist.
        """
        if reward not in (1.0, -1.0):
            raise ValueError(f"reward {reward}: expected 1.0 or -1.0")
        now, question = time.time(), question.encode(errors="replace").decode()
        with translate_errors(self._path), transaction(self._database, "IMMEDIATE"):
            for number in dict.fromkeys(passage_ids):
                if (
                    number.bit_length() > 63
                    or not self._database.execute("SELECT 1 FROM passages WHERE id = ?", (number,)).fetchone()
                ):
                    raise UserError(f"{self._path}: no passage {number}; find passage IDs with: anarchobot kb search")
                vote = "INSERT INTO feedback (time, question, passage, reward) VALUES (?, ?, ?, ?)"
                self._database.execute(vote, (now, question, number, reward))

    def relevances(self, question: str, passage_ids: Sequence[int]) -> dict[int, float]:
        """The relevance of passages to a question according to the vote log (see retrieval.py)."""
        with translate_errors(self._path), transaction(self._database, "DEFERRED"):
            return self._relevances(self._passage_counts(question), passage_ids)

    def _relevances(self, counts: dict[str, int], passage_ids: Sequence[int]) -> dict[int, float]:
        select = "SELECT question, reward FROM feedback WHERE passage = ? ORDER BY id"
        votes = {number: self._database.execute(select, (number,)).fetchall() for number in passage_ids}
        if not any(votes.values()):
            return dict.fromkeys(passage_ids, 0.0)
        (total,) = self._database.execute("SELECT count(*) FROM passages").fetchone()
        weights = {term: idf(count, total, MAX_MATCHES) for term, count in counts.items()}
        questions = {question for log in votes.values() for question, _ in log}
        similarity = {q: question_similarity(weights, search_terms(q)[:MAX_TERMS]) for q in questions}
        return {
            number: relevance([(reward, similarity[q]) for q, reward in log], self._settings.feedback_alpha)
            for number, log in votes.items()
        }


def _row_id(cursor: sqlite3.Cursor) -> int:
    assert cursor.lastrowid is not None  # it was an INSERT
    return cursor.lastrowid


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


_OUTCOMES = {"added": "added", "replaced": "changed, replaced", "equal": "unchanged, skipped"}


@dataclass
class AddResult:
    """Outcome of `add_files`, per file; `counts` is about their texts."""

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # one-line error messages
    counts: DocumentCounts = field(default_factory=DocumentCounts)


def add_files(
    base: KnowledgeBase, paths: Iterable[Path], named: Iterable[str], data: DataConfig, log: Callable[[str], None]
) -> AddResult:
    """Adds files. A file that fails does not stop the others. Unless it is in `named`, a file that is
    empty or unreadable (`UnreadableFile`) is counted, not a failure.

    Raises KnowledgeBaseError if the knowledge base itself fails; the files before it have been added.
    """
    result, required = AddResult(), {Path(name) for name in named}
    for path in paths:
        try:
            outcome = base.add(path, data, result.counts)
        except KnowledgeBaseError:
            raise
        except EmptyFile as error:
            if path in required:
                result.failed.append(str(error))
            else:
                result.counts.empty_files += 1
                result.counts.first_empty = result.counts.first_empty or str(path)
        except UnreadableFile as error:
            if path in required:
                result.failed.append(str(error))
            else:
                result.counts.unread.append(Unread(str(path), error.kind))
        except UserError as error:
            result.failed.append(str(error))
        except OSError as error:
            result.failed.append(f"{path}: cannot be read: {error.strerror}")
        else:
            getattr(result, outcome).append(str(path))
            log(f"{path}: {_OUTCOMES[outcome]}")
    return result


def prompt_with_passages(question: str, hits: Sequence[Hit]) -> str:
    """The question preceded by its search results, numbered, best first; without results, just the question."""
    if not hits:
        return question
    passages = "\n\n".join(f"[{i}] {hit.source}\n{hit.text.strip()}" for i, hit in enumerate(hits, start=1))
    return f"Passages that may help:\n\n{passages}\n\nQuestion: {question}"
