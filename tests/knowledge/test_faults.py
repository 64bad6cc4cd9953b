"""Kills, corruption, locks and wrong files: the knowledge base stays consistent, or the error is one line."""

import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anarchobot.config.errors import UserError
from anarchobot.knowledge import database
from anarchobot.knowledge.database import KnowledgeBaseError
from anarchobot.knowledge.knowledge_base import KnowledgeBase
from anarchobot.storage.durable import sha256_file
from tests.knowledge.bases import add, make_base, open_base, write_rows

TEXTS = ["apples are red", "bananas are yellow", "cherries are red"]


def check(path: Path) -> None:
    """Runs SQLite's integrity checks on the file and the index."""
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.execute("INSERT INTO passage_words (passage_words) VALUES ('integrity-check')")
    connection.close()


def contents(base: KnowledgeBase) -> list[tuple[str, str]]:
    return sorted(base._database.execute("SELECT source, text FROM passages").fetchall())


# --- Kills

ADDER = """
import os, signal, sys, time
from pathlib import Path
from anarchobot.knowledge import database
from tests.knowledge.bases import add, open_base

database.BUSY_TIMEOUT = 200.0  # seconds, for a busy machine
path, statement, wait, *files = sys.argv[1:]
left = int(statement)  # kill this process `wait` seconds after this many statements

def count(text):
    global left
    left -= 1
    if left == 0:
        signal.setitimer(signal.ITIMER_REAL, float(wait))

signal.signal(signal.SIGALRM, signal.SIG_DFL)  # terminates the process immediately, like SIGKILL
with open_base(Path(path)) as base:
    base._database.execute("PRAGMA cache_size = 20")  # so that the transaction spills to the file early
    base._database.set_trace_callback(count)
    for name in files:
        add(base, Path(name))
"""
ROWS = 400


def add_in_a_process(base: Path, files: list[Path], statement: int = 0, wait: float = 0.0) -> int:
    words = [sys.executable, "-c", ADDER, str(base), str(statement), str(wait), *map(str, files)]
    return subprocess.Popen(words).wait()


def test_add_is_atomic_under_kills(tmp_path: Path) -> None:
    """Add and replace files while killing the process: each document is in its old or its new state, never between."""
    draw = random.Random(0)
    files = [tmp_path / f"{i}.jsonl" for i in range(3)]
    states: dict[str, list[list[str]]] = {}
    for file in files:
        texts = [f"{file.stem} says {i} " + f"and {i % 7} more " * 19 for i in range(ROWS)]
        states[str(file)] = [[], texts, [f"{text} again" if i % 3 else text for i, text in enumerate(texts)]]
    base_path, interrupted = tmp_path / "kb.db", 0
    for state in (1, 2):
        for file in files:
            write_rows(file, states[str(file)][state])
        for _ in range(7):
            code = add_in_a_process(base_path, files, draw.randrange(1, 3 * ROWS), draw.choice([1e-6, 2e-3]))
            assert code in (0, -signal.SIGALRM)
            interrupted += base_path.with_name("kb.db-journal").exists()
            with open_base(base_path) as base:  # rolls back what the kill interrupted
                stored: dict[str, list[str]] = {name: [] for name in states}
                for source, text in base._database.execute("SELECT source, text FROM passages ORDER BY id"):
                    stored[source.rpartition(":")[0]].append(text)
                for name, texts in stored.items():
                    assert sorted(texts) in [sorted(known) for known in states[name][state - 1 : state + 1]]
                assert {name for name, texts in stored.items() if texts} == {
                    document.name for document in base.documents()
                }
            check(base_path)
        assert add_in_a_process(base_path, files) == 0
        with open_base(base_path) as base, open_base(tmp_path / f"uninterrupted{state}.db") as uninterrupted:
            for file in files:
                assert add(base, file) == "equal"
                add(uninterrupted, file)
            assert contents(uninterrupted) == contents(base)
        check(base_path)
    assert interrupted > 7


