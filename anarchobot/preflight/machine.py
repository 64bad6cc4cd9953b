"""The machine's facts that checks ask for, in one place, so that a test can give others."""

import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anarchobot.system.blas import load_fast_blas
from anarchobot.system.machine import system_memory
from anarchobot.system.requirements import installed


@dataclass(frozen=True)
class Machine:
    """`version_of` a package: None where it is missing. `memory`, and `free` of the disk that a folder is on, in
    bytes."""

    python: str = platform.python_version()
    version_of: Callable[[str], str | None] = installed
    blas: Callable[[], str | None] = load_fast_blas
    memory: Callable[[], int] = lambda: system_memory().total
    free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free
