"""A folder that is whole or not there: filled beside its name and renamed at the end."""

import os
import shutil
from pathlib import Path

from anarchobot.config.errors import UserError
from anarchobot.storage.durable import fsync, fsync_dir


class NewFolder:
    """A context whose value is a folder to fill; it gets its name when all went well, and goes away when not.

    Raises UserError at the start when `path` holds something already.
    """

    def __init__(self, path: Path) -> None:
        if path.is_dir() and any(path.iterdir()):
            raise UserError(f"{path}: holds something already: choose another folder, or remove it")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file already: choose a folder")
        self._path = path = path.resolve()
        self._beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        self._beside.mkdir(parents=True)
        return self._beside

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                for file in self._beside.rglob("*"):
                    if file.is_file():
                        with file.open("rb") as written:
                            fsync(written.fileno())
                self._beside.rename(self._path)  # takes the place of an empty folder
                fsync_dir(self._path.parent)
        finally:
            shutil.rmtree(self._beside, ignore_errors=True)
