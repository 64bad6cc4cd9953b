"""Installed package versions, compared with what this package's metadata requires. Imports none of them."""

import os
import platform
from collections.abc import Callable, Collection
from importlib import metadata

from anarchobot import __version__

PACKAGE = "anarchobot"
RECORDED = ("mlx", "mlx-lm", "numpy", "sentencepiece", "tokenizers", "torch")  # in environment.json


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment_info(compute: str) -> dict[str, str]:
    """The contents of environment.json: system and versions. `compute` is the engine's precision and device."""
    info = {"computes in": compute, "system": platform.platform(), "cores": str(os.cpu_count())}
    info |= {"Python": platform.python_version(), PACKAGE: __version__}
    return info | {name: version for name in RECORDED if (version := installed_version(name)) is not None}


def requirements(extras: Collection[str] = ()) -> list[str]:
    """This package's requirements on this system, such as `numpy>=2.1`, including the requirements of `extras`. Raises
    PackageNotFoundError if the package is not installed."""
    from packaging.requirements import Requirement

    problems = []
    for text in metadata.requires(PACKAGE) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            requirement.marker = None
            problems.append(str(requirement))
    return problems


def unmet(requirements: Collection[str], version_of: Callable[[str], str | None]) -> list[str]:
    """One message for each requirement that is missing or has the wrong version."""
    from packaging.requirements import Requirement

    problems = []
    for text in requirements:
        requirement = Requirement(text)
        version = version_of(requirement.name)
        if version is None:
            problems.append(f"{text} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{text} is required, but {version} is installed")
    return problems
