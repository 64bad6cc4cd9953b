"""Where a run is made: versions, system, machine."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("anarchobot", "mlx", "mlx-lm", "numpy", "sentencepiece", "tokenizers", "torch")


def environment(place: str) -> dict[str, str]:
    """`place`: precision and device, as the engine says them. Only names and versions: nothing is imported."""
    found = {"computes in": place, "system": platform.platform(), "cores": str(os.cpu_count())}
    found["Python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
