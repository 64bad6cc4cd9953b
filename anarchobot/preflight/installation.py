"""Checks of what is installed: Python and packages. They come first, and load nothing that might be missing."""

from collections.abc import Collection
from importlib import metadata

from anarchobot.preflight.check import Answer, Question, Setup
from anarchobot.system.packages import PACKAGE, requirements, unmet, unmet_python


def python(setup: Setup) -> Answer:
    problem = unmet_python(metadata.metadata(PACKAGE)["Requires-Python"], setup.machine.python)
    if problem:
        return Answer("fail", problem, "make a .venv with another Python: make PYTHON=python3.12 quickstart")
    return Answer("pass", setup.machine.python)


def packages(setup: Setup) -> Answer:
    return _of(setup, None)


def extras(setup: Setup) -> Answer:
    """The packages that not everybody needs, and this configuration does."""
    wanted = _extras_of_adapting(setup) if hasattr(setup, "adapt") else _extras_of_training(setup)
    return _of(setup, wanted)


def _extras_of_training(setup: Setup) -> list[str]:
    from anarchobot.data.sources.hub import is_hub_name

    config = setup.loaded.config
    names = [config.data.dataset] if isinstance(config.data.dataset, str) else config.data.dataset or []
    found = {
        "torch": config.train.backend == "torch",
        "fast": config.tokenizer.engine == "fast",
        "rouge": config.chat.rouge_samples > 0,
        "hub": any(name != "builtin" and is_hub_name(name) for name in names),
    }
    return [extra for extra, wanted in found.items() if wanted]


def _extras_of_adapting(setup: Setup) -> list[str]:
    from anarchobot.tasks.adaptation.pipeline import UNALIGNED

    return [] if setup.adapt.config.alignment.method in UNALIGNED else ["vocab"]


def _of(setup: Setup, extras: Collection[str] | None) -> Answer:
    """`extras`: those of the program's, None for what everybody needs."""
    requirements = sorted(set(requirements(extras)) - set(requirements())) if extras is not None else requirements()
    problems = unmet(requirements, setup.machine.version_of)
    if problems:
        wanted = f"'{PACKAGE}[{','.join(extras)}]'" if extras else PACKAGE
        return Answer("fail", "; ".join(problems), f"pip install --upgrade {wanted} (in its folder: make test)")
    versions = ", ".join(f"{name} {setup.machine.version_of(name)}" for name in _names(requirements))
    return Answer("pass", versions or "none")


def _names(requirements: list[str]) -> list[str]:
    from packaging.requirements import Requirement

    return [Requirement(text).name for text in requirements]


FIRST = (Question("Python", python), Question("packages", packages))
EXTRAS = Question("packages it asks for", extras, ("configuration",))
