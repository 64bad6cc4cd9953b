"""Atomic files, digests that detect every change, and folder locks."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from anarchobot.storage import durable
from anarchobot.storage.durable import HashedFile, read_checksummed, write_atomic, write_checksummed
from anarchobot.storage.lock import FolderLock
from tests.storage.disk_calls import DiskCalls


def test_every_changed_or_missing_byte_of_a_sealed_file_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    values = {"step": 3, "loss": 1.0 / 3, "name": "é", "list": [1, None, True], "tiny": 5e-324}
    write_checksummed(path, values)
    assert read_checksummed(path) == values
    good = path.read_bytes()
    # The checksum is the SHA-256 of the same JSON without it.
    plain = json.dumps(values, indent=1) + "\n"
    assert json.loads(good)["content_sha256"] == hashlib.sha256(plain.encode()).hexdigest()
    for place in range(len(good)):
        for change in (1, 0x07, 0x80, good[place] ^ 0x20):
            if change:
                path.write_bytes(good[:place] + bytes([good[place] ^ change]) + good[place + 1 :])
                with pytest.raises(ValueError):  # from json or from read_checksummed
                    read_checksummed(path)
        path.write_bytes(good[:place])
        with pytest.raises(ValueError):
            read_checksummed(path)


def test_hashed_file(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "f") as file:
        for part in (b"abc", b"", memoryview(b"defg")):
            file.write(part)
        digest = file.finish()
    assert (tmp_path / "f").read_bytes() == b"abcdefg"
    assert digest == hashlib.sha256(b"abcdefg").hexdigest() == durable.sha256_file(tmp_path / "f")


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "f", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_order_of_an_atomic_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content is on the disk before it gets its name, and the name is on the disk at the end."""
    write_atomic(tmp_path / "f", "old")
    calls = DiskCalls(monkeypatch, tmp_path)
    write_atomic(tmp_path / "f", "é\n".encode() + b"\xff\r")
    assert calls.in_order() == ["fsync f", "rename f.tmp f", "fsync ."]
    assert (tmp_path / "f").read_bytes() == b"\xc3\xa9\n\xff\r"


def test_new_folders_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = DiskCalls(monkeypatch, tmp_path)
    with FolderLock(tmp_path / "runs" / "my"):
        assert sorted(calls.in_order()) == ["fsync .", "fsync runs"]
    with FolderLock(tmp_path / "runs" / "my"):
        assert len(calls.in_order()) == 2


def test_fsync_on_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F_FULLFSYNC, or fsync if the file system does not support it."""
    import fcntl

    calls: list[object] = []

    def pretend(descriptor: int, command: int) -> None:
        calls.append(command)
        if len(calls) > 1:
            raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(durable.sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", pretend)
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    durable.fsync(1)
    assert calls == [51]
    durable.fsync(1)
    assert calls == [51, 51, "fsync"]


def test_folder_lock_is_exclusive_and_released_on_death(tmp_path: Path) -> None:
    holder = (
        "import sys, time; from pathlib import Path; from anarchobot.storage.lock import FolderLock\n"
        "with FolderLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match=rf"process {process.pid} on .* is writing here") as caught:
        FolderLock(tmp_path / "run").__enter__()
    assert caught.value.filename == str(tmp_path / "run")
    process.kill()
    process.communicate()
    with FolderLock(tmp_path / "run"), pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path / "run").__enter__()
    with FolderLock(tmp_path / "run"):
        pass
