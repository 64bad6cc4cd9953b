"""What the program needs installed, as its own package says it, against what is there. Nothing of it is imported."""

import os
import platform
from collections.abc import Callable, Collection
from importlib import metadata

PACKAGE = "anarchobot"


def installed(package: str) -> str | None:
    """The version that is there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def unmet_python(asked: str | None, version: str = platform.python_version()) -> str | None:
    """What is wrong with the running Python; `asked` is such as `>=3.11,<3.14`."""
    from packaging.specifiers import SpecifierSet

    if asked is None or SpecifierSet(asked).contains(version, prereleases=True):
        return None
    return f"Python {version}, and {asked} is needed"


def needed(extras: Collection[str] = ()) -> list[str]:
    """The requirements, such as `numpy>=2.1`, that hold on this system, and those of `extras`. Raises
    PackageNotFoundError when the program isn't installed."""
    from packaging.requirements import Requirement

    found = []
    for text in metadata.requires(PACKAGE) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            requirement.marker = None
            found.append(str(requirement))
    return found


def unmet(requirements: Collection[str], version_of: Callable[[str], str | None]) -> list[str]:
    """Those that are missing or of another version: the requirement, and what is there."""
    from packaging.requirements import Requirement

    problems = []
    for text in requirements:
        requirement, version = Requirement(text), version_of(Requirement(text).name)
        if version is None:
            problems.append(f"{text} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{text} is needed, and {version} is here")
    return problems


PACKAGES = ("anarchobot", "mlx", "mlx-lm", "numpy", "sentencepiece", "tokenizers", "torch")


def environment(place: str) -> dict[str, str]:
    """`place`: precision and device, as the engine says them. Only names and versions: nothing is imported."""
    found = {"computes in": place, "system": platform.platform(), "cores": str(os.cpu_count())}
    found["Python"] = platform.python_version()
    for package in PACKAGES:
        if (version := installed(package)) is not None:
            found[package] = version
    return found
