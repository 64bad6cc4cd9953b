"""Interrupted runs, stopped in any way at any moment, resume and end with the bytes of an uninterrupted run, in bounded
memory. Existing shards stay intact until they are replaced."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.data import document_batches, pretokenize
from anarchobot.data.pretokenize import Pretokenizer
from anarchobot.data.resume import is_complete
from anarchobot.data.shard_writer import NpyStream
from anarchobot.data.shards import verify
from anarchobot.data.sources.documents import Document, DocumentCounts
from tests.data.bytes_tokenizer import Bytes

TEXTS = [f"document {i % 37} says {i * i} " * (1 + i % 5) for i in range(60)] + ["document 3 says 9 "] * 2
LONG = "".join(f"line {i}\n" for i in range(9000))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_batches, "BATCH_CHARS", 100)


def run(out: Path, texts: list[str] = TEXTS, tokenizer: Bytes | None = None, **settings: Any) -> DocumentCounts:
    tokenizer = tokenizer or Bytes(out.parent)
    documents = [Document(LONG, splittable=True), *map(Document, texts)]
    counts = DocumentCounts()
    settings = {"val_fraction": 0.1, "shard_tokens": 400} | settings
    Pretokenizer(tokenizer, out, counts=counts, **settings).run(documents)
    return counts


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


class Stopped(Exception):
    pass


class StopsAt(Bytes):
    """Fails on a given text; records everything it was given."""

    def __init__(self, folder: Path, text: str = "") -> None:
        super().__init__(folder)
        self.stop, self.given = text, list[str]()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        self.given += texts
        if self.stop in texts:
            raise Stopped
        return super().encode_batch(texts)


def stop(out: Path, at: int = 40, **settings: Any) -> None:
    with pytest.raises(Stopped):
        run(out, tokenizer=StopsAt(out.parent, TEXTS[at]), **settings)


# Killed


DRIVER = """
import sys
from pathlib import Path
from anarchobot.data import document_batches
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources.documents import DocumentCounts, from_files
from anarchobot.data.pretokenize import Pretokenizer
from anarchobot.data.resume import is_complete
from tests.data.bytes_tokenizer import Bytes

document_batches.BATCH_CHARS = 1000
folder, out, workers, near = sys.argv[1:]
counts = DocumentCounts()
documents = from_files([f"{folder}/corpus.jsonl", f"{folder}/long.txt"], DataConfig(), counts)
print("ready", flush=True)
Pretokenizer(Bytes(Path(folder)), Path(out), val_fraction=0.1, num_workers=int(workers), near_dedup=float(near) or None,
             shard_tokens=4000, counts=counts).run(documents)