def test_an_interrupted_add_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_base(tmp_path, TEXTS) as base:
        before = contents(base)
        real = KnowledgeBase._insert

        def insert(self: KnowledgeBase, document: int, source: str, passage: str) -> None:
            if "dates" in passage:
                raise KeyboardInterrupt
            real(self, document, source, passage)

        monkeypatch.setattr(KnowledgeBase, "_insert", insert)
        with pytest.raises(KeyboardInterrupt):
            add(base, write_rows(tmp_path / "texts.jsonl", ["figs are purple", "dates are brown"]))
        assert contents(base) == before
        assert [hit.text for hit in base.search("figs apples")] == [TEXTS[0]]
        monkeypatch.undo()
        assert add(base, tmp_path / "texts.jsonl") == "replaced"
    check(tmp_path / "kb.db")


def test_the_index_stays_consistent_through_changes(tmp_path: Path) -> None:
    draw = random.Random(1)
    vocabulary = ["apples", "東京の空", "café", "'quoted'", "x\0y", "pears. ", "\n\n", "ﬁg", "İstanbul", "𠀀𠀁"]
    with open_base(tmp_path / "kb.db") as base:
        for _ in range(40):
            name = f"{draw.randrange(4)}.jsonl"
            texts = [" ".join(draw.choices(vocabulary, k=draw.randrange(1, 300))) for _ in range(draw.randrange(1, 5))]
            add(base, write_rows(tmp_path / name, texts))
            name = draw.choice(base.documents()).name
            if draw.random() < 0.3:
                base.remove(name)
    check(tmp_path / "kb.db")
    with open_base(tmp_path / "kb.db") as base:
        for document in base.documents():
            base.remove(document.name)
        assert base.search(" ".join(vocabulary)) == []
        assert base._database.execute("SELECT count(*) FROM passage_words_docsize").fetchone() == (0,)


# --- Corruption


def test_corruption_is_a_one_line_error(tmp_path: Path) -> None:
    """Overwritten bytes or a truncated file: a result or a one-line error, never a traceback."""
    with make_base(tmp_path, [f"{text} and {i} more words" for i in range(300) for text in TEXTS]) as base:
        base.feedback("red", [1], 1.0)
    good, bad = (tmp_path / "kb.db").read_bytes(), tmp_path / "bad.db"
    more = write_rows(tmp_path / "more.jsonl", ["dates are brown"])
    draw, errors = random.Random(2), 0
    uses: list[Callable[[KnowledgeBase], object]] = [
        lambda base: base.search("which are red or yellow?"),
        lambda base: base.documents(),
        lambda base: add(base, more),
        lambda base: base.feedback("red", [2], -1.0),
        lambda base: base.remove(str(tmp_path / "texts.jsonl")),
    ]
    for _ in range(60):
        damaged = bytearray(good[: draw.randrange(1, len(good))] if draw.random() < 0.2 else good)
        for _ in range(draw.choice([1, 10, 100])):
            at = draw.randrange(len(damaged))
            damaged[at : at + 16] = draw.randbytes(len(damaged[at : at + 16]))
        bad.write_bytes(damaged)
        for use in uses:
            try:
                with open_base(bad, create=False) as base:
                    use(base)
            except UserError as error:
                assert str(error).startswith(f"{bad}: "), error
                assert "\n" not in str(error)
                errors += 1
        for beside in tmp_path.glob("bad.db*"):
            beside.unlink()
    assert errors > 30


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    with make_base(tmp_path, TEXTS) as base:
        base._database.execute("PRAGMA max_page_count = 30")  # SQLite treats this as a full disk at 120 kB
        with pytest.raises(KnowledgeBaseError, match=r"kb\.db: disk full; .* unchanged\)$"):
            add(base, write_rows(tmp_path / "more.jsonl", [f"{i} " + "dates are brown " * 50 for i in range(300)]))
        assert [document.passages for document in base.documents()] == [3]
        assert base.search("dates") == []
    check(tmp_path / "kb.db")


# --- Wrong files


def write_other(path: Path, *statements: str) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        other.execute(statement)
    other.close()


