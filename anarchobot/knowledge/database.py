"""The SQLite file of a knowledge base: create, open and check it; translate SQLite errors into one-line messages.

It uses a rollback journal rather than a write-ahead log: between transactions the knowledge base is a single file that
can be copied, and searching needs no write permission. `synchronous = EXTRA` flushes each commit to disk.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anarchobot.config.errors import UserError, did_you_mean

APPLICATION_ID = 0x414E4B42  # "ANKB", in the file's header
FORMAT_VERSION = 1  # of the tables below and the output of text.index_text
BUSY_TIMEOUT = 5.0  # seconds to wait for another process's write lock
CACHE_KIB = 2**16  # a larger transaction spills to the file before it commits, and then blocks readers

# AUTOINCREMENT: ids are never reused, so a vote on a deleted passage stays without effect.
# The index stores no text itself (content=''); porter strips English suffixes and leaves other languages unchanged.
_SCHEMA = (
    """CREATE TABLE documents (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, sha256 TEXT NOT NULL, text_field TEXT NOT NULL
    )""",
    """CREATE TABLE passages (
        id INTEGER PRIMARY KEY AUTOINCREMENT, document INTEGER NOT NULL, source TEXT NOT NULL, text TEXT NOT NULL
    )""",
    "CREATE INDEX passages_of_document ON passages (document)",
    """CREATE VIRTUAL TABLE passage_words USING fts5 (
        text, content='', tokenize='porter unicode61 remove_diacritics 2'
    )""",
    """CREATE TABLE feedback (
        id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, question TEXT NOT NULL, passage INTEGER NOT NULL,
        reward REAL NOT NULL
    )""",
    "CREATE INDEX feedback_on_passage ON feedback (passage)",
    """CREATE TRIGGER feedback_is_not_changed BEFORE UPDATE ON feedback
        BEGIN SELECT RAISE (ABORT, 'feedback is append-only'); END""",
    """CREATE TRIGGER feedback_is_not_removed BEFORE DELETE ON feedback
        BEGIN SELECT RAISE (ABORT, 'feedback is append-only'); END""",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {FORMAT_VERSION}",
)


class KnowledgeBaseError(UserError):
    """The knowledge base itself cannot be used (as opposed to a file that is added to it)."""


def open_database(path: Path, create: bool) -> sqlite3.Connection:
    """Opens a knowledge base; with `create`, creates it if the file is missing or empty.

    Raises KnowledgeBaseError if there is none, or if it is not a knowledge base, corrupt, locked, or of a newer format.
    """
    if not create and not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise KnowledgeBaseError(f"{path}: no such knowledge base{near or '; create it with: anarchobot kb add'}")
    with translate_errors(path):
        # With isolation_level=None the sqlite3 module does not begin transactions on its own; `transaction` does.
        uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
        database = sqlite3.connect(uri, timeout=BUSY_TIMEOUT, isolation_level=None, uri=True)
    try:
        with translate_errors(path):
            database.execute("PRAGMA trusted_schema = OFF")
            database.execute("PRAGMA synchronous = EXTRA")
            database.execute("PRAGMA fullfsync = ON")  # macOS: flush the disk's own cache; no effect elsewhere
            database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            if create and _is_empty(database):
                _create_schema(database)
            _check(database, path)
    except BaseException:
        database.close()
        raise
    return database


def _is_empty(database: sqlite3.Connection) -> bool:
    return not _integer(database, "SELECT count(*) FROM sqlite_master") and not _integer(
        database, "PRAGMA application_id"
    )


def _create_schema(database: sqlite3.Connection) -> None:
    with transaction(database, "IMMEDIATE"):
        if _is_empty(database):  # check again under the lock: another process may have created it
            for statement in _SCHEMA:
                database.execute(statement)


def _check(database: sqlite3.Connection, path: Path) -> None:
    if _is_empty(database):
        raise KnowledgeBaseError(f"{path}: empty file; create a knowledge base with: anarchobot kb add")
    if _integer(database, "PRAGMA application_id") != APPLICATION_ID:
        raise KnowledgeBaseError(f"{path}: not a knowledge base (another program's SQLite file); choose another file")
    if (version := _integer(database, "PRAGMA user_version")) != FORMAT_VERSION:
        raise KnowledgeBaseError(
            f"{path}: unsupported format version {version} (expected {FORMAT_VERSION}); use a newer AnarchoBot"
        )


def _integer(database: sqlite3.Connection, query: str) -> int:
    return int(database.execute(query).fetchone()[0])


@contextmanager
def transaction(database: sqlite3.Connection, kind: str) -> Iterator[None]:
    """Commits on success, else rolls back. `kind`: DEFERRED for a consistent read, IMMEDIATE to write."""
    database.execute(f"BEGIN {kind}")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


_MESSAGES = {
    sqlite3.SQLITE_BUSY: "locked by another process; try again later",
    sqlite3.SQLITE_LOCKED: "locked by another process; try again later",
    sqlite3.SQLITE_NOTADB: "not a knowledge base (not a SQLite file); choose another file",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; expected a file in an existing, writable folder",
    sqlite3.SQLITE_READONLY: "read-only; make the file and its folder writable",
    sqlite3.SQLITE_PERM: "permission denied; make the file readable",
    sqlite3.SQLITE_FULL: "disk full; free some space (the knowledge base is unchanged)",
    sqlite3.SQLITE_IOERR: "I/O error; check whether the disk is full or failing",
}


@contextmanager
def translate_errors(path: Path) -> Iterator[None]:
    """Turns SQLite errors into KnowledgeBaseError; an unexplained error code means corruption."""
    try:
        yield
    except sqlite3.ProgrammingError:  # a bug of ours
        raise
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # UnicodeDecodeError: SQLite's message quotes bad text
        if "no such module" in str(error):
            raise KnowledgeBaseError(f"{path}: this Python's SQLite lacks FTS5; use a Python that has it") from error
        message = _MESSAGES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
        corrupt = f"corrupt knowledge base ({error}); restore a copy, or add its files to a new one"
        raise KnowledgeBaseError(f"{path}: {message or corrupt}") from error