"""


def drive(corpus: Path, out: Path, near: float, kill_after: float | None = None) -> float:
    """Runs in a subprocess, killed after `kill_after` seconds; returns its duration in seconds."""
    words = [sys.executable, "-c", DRIVER, str(corpus), str(out), str(random.choice([1, 2])), str(near)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        start = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            process.kill()
        code = process.wait(200)
    assert code in ((0,) if kill_after is None else (0, -9))
    return time.monotonic() - start


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.faults)])
def test_killed_run_resumes_to_the_same_bytes(tmp_path: Path, kills: int) -> None:
    chance = random.Random()
    rows = ["".join(f"{i * i * j % 997} " for j in range(5 + i % 40)) + "." * (i % 3) for i in range(2500)]
    rows += [row + ".." for row in rows[::7]]  # near duplicates
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "long.txt").write_text(LONG)
    unbroken = {}
    for near in (0.0, 0.8):
        lasted = drive(tmp_path, tmp_path / f"whole{near}", near)
        unbroken[near] = contents(tmp_path / f"whole{near}"), lasted
        assert len(unbroken[near][0]) > 40
    assert unbroken[0.0][0] != unbroken[0.8][0]
    resumed = 0
    for number in range(kills):
        near = 0.8 * (number % 3 == 2)
        whole, lasted = unbroken[near]
        out = tmp_path / f"killed{number}"
        for _ in range(1 + number % 2):  # some twice
            moment = (number + chance.random()) / kills * lasted
            drive(tmp_path, out, near, kill_after=moment)
            resumed += (out / "progress.json").exists()
        drive(tmp_path, out, near)
        assert contents(out) == whole, f"killed after {moment:.3f} of {lasted:.3f} s"
        shutil.rmtree(out)
    assert resumed


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.usefixtures("small_batches")
def test_any_write_or_rename_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool) -> None:
    """As on a full disk, or (killed) without any cleanup. A manifest that exists is always valid."""
    monkeypatch.setattr(os, "fsync", lambda number: None)
    run(tmp_path / "whole", TEXTS[:20], shard_tokens=1000)
    whole = contents(tmp_path / "whole")
    left = 0

    def fails(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if name == "append":
                    real(args[0], args[1][: len(args[1]) // 2])
                raise OSError("the disk is full")
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in (
        (NpyStream, "append"), (NpyStream, "close"), (os, "fsync"), (Path, "open"), (Path, "replace"), (Path, "unlink"),
        (shutil, "copyfile"), (Path, "mkdir"),
    ):  # fmt: skip
        fails(owner, name)
    if killed:
        monkeypatch.setattr(NpyStream, "abort", lambda stream: stream._file.close())
    for number in range(1, 10_000):
        out = tmp_path / f"{number}"
        left = 0
        run(out, ["other"])
        left = number
        try:
            run(out, TEXTS[:20], shard_tokens=1000, restart=True)
        except OSError:
            left = 0
            if (out / "manifest.json").exists():
                assert {found for _, found in verify(out)} == {""}
            made_of = json.loads((out / "progress.json").read_text())["made_of"]
            run(out, TEXTS[:20], shard_tokens=1000, restart=made_of["tokens in a shard"] != 1000)
            assert contents(out) == whole, number
            shutil.rmtree(out)
        else:
            left = 0
            break
    assert contents(out) == whole and number > 50


# Resumed or refused


@pytest.mark.parametrize("near", [None, 0.9])
@pytest.mark.usefixtures("small_batches")
def test_resume_tokenizes_only_what_is_not_in_a_shard(tmp_path: Path, near: float | None) -> None:
    """Except with near_dedup, which compares ids. Counts and progress equal those of an uninterrupted run."""
    done: list[tuple[int, int]] = []
    counts = run(tmp_path / "whole", near_dedup=near, progress=lambda *sizes: done.append(sizes))
    stop(tmp_path / "out", near_dedup=near)
    finished = json.loads((tmp_path / "out" / "progress.json").read_text())["finished"]
    documents = sum(f["shard"]["documents"] for f in finished)
    assert documents > 20
    tokenizer, again, messages = StopsAt(tmp_path, "nothing"), list[tuple[int, int]](), list[str]()
    more = {"progress": lambda *sizes: again.append(sizes), "log": messages.append, "num_workers": 3}
    assert run(tmp_path / "out", tokenizer=tokenizer, near_dedup=near, **more) == counts
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(tokenizer.given) == (len(TEXTS) + 1 - (documents if near is None else 0))
    assert np.sum(again, axis=0).tolist() == np.sum(done, axis=0).tolist()
    assert len(messages) == 1 and f"resuming: {len(finished)} shards already done" in messages[0]
    assert ("tokenizing everything again" in messages[0]) == (near is not None)


@pytest.mark.usefixtures("small_batches")
def test_old_shards_stay_intact_during_a_new_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, ["old"])
    before = contents(out)
    del before["progress.json"]
    stop(out, restart=True)
    assert before.items() <= contents(out).items() and {found for _, found in verify(out)} == {""}
    assert any(name.endswith(".npy.tmp") for name in contents(out))


def test_shards_of_a_shorter_corpus_are_not_those_of_an_interrupted_longer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished shards of a longer text may be exactly the shards of a shorter one."""
    monkeypatch.setattr(document_batches, "BATCH_CHARS", 1)
    settings: dict[str, Any] = {"val_fraction": 0.0, "shard_tokens": 20}
    shorter = Pretokenizer(Bytes(tmp_path), tmp_path / "out", **settings, source={"a.txt": "1 line"})
    longer = replace(shorter, source={"a.txt": "2 lines"}, restart=True)
    shorter.run([Document("x" * 20)])
    before = contents(tmp_path / "out")
    assert is_complete(tmp_path / "out", shorter.provenance)

    def documents() -> Iterator[Document]:
        yield Document("x" * 20)
        raise Stopped

    with pytest.raises(Stopped):
        longer.run(documents())
    progress = json.loads((tmp_path / "out" / "progress.json").read_text())
    shards = [finished["shard"] for finished in progress["finished"]]
    assert shards == json.loads(before["manifest.json"])["shards"]
    assert not is_complete(tmp_path / "out", longer.provenance)
    replace(longer, restart=False).run([Document("x" * 20), Document("y" * 20)])
    assert is_complete(tmp_path / "out", longer.provenance)
    # Repeating a complete run, even if that is interrupted, leaves it complete.
    with pytest.raises(Stopped):
        replace(longer, restart=False).run(documents())
    assert is_complete(tmp_path / "out", longer.provenance)
    (tmp_path / "out" / "manifest.json").write_text("{}")
    assert not is_complete(tmp_path / "out", longer.provenance)


