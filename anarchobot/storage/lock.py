"""One writer per folder: an advisory lock that the system releases when its holder dies, even by kill -9."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import Self

from anarchobot.storage.durable import make_folder

NAME = ".lock"


def last_holder(folder: Path) -> str | None:
    """Returns the process that last locked `folder`, which may have ended; the lock itself is not touched."""
    try:
        return (folder / NAME).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def holder(folder: Path) -> str | None:
    """Returns the process that holds the lock on `folder`, such as `process 12 on mac`, or None.

    The probe takes the lock for an instant, and a process that locks the folder at that moment fails. Code that polls
    should first check `last_holder` and whether that process is alive.
    """
    try:
        with (folder / NAME).open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
    except OSError:
        pass  # no lock file, or a file system without locks
    return None


class FolderLock:
    """A context manager that gives this process exclusive write access to `folder`, which it creates if needed.

    Raises BlockingIOError, with a message for the user, if another process holds the lock. The lock file is never
    removed: a process could lock the removed file while another locks its replacement.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME

    def __enter__(self) -> Self:
        try:
            make_folder(self._path.parent)
        except FileExistsError as error:
            message = "is a file, not a folder: choose another folder, or move the file"
            raise NotADirectoryError(errno.ENOTDIR, message, str(self._path.parent)) from error
        self._file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            message = f"{owner} is writing here: wait until it ends, or choose another folder"
            raise BlockingIOError(errno.EWOULDBLOCK, message, str(self._path.parent)) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks: continue unlocked
                raise
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
