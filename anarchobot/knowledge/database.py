"""The SQLite file of a knowledge base: made, opened and checked, and its faults told in one line.

A rollback journal, not a write-ahead log: between two changes the base is one file that can be copied, and a search
needs no right to write beside it. `synchronous = EXTRA` flushes each change to the disk before it is said to be done.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anarchobot.config.errors import UserError, did_you_mean

APPLICATION = 0x414E4B42  # "ANKB", in the file's header
FORMAT = 1  # of the tables below, and of what words.spaced makes of a text
PATIENCE = 5.0  # seconds to wait for another process that is writing
CACHE = 2**16  # KiB at most; an `add` that changes more goes to the file before its end, and then readers have to wait

# AUTOINCREMENT: an id is never given twice, so a vote on a passage that is gone is a vote on nothing.
# The index holds no text of its own (content=''); porter takes English endings off, and leaves other languages alone.
_TABLES = (
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
        BEGIN SELECT RAISE (ABORT, 'the log of feedback only grows'); END""",
    """CREATE TRIGGER feedback_is_not_removed BEFORE DELETE ON feedback
        BEGIN SELECT RAISE (ABORT, 'the log of feedback only grows'); END""",
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {FORMAT}",
)


class BaseFault(UserError):
    """What is wrong is the base itself, not what is put into it."""


def open_database(path: Path, create: bool) -> sqlite3.Connection:
    """Opens a knowledge base; with `create`, makes it where there is none or an empty file.

    Raises BaseFault when there is none, and for a file that is no knowledge base, damaged, locked or of a newer format.
    """
    if not create and not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise BaseFault(f"{path}: no such knowledge base{near or '; `anarchobot kb add` makes one'}")
    with told(path):
        # Without isolation_level the module begins no transactions of its own: `transaction` does.
        address = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
        database = sqlite3.connect(address, timeout=PATIENCE, isolation_level=None, uri=True)
    try:
        with told(path):
            database.execute("PRAGMA trusted_schema = OFF")
            database.execute("PRAGMA synchronous = EXTRA")
            database.execute("PRAGMA fullfsync = ON")  # macOS: down to the disk itself; elsewhere it does nothing
            database.execute(f"PRAGMA cache_size = -{CACHE}")
            if create and _is_empty(database):
                _make(database)
            _check(database, path)
    except BaseException:
        database.close()
        raise
    return database


def _is_empty(database: sqlite3.Connection) -> bool:
    return not _number(database, "SELECT count(*) FROM sqlite_master") and not _number(
        database, "PRAGMA application_id"
    )


def _make(database: sqlite3.Connection) -> None:
    with transaction(database, "IMMEDIATE"):
        if _is_empty(database):  # still: another process may have been quicker
            for statement in _TABLES:
                database.execute(statement)


def _check(database: sqlite3.Connection, path: Path) -> None:
    if _is_empty(database):
        raise BaseFault(f"{path}: an empty file: `anarchobot kb add` makes a knowledge base of it")
    if _number(database, "PRAGMA application_id") != APPLICATION:
        raise BaseFault(f"{path}: another program's SQLite file, no knowledge base: name another file")
    if (version := _number(database, "PRAGMA user_version")) != FORMAT:
        raise BaseFault(f"{path}: of format {version}, expected {FORMAT}: use the AnarchoBot that wrote it, or a newer")


def _number(database: sqlite3.Connection, question: str) -> int:
    return int(database.execute(question).fetchone()[0])


@contextmanager
def transaction(database: sqlite3.Connection, kind: str) -> Iterator[None]:
    """All or nothing. `kind` is DEFERRED to read one state of the base, or IMMEDIATE to write."""
    database.execute(f"BEGIN {kind}")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


_TOLD = {
    sqlite3.SQLITE_BUSY: "another process is writing to it: try again when it is done",
    sqlite3.SQLITE_LOCKED: "another process is writing to it: try again when it is done",
    sqlite3.SQLITE_NOTADB: "no knowledge base (not a SQLite file): name another file",
    sqlite3.SQLITE_CANTOPEN: "can't be opened: expected a file in a folder that is there and may be written to",
    sqlite3.SQLITE_READONLY: "can't be written: make it, and its folder, writable",
    sqlite3.SQLITE_PERM: "can't be read: allow it",
    sqlite3.SQLITE_FULL: "the disk is full: make room; the base is as it was",
    sqlite3.SQLITE_IOERR: "can't be read or written: is the disk full or failing?",
}


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turns SQLite's errors into BaseFault, one line for people; what no code explains is damage."""
    try:
        yield
    except sqlite3.ProgrammingError:  # ours
        raise
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter: SQLite quotes damaged text in an error
        if "no such module" in str(error):
            raise BaseFault(f"{path}: this Python's SQLite has no FTS5: use a Python that has") from error
        what = _TOLD.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
        damage = f"a damaged knowledge base ({error}): restore a copy, or add its files to a new one"
        raise BaseFault(f"{path}: {what or damage}") from error