def test_other_files_are_rejected_and_left_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_other(Path("other.db"), "CREATE TABLE documents (id)")
    write_other(Path("another.db"), "PRAGMA application_id = 7")
    Path("notes.txt").write_text("These are notes. " * 99)
    Path("short.txt").write_text("ab")
    Path("folder").mkdir()
    with open_base(Path("newer.db")):
        pass
    write_other(Path("newer.db"), "PRAGMA user_version = 2")
    messages = {
        "other.db": "not a knowledge base (another program's SQLite file)",
        "another.db": "not a knowledge base (another program's SQLite file)",
        "notes.txt": "not a knowledge base (not a SQLite file)",
        "short.txt": "not a knowledge base (not a SQLite file)",
        "newer.db": "unsupported format version 2 (expected 1)",
        "folder": "cannot be opened",
        "nowhere/kb.db": "cannot be opened",
    }
    for name, why in messages.items():
        before = Path(name).read_bytes() if Path(name).is_file() else None
        with pytest.raises(KnowledgeBaseError) as error:
            open_base(Path(name))
        assert str(error.value).startswith(f"{name}: {why}"), error.value
        assert before is None or Path(name).read_bytes() == before


def test_only_create_creates_a_knowledge_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.db").touch()
    for name, why in {
        "kb.db": "kb.db: no such knowledge base; create it with: anarchobot kb add",
        "nowhere/kb.db": "nowhere/kb.db: no such knowledge base; create it with: anarchobot kb add",
        "emty.db": "emty.db: no such knowledge base; did you mean 'empty.db'?",
        "empty.db": "empty.db: empty file; create a knowledge base with: anarchobot kb add",
    }.items():
        with pytest.raises(KnowledgeBaseError) as error:
            open_base(Path(name), create=False)
        assert str(error.value) == why
    assert [path.name for path in Path().iterdir()] == ["empty.db"]
    for name in ("empty.db", "a #1? %41.db"):
        with open_base(Path(name)) as base:
            assert base.documents() == []
        assert Path(name).stat().st_size > 0


def test_missing_fts5_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_SCHEMA", ("CREATE VIRTUAL TABLE t USING fts99 (text)",))
    with pytest.raises(KnowledgeBaseError, match=r"kb\.db: this Python's SQLite lacks FTS5"):
        open_base(tmp_path / "kb.db")


# --- Concurrency


def test_writers_wait_for_each_other_and_readers_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_base(tmp_path, TEXTS).close()
    writing = sqlite3.connect(tmp_path / "kb.db", isolation_level=None, check_same_thread=False)
    writing.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 0.02)
    with open_base(tmp_path / "kb.db") as base:
        assert [hit.passage_id for hit in base.search("bananas")] == [2]
        assert len(base.documents()) == 1
        for change in (
            lambda: add(base, write_rows(tmp_path / "more.jsonl", ["dates are brown"])),
            lambda: base.remove(str(tmp_path / "texts.jsonl")),
            lambda: base.feedback("red", [1], 1.0),
        ):
            with pytest.raises(KnowledgeBaseError, match=r"kb\.db: locked by another process"):
                change()
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 200.0)
    with open_base(tmp_path / "kb.db") as base:
        done = threading.Timer(0.3, lambda: writing.execute("COMMIT"))
        done.start()
        assert add(base, tmp_path / "more.jsonl") == "added"
        done.join()
    writing.close()


def test_concurrent_creation(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{i}.jsonl", [f"file {i} row {j}" for j in range(50)]) for i in range(3)]
    with ThreadPoolExecutor(3) as threads:
        codes = list(threads.map(lambda file: add_in_a_process(tmp_path / "kb.db", [file]), files))
    assert codes == [0, 0, 0]
    with open_base(tmp_path / "kb.db") as base:
        assert [document.passages for document in base.documents()] == [50, 50, 50]
    check(tmp_path / "kb.db")


def test_a_copy_of_the_file_is_a_complete_knowledge_base(tmp_path: Path) -> None:
    with make_base(tmp_path, TEXTS) as base:
        base.feedback("red", [1], -1.0)
        shutil.copy(tmp_path / "kb.db", tmp_path / "copy.db")
        expected = base.search("what is red?")
    with open_base(tmp_path / "copy.db", create=False) as copy:
        assert copy.search("what is red?") == expected
    assert sha256_file(tmp_path / "kb.db") == sha256_file(tmp_path / "copy.db")
