"""A base that is killed, damaged, locked or none at all: whole, or told in one line."""

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
from anarchobot.knowledge import database, knowledge_base
from anarchobot.knowledge.database import BaseFault
from anarchobot.knowledge.knowledge_base import KnowledgeBase
from tests.knowledge.bases import base_of, opened, put, write_rows

TEXTS = ["apples are red", "bananas are yellow", "cherries are red"]


def check(path: Path) -> None:
    """SQLite's own checks, of the file and of the index."""
    opened_plainly = sqlite3.connect(path)
    assert opened_plainly.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    opened_plainly.execute("INSERT INTO passage_words (passage_words) VALUES ('integrity-check')")
    opened_plainly.close()


def contents(base: KnowledgeBase) -> list[tuple[str, str]]:
    return sorted(base._database.execute("SELECT source, text FROM passages").fetchall())


# Killed

ADDER = """
import os, signal, sys, time
from pathlib import Path
from anarchobot.knowledge import database
from tests.knowledge.bases import opened, put

database.PATIENCE = 200.0  # seconds, of a busy machine, for another one that writes
path, statement, wait, *files = sys.argv[1:]
left = int(statement)  # kills itself this long behind the statement of this number

def count(text):
    global left
    left -= 1
    if left == 0:
        signal.setitimer(signal.ITIMER_REAL, float(wait))

signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at once, whatever it is doing, as SIGKILL does
with opened(Path(path)) as base:
    base._database.execute("PRAGMA cache_size = 20")  # so that the file itself is written to long before the end
    base._database.set_trace_callback(count)
    for name in files:
        put(base, Path(name))
"""
ROWS = 400


def add_in_a_process(base: Path, files: list[Path], statement: int = 0, wait: float = 0.0) -> int:
    words = [sys.executable, "-c", ADDER, str(base), str(statement), str(wait), *map(str, files)]
    return subprocess.Popen(words).wait()


def test_killed_in_the_middle_of_an_add(tmp_path: Path) -> None:
    """Added, then each changed and added again, with kills all along: documents are of one state, never between."""
    draw = random.Random(0)
    files = [tmp_path / f"{i}.jsonl" for i in range(3)]
    states: dict[str, list[list[str]]] = {}
    for file in files:
        texts = [f"{file.stem} says {i} " + f"and {i % 7} more " * 19 for i in range(ROWS)]
        states[str(file)] = [[], texts, [f"{text} again" if i % 3 else text for i, text in enumerate(texts)]]
    base_path, in_the_middle = tmp_path / "kb.db", 0
    for state in (1, 2):
        for file in files:
            write_rows(file, states[str(file)][state])
        for _ in range(7):
            code = add_in_a_process(base_path, files, draw.randrange(1, 3 * ROWS), draw.choice([1e-6, 2e-3]))
            assert code in (0, -signal.SIGALRM)
            in_the_middle += base_path.with_name("kb.db-journal").exists()
            with opened(base_path) as base:  # what a kill has left half done is undone here
                held: dict[str, list[str]] = {name: [] for name in states}
                for source, text in base._database.execute("SELECT source, text FROM passages ORDER BY id"):
                    held[source.rpartition(":")[0]].append(text)
                for name, texts in held.items():
                    assert sorted(texts) in [sorted(known) for known in states[name][state - 1 : state + 1]]
                assert {name for name, texts in held.items() if texts} == {one.name for one in base.documents()}
            check(base_path)
        assert add_in_a_process(base_path, files) == 0
        with opened(base_path) as base, opened(tmp_path / f"unbroken{state}.db") as unbroken:
            for file in files:
                assert put(base, file) == "equal"
                put(unbroken, file)
            assert contents(unbroken) == contents(base)
        check(base_path)
    assert in_the_middle > 7


