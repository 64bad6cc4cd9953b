"""A knowledge base: files cut into passages, searched by the words of a question, and what people said of the finds.

All of it is one SQLite file (database.py). A document is one file, added, replaced or removed in one transaction.
"""

import hashlib
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

from anarchobot.config.errors import UserError, did_you_mean
from anarchobot.config.schema import DataConfig, KnowledgeBaseConfig
from anarchobot.data.sources.documents import Counts
from anarchobot.knowledge.database import open_database, told, transaction
from anarchobot.knowledge.passages import passages
from anarchobot.knowledge.ranking import CANDIDATES, MOST_PASSAGES, MOST_WORDS, query, ranked
from anarchobot.knowledge.reading import texts
from anarchobot.knowledge.relevance import nearness, relevance, weight
from anarchobot.knowledge.words import spaced, words
from anarchobot.storage.durable import sha256_file

Outcome = Literal["added", "replaced", "equal"]


class Hit(NamedTuple):
    """A passage that was found. `source` is its file, or file and row; `score`, from 0 to 2, is ranking.py's."""

    passage_id: int
    text: str
    source: str
    score: float


class Held(NamedTuple):
    """A document of the base."""

    name: str
    passages: int
    votes: int  # on the passages that it has now


class KnowledgeBase:
    """A context that holds the file open. `create` makes it where there is none.

    Raises database.BaseFault (a UserError) here and in every method when the file is none, damaged, locked for long...
    """

    def __init__(self, path: str | Path, settings: KnowledgeBaseConfig, create: bool = False) -> None:
        self._path, self._settings = Path(path), settings
        self._database = open_database(self._path, create)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    # What is in it

    def add(self, path: Path, data: DataConfig, counts: Counts) -> Outcome:
        """Adds a file, named as `path` is given; one of this name that was added before is replaced, or left as it is
        when its bytes (and `data.text_field`) are the same. Whole or not at all, whatever happens.

        Passages whose text stays keep their ids, and so their votes. Raises UserError when there is nothing to add or
        the file is not what reading.py takes, OSError when it can't be read.
        """
        if not str(path).isprintable():
            raise UserError(f"{path}: expected a name of printable characters: rename it")
        digest = sha256_file(path)  # before reading: of a file that grows meanwhile, the next `add` sees the rest
        with told(self._path), transaction(self._database, "IMMEDIATE"):
            asked = "SELECT id, sha256, text_field FROM documents WHERE name = ?"
            held = self._database.execute(asked, (str(path),)).fetchone()
            if held and held[1:] == (digest, data.text_field):
                return "equal"
            if held:
                document = int(held[0])
                changed = (digest, data.text_field, document)
                self._database.execute("UPDATE documents SET sha256 = ?, text_field = ? WHERE id = ?", changed)
            else:
                new = "INSERT INTO documents (name, sha256, text_field) VALUES (?, ?, ?)"
                document = _id(self._database.execute(new, (str(path), digest, data.text_field)))
            self._write(path, document, data, counts)
        return "replaced" if held else "added"

    def _write(self, path: Path, document: int, data: DataConfig, counts: Counts) -> None:
        before: dict[bytes, list[int]] = {}
        for number, text in self._of_document(document):
            before.setdefault(_digest(text), []).append(number)
        any_text = False
        for source, text in texts(path, data, counts):
            any_text = True
            for passage in passages(text):
                if same := before.get(_digest(passage)):
                    self._database.execute("UPDATE passages SET source = ? WHERE id = ?", (source, same.pop(0)))
                else:
                    self._insert(document, source, passage)
        if not any_text:
            raise UserError(f"{path}: no text to add: {'; '.join(counts.details())}")
        self._delete([number for left in before.values() for number in left])

    def _of_document(self, document: int) -> sqlite3.Cursor:
        return self._database.execute("SELECT id, text FROM passages WHERE document = ? ORDER BY id", (document,))

    def _insert(self, document: int, source: str, passage: str) -> None:
        new = "INSERT INTO passages (document, source, text) VALUES (?, ?, ?)"
        number = _id(self._database.execute(new, (document, source, passage)))
        self._database.execute("INSERT INTO passage_words (rowid, text) VALUES (?, ?)", (number, spaced(passage)))

    def _delete(self, numbers: Sequence[int]) -> None:
        """An entry leaves the index by the words that brought it in."""
        out = "INSERT INTO passage_words (passage_words, rowid, text) VALUES ('delete', ?, ?)"
        for number in numbers:
            self._database.execute(out, (number, spaced(self._passage(number)[0])))
            self._database.execute("DELETE FROM passages WHERE id = ?", (number,))

    def _passage(self, number: int) -> tuple[str, str]:
        """The text and the source of a passage that the index, or a document, says there is."""
        row = self._database.execute("SELECT text, source FROM passages WHERE id = ?", (number,)).fetchone()
        if row is None or not all(isinstance(text, str) for text in row):
            raise sqlite3.DatabaseError(f"passage {number} is missing")
        return row[0], row[1]

    def remove(self, name: str) -> int:
        """Takes a document out; returns how many passages it had. Raises UserError when there is none of this name."""
        with told(self._path), transaction(self._database, "IMMEDIATE"):
            held = self._database.execute("SELECT id FROM documents WHERE name = ?", (name,)).fetchone()
            if held is None:
                names = [held.name for held in self.documents()]
                raise UserError(f"{self._path}: holds no '{name}'{did_you_mean(name, names) or ' (see kb list)'}")
            numbers = [number for number, _ in self._of_document(held[0])]
            self._delete(numbers)
            self._database.execute("DELETE FROM documents WHERE id = ?", held)
        return len(numbers)

    def documents(self) -> list[Held]:
        """The documents, by name."""
        with told(self._path):
            found = self._database.execute(
                """SELECT name, count(*), sum((SELECT count(*) FROM feedback WHERE passage = passages.id))
                FROM documents JOIN passages ON document = documents.id GROUP BY documents.id ORDER BY name"""
            )
            held = [Held(*row) for row in found]
            if not all(isinstance(one.name, str) for one in held):
                raise sqlite3.DatabaseError("a document's name is missing")
        return held

    # What is found in it

    def search(self, question: str, k: int | None = None) -> list[Hit]:
        """The `k` passages (default: `retrieval_k`) that answer a question best, best first; fewer when no more share a
        word with it."""
        k = self._settings.retrieval_k if k is None else k
        with told(self._path), transaction(self._database, "DEFERRED"):
            holders = {word: self._holders(word) for word in words(question)[:MOST_WORDS]}
            if not (match := query(holders)):
                return []
            # The inner limit binds only where the rarest word of the question is that common.
            found = """SELECT number, bm25 FROM (
                SELECT rowid AS number, -rank AS bm25 FROM passage_words WHERE passage_words MATCH ? LIMIT ?
            ) ORDER BY bm25 DESC LIMIT ?"""
            bm25 = dict(self._database.execute(found, (match, MOST_PASSAGES, max(k, CANDIDATES))).fetchall())
            hits = []
            for number, score in ranked(bm25, self._relevances(holders, list(bm25)))[:k]:
                text, source = self._passage(number)
                hits.append(Hit(number, text, source, score))
        return hits

    def _holders(self, word: str) -> int:
        """How many passages hold a word; counted no further than what counts."""
        count = "SELECT count(*) FROM (SELECT 1 FROM passage_words WHERE passage_words MATCH ? LIMIT ?)"
        return int(self._database.execute(count, (f'"{word}"', MOST_PASSAGES + 1)).fetchone()[0])

    # What people said of it

    def feedback(self, question: str, passage_ids: Sequence[int], reward: float) -> None:
        """Writes a vote on each passage to the log: 1.0, it helped with this question; -1.0, it did not.

        Raises UserError when there is no such passage.
        """
        if reward not in (1.0, -1.0):
            raise ValueError(f"reward {reward}: expected 1.0 or -1.0")
        now, question = time.time(), question.encode(errors="replace").decode()
        with told(self._path), transaction(self._database, "IMMEDIATE"):
            for number in dict.fromkeys(passage_ids):
                if (
                    number.bit_length() > 63
                    or not self._database.execute("SELECT 1 FROM passages WHERE id = ?", (number,)).fetchone()
                ):
                    raise UserError(f"{self._path}: holds no passage {number}: kb search shows their numbers")
                vote = "INSERT INTO feedback (time, question, passage, reward) VALUES (?, ?, ?, ?)"
                self._database.execute(vote, (now, question, number, reward))

    def relevances(self, question: str, passage_ids: Sequence[int]) -> dict[int, float]:
        """The relevance of passages to a question, by the log of votes (relevance.py)."""
        with told(self._path), transaction(self._database, "DEFERRED"):
            return self._relevances({word: self._holders(word) for word in words(question)[:MOST_WORDS]}, passage_ids)

    def _relevances(self, holders: dict[str, int], passage_ids: Sequence[int]) -> dict[int, float]:
        log = "SELECT question, reward FROM feedback WHERE passage = ? ORDER BY id"
        votes = {number: self._database.execute(log, (number,)).fetchall() for number in passage_ids}
        if not any(votes.values()):
            return dict.fromkeys(passage_ids, 0.0)
        (total,) = self._database.execute("SELECT count(*) FROM passages").fetchone()
        asked = {word: weight(count, total, MOST_PASSAGES) for word, count in holders.items()}
        questions = {voted for of in votes.values() for voted, _ in of}
        near = {voted: nearness(asked, words(voted)[:MOST_WORDS]) for voted in questions}
        return {
            number: relevance([(reward, near[voted]) for voted, reward in of], self._settings.feedback_alpha)
            for number, of in votes.items()
        }


def _id(done: sqlite3.Cursor) -> int:
    assert done.lastrowid is not None  # it was an INSERT
    return done.lastrowid


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