def test_finished_shards_that_are_not_in_place_are_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All new shards are finished, but the manifest is still that of the old ones."""
    old = Pretokenizer(Bytes(tmp_path), tmp_path / "out", val_fraction=0.0, source={"a.txt": "old"})
    new = replace(old, source={"a.txt": "new"}, restart=True)
    old.run([Document("old")])

    def stopped(*args: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(pretokenize, "_install", stopped)
        new.run([Document("new")])
    assert not is_complete(tmp_path / "out", new.provenance)
    replace(new, restart=False).run([Document("new")])
    assert is_complete(tmp_path / "out", new.provenance)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"val_fraction": 0.2}, "val_fraction changed from 0.1 to 0.2: revert this, or start over with --restart"),
        ({"seed": 3}, "train.seed changed from 0 to 3"),
        ({"dedup": False}, "data.dedup changed from True to False"),
        ({"source": {"a.txt": "6 bytes"}}, "a.txt changed from 5 bytes to 6 bytes"),
        ({"source": {}}, "a.txt changed from 5 bytes to absent"),
        ({"source": {"a.txt": "5 bytes", "b.txt": "1 byte"}}, "b.txt changed from absent to 1 byte"),
        (
            {"seed": 3, "dedup": False, "val_fraction": 0.2, "near_dedup": 0.8},
            "near_dedup changed from None to 0.8 and 1 more",
        ),
    ],
)
@pytest.mark.usefixtures("small_batches")
def test_changed_setting_is_refused_or_restarts(tmp_path: Path, changed: dict[str, Any], expected: str) -> None:
    out = tmp_path / "out"
    stop(out, source={"a.txt": "5 bytes"})
    before = contents(out)
    settings = {"source": {"a.txt": "5 bytes"}} | changed
    with pytest.raises(UserError) as error:
        run(out, **settings)
    assert str(error.value).startswith(f"{out}: ") and expected in str(error.value) and "\n" not in str(error.value)
    assert contents(out) == before, "refused without losing anything"
    run(out, **settings, restart=True)
    run(tmp_path / "whole", **settings)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_batches")
def test_changed_tokenizer_is_refused(tmp_path: Path) -> None:
    stop(tmp_path / "out")
    tokenizer = Bytes(tmp_path)
    tokenizer.files[0].write_text("other bytes")
    with pytest.raises(UserError, match=r"tokenizer changed from bytes.model, sha256 .*--restart"):
        run(tmp_path / "out", tokenizer=tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        lambda texts: ["another first one", *texts],
        lambda texts: texts[1:],
        lambda texts: [*texts[:5], texts[5] + ".", *texts[6:]],
        lambda texts: [texts[1], texts[0], *texts[2:]],
        lambda texts: texts[:5],
    ],
)
@pytest.mark.usefixtures("small_batches")
def test_changed_text_is_refused(tmp_path: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Even with the same provenance, as when a file was rewritten with its old size and time, or a dataset changed."""
    stop(tmp_path / "out")
    with pytest.raises(UserError, match=r"an earlier run wrote this shard from other documents: .*--restart"):
        run(tmp_path / "out", change(TEXTS))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x")])
@pytest.mark.parametrize("kind", ["npy", "offsets"])
@pytest.mark.usefixtures("small_batches")
def test_damaged_finished_shard_is_rewritten(tmp_path: Path, damage: Callable[[Path], object], kind: str) -> None:
    run(tmp_path / "whole")
    stop(tmp_path / "out")
    damage(tmp_path / "out" / f"train_00002.{kind}.tmp")
    run(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_batches")
def test_damaged_progress_is_an_error(tmp_path: Path) -> None:
    stop(tmp_path / "out")
    (tmp_path / "out" / "progress.json").write_text("{")
    with pytest.raises(UserError, match=r"progress.json: damaged \(.*\): start over with --restart"):
        run(tmp_path / "out")
    run(tmp_path / "out", restart=True)


# Memory

MEASURED = """
import json, resource, sys
from pathlib import Path
from anarchobot.data.sources.documents import DocumentCounts, Document
from anarchobot.data.pretokenize import Pretokenizer
from anarchobot.data.resume import is_complete
from tests.data.bytes_tokenizer import Bytes

folder, megabytes, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
text = "".join(chr(32 + i * i % 97) for i in range(1_000_003))
size = 2000
number = megabytes * 10**6 // size
peaks, done = [], 0

def peak():  # in MB. On Linux ru_maxrss is inherited from the parent process, which may be large; VmHWM is not.
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

def progress(size, tokens):
    global done
    done += size
    while done >= (len(peaks) + 1) * megabytes * 10**5:
        peaks.append(peak())

documents = (Document(f"{i:012d}" + text[i * 7919 % 998_000 :][: size - 12]) for i in range(number))
tokenizer = Bytes(folder, thin=16)
Pretokenizer(tokenizer, folder / "out", val_fraction=0.01, num_workers=workers, progress=progress).run(documents)
print(json.dumps(peaks))
"""


@pytest.mark.parametrize(
    ("megabytes", "workers", "growth"),
    [(300, 2, 40), *(pytest.param(10_000, workers, 110, marks=pytest.mark.faults) for workers in (1, 2))],
)
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, megabytes: int, workers: int, growth: int) -> None:
    """Except by the 12 to 15 bytes per document of duplicate detection: 5 million documents in 10 GB."""
    words = [sys.executable, "-c", MEASURED, str(tmp_path), str(megabytes), str(workers)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    peaks = json.loads(done.stdout)
    shutil.rmtree(tmp_path / "out")
    assert len(peaks) == 10 and peaks[-1] < 250 + 200 * workers
    assert peaks[-1] - peaks[1] < growth, peaks