def test_an_error_in_the_middle_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with base_of(tmp_path, TEXTS) as base:
        before = contents(base)
        real = KnowledgeBase._insert

        def insert(self: KnowledgeBase, document: int, source: str, passage: str) -> None:
            if "dates" in passage:
                raise KeyboardInterrupt
            real(self, document, source, passage)

        monkeypatch.setattr(KnowledgeBase, "_insert", insert)
        with pytest.raises(KeyboardInterrupt):
            put(base, write_rows(tmp_path / "texts.jsonl", ["figs are purple", "dates are brown"]))
        assert contents(base) == before
        assert [hit.text for hit in base.search("figs apples")] == [TEXTS[0]]
        monkeypatch.undo()
        assert put(base, tmp_path / "texts.jsonl") == "replaced"
    check(tmp_path / "kb.db")


def test_the_index_stays_whole_through_changes(tmp_path: Path) -> None:
    draw = random.Random(1)
    vocabulary = ["apples", "東京の空", "café", "'quoted'", "x\0y", "pears. ", "\n\n", "ﬁg", "İstanbul", "𠀀𠀁"]
    with opened(tmp_path / "kb.db") as base:
        for _ in range(40):
            name = f"{draw.randrange(4)}.jsonl"
            texts = [" ".join(draw.choices(vocabulary, k=draw.randrange(1, 300))) for _ in range(draw.randrange(1, 5))]
            put(base, write_rows(tmp_path / name, texts))
            held = draw.choice(base.documents()).name
            if draw.random() < 0.3:
                base.remove(held)
    check(tmp_path / "kb.db")
    with opened(tmp_path / "kb.db") as base:
        for held_one in base.documents():
            base.remove(held_one.name)
        assert base.search(" ".join(vocabulary)) == []
        assert base._database.execute("SELECT count(*) FROM passage_words_docsize").fetchone() == (0,)


# Damaged


