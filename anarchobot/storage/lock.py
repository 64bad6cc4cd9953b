"""One writer to a folder: a lock that the system itself takes back when its holder dies, even by kill -9."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import Self

NAME = ".lock"


class FolderLock:
    """A context in which this process alone may write to `folder`, which is made when it is not there.

    Raises BlockingIOError, for people to read, when another process holds it. The file stays: who removed it could lock
    another one than the next.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            told = f"{holder} is writing here: wait for its end, or choose another folder"
            raise BlockingIOError(errno.EWOULDBLOCK, told, str(self._path.parent)) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks: go on without
                raise
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
