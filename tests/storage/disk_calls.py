"""Records in which order files and folders are flushed to the disk, renamed and removed."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from anarchobot.storage import durable


class DiskCalls:
    """`in_order` returns `fsync PATH`, `rename OLD NEW` and, for a folder that exists, `remove PATH`; a flushed file is
    named as it is called at the end, `-` if it was replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self._root, self._calls = root, list[tuple[Any, ...]]()
        real = {name: getattr(os, name) for name in ("rename", "replace")}
        monkeypatch.setattr(durable.sys, "platform", "linux")  # type: ignore[attr-defined]
        monkeypatch.setattr(os, "fsync", lambda descriptor: self._calls.append((os.fstat(descriptor).st_ino,)))
        for name, call in real.items():

            def rename(source: Any, target: Any, call: Any = call) -> None:
                self._calls.append((source, target))
                call(source, target)

            monkeypatch.setattr(os, name, rename)
        remove = shutil.rmtree

        def rmtree(folder: Path, **settings: Any) -> None:
            if folder.exists():
                self._calls.append((folder, None))
            remove(folder, **settings)

        monkeypatch.setattr(shutil, "rmtree", rmtree)

    def in_order(self) -> list[str]:
        names = {path.stat().st_ino: path for path in (self._root, *self._root.rglob("*"))}
        lines = []
        for source, *targets in self._calls:
            if not targets:
                lines.append(f"fsync {self._name(names[source]) if source in names else '-'}")
            elif targets == [None]:
                lines.append(f"remove {self._name(source)}")
            else:
                lines.append(f"rename {self._name(source)} {self._name(targets[0])}")
        return lines

    def _name(self, path: Path) -> str:
        return str(Path(path).relative_to(self._root))
