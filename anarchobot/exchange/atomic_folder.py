"""Atomic creation of a folder: it is filled under a temporary name and renamed when complete."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anarchobot.config.errors import UserError
from anarchobot.storage.durable import fsync, fsync_dir, make_folder


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` on success and is removed on an error.

    Raises UserError if `path` is a file or a folder that is not empty.
    """
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path}: already exists and is not empty: choose another folder, or remove it")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file: choose another folder")
    path = path.resolve()
    make_folder(path.parent)
    # Not the process id, which another container or a killed process may have used.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            if written.is_dir():
                fsync_dir(written)
            elif written.is_file():
                with written.open("rb") as file:
                    fsync(file.fileno())
        temporary.rename(path)  # replaces an empty folder
        fsync_dir(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
