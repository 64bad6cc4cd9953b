"""Records in which order files and folders are flushed to the disk and renamed."""

import os
from pathlib import Path
from typing import Any

import pytest

from anarchobot.storage import durable


class DiskCalls:
    """`in_order` returns `fsync PATH` and `rename OLD NEW`; a flushed file is named as it is called at the end."""

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

    def in_order(self) -> list[str]:
        names = {path.stat().st_ino: path for path in (self._root, *self._root.rglob("*"))}
        return [
            f"fsync {self._name(names[call[0]])}" if len(call) == 1 else f"rename {' '.join(map(self._name, call))}"
            for call in self._calls
        ]

    def _name(self, path: Path) -> str:
        return str(Path(path).relative_to(self._root))