def test_damage_is_told_in_one_line(tmp_path: Path) -> None:
    """Bytes changed, or the end cut off: an answer, or one line; never a traceback."""
    with base_of(tmp_path, [f"{text} and {i} more words" for i in range(300) for text in TEXTS]) as base:
        base.feedback("red", [1], 1.0)
    good, bad = (tmp_path / "kb.db").read_bytes(), tmp_path / "bad.db"
    more = write_rows(tmp_path / "more.jsonl", ["dates are brown"])
    draw, told = random.Random(2), 0
    uses: list[Callable[[KnowledgeBase], object]] = [
        lambda base: base.search("which are red or yellow?"),
        lambda base: base.documents(),
        lambda base: put(base, more),
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
                with opened(bad, create=False) as base:
                    use(base)
            except UserError as error:
                assert str(error).startswith(f"{bad}: "), error
                assert "\n" not in str(error)
                told += 1
        for beside in tmp_path.glob("bad.db*"):
            beside.unlink()
    assert told > 30


def test_a_full_disk_is_told_and_changes_nothing(tmp_path: Path) -> None:
    with base_of(tmp_path, TEXTS) as base:
        base._database.execute("PRAGMA max_page_count = 30")  # what SQLite takes for a disk of 120 kB
        with pytest.raises(BaseFault, match=r"kb\.db: the disk is full: make room; the base is as it was$"):
            put(base, write_rows(tmp_path / "more.jsonl", [f"{i} " + "dates are brown " * 50 for i in range(300)]))
        assert [held.passages for held in base.documents()] == [3]
        assert base.search("dates") == []
    check(tmp_path / "kb.db")


# No base of ours


def write_other(path: Path, *statements: str) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        other.execute(statement)
    other.close()


def test_what_is_no_base_is_told_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_other(Path("other.db"), "CREATE TABLE documents (id)")
    write_other(Path("another.db"), "PRAGMA application_id = 7")
    Path("notes.txt").write_text("These are notes. " * 99)
    Path("short.txt").write_text("ab")
    Path("folder").mkdir()
    with opened(Path("newer.db")):
        pass
    write_other(Path("newer.db"), "PRAGMA user_version = 2")
    told = {
        "other.db": "another program's SQLite file",
        "another.db": "another program's SQLite file",
        "notes.txt": "no knowledge base (not a SQLite file)",
        "short.txt": "no knowledge base (not a SQLite file)",
        "newer.db": "of format 2, expected 1: use the AnarchoBot that wrote it",
        "folder": "can't be opened",
        "nowhere/kb.db": "can't be opened",
    }
    for name, why in told.items():
        before = Path(name).read_bytes() if Path(name).is_file() else None
        with pytest.raises(BaseFault) as error:
            opened(Path(name))
        assert str(error.value).startswith(f"{name}: {why}"), error.value
        assert before is None or Path(name).read_bytes() == before


def test_only_adding_makes_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.db").touch()
    for name, why in {
        "kb.db": "kb.db: no such knowledge base; `anarchobot kb add` makes one",
        "nowhere/kb.db": "nowhere/kb.db: no such knowledge base; `anarchobot kb add` makes one",
        "emty.db": "emty.db: no such knowledge base; did you mean 'empty.db'?",
        "empty.db": "empty.db: an empty file: `anarchobot kb add` makes a knowledge base of it",
    }.items():
        with pytest.raises(BaseFault) as error:
            opened(Path(name), create=False)
        assert str(error.value) == why
    assert [path.name for path in Path().iterdir()] == ["empty.db"]
    for name in ("empty.db", "a #1? %41.db"):
        with opened(Path(name)) as base:
            assert base.documents() == []
        assert Path(name).stat().st_size > 0


def test_a_python_without_fts5_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_TABLES", ("CREATE VIRTUAL TABLE t USING fts99 (text)",))
    with pytest.raises(BaseFault, match=r"kb\.db: this Python's SQLite has no FTS5: use a Python that has$"):
        opened(tmp_path / "kb.db")


# Two at once


def test_a_writer_waits_for_another_and_readers_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_of(tmp_path, TEXTS).close()
    writing = sqlite3.connect(tmp_path / "kb.db", isolation_level=None, check_same_thread=False)
    writing.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(database, "PATIENCE", 0.02)
    with opened(tmp_path / "kb.db") as base:
        assert [hit.passage_id for hit in base.search("bananas")] == [2]
        assert len(base.documents()) == 1
        for change in (
            lambda: put(base, write_rows(tmp_path / "more.jsonl", ["dates are brown"])),
            lambda: base.remove(str(tmp_path / "texts.jsonl")),
            lambda: base.feedback("red", [1], 1.0),
        ):
            with pytest.raises(BaseFault, match=r"kb\.db: another process is writing to it: try again when it is done"):
                change()
    monkeypatch.setattr(database, "PATIENCE", 200.0)
    with opened(tmp_path / "kb.db") as base:
        done = threading.Timer(0.3, lambda: writing.execute("COMMIT"))
        done.start()
        assert put(base, tmp_path / "more.jsonl") == "added"
        done.join()
    writing.close()


def test_two_make_a_base_at_once(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{i}.jsonl", [f"file {i} row {j}" for j in range(50)]) for i in range(3)]
    with ThreadPoolExecutor(3) as threads:
        codes = list(threads.map(lambda file: add_in_a_process(tmp_path / "kb.db", [file]), files))
    assert codes == [0, 0, 0]
    with opened(tmp_path / "kb.db") as base:
        assert [held.passages for held in base.documents()] == [50, 50, 50]
    check(tmp_path / "kb.db")


def test_a_copy_of_the_one_file_is_the_base(tmp_path: Path) -> None:
    with base_of(tmp_path, TEXTS) as base:
        base.feedback("red", [1], -1.0)
        shutil.copy(tmp_path / "kb.db", tmp_path / "copy.db")
        expected = base.search("what is red?")
    with opened(tmp_path / "copy.db", create=False) as copy:
        assert copy.search("what is red?") == expected
    assert knowledge_base.sha256_file(tmp_path / "kb.db") == knowledge_base.sha256_file(tmp_path / "copy.db")
