"""Checks of Python and installed packages. They run first, so this module imports nothing that might be missing."""

from collections.abc import Collection
from importlib import metadata
from platform import python_version

from anarchobot.preflight.check import Context, Outcome, check
from anarchobot.system.packages import PACKAGE, installed_version, requirements, unmet


@check("Python")
def python(context: Context) -> Outcome:
    from packaging.specifiers import SpecifierSet

    required, version = metadata.metadata(PACKAGE)["Requires-Python"], python_version()
    if required is not None and not SpecifierSet(required).contains(version, prereleases=True):
        problem = f"Python {version} is not supported: expected {required}"
        return "fail", problem, "create .venv with a supported Python: make PYTHON=python3.12 quickstart"
    return "pass", version


@check("packages")
def packages(context: Context) -> Outcome:
    return _installed(context, None)


@check("optional packages", ("configuration",))
def optional_packages(context: Context) -> Outcome:
    """The extras that this configuration needs."""
    return _installed(context, _adapt_extras(context) if hasattr(context, "adapt") else _training_extras(context))


def _training_extras(context: Context) -> list[str]:
    from anarchobot.data.sources.hub import is_hub_name
    from anarchobot.runs.trackers import TRACKERS

    config = context.loaded.config
    extras = {
        "torch": config.train.backend == "torch",
        "jsonschema": config.grpo.json_schema is not None,
        "fast": config.tokenizer.engine == "fast",
        "hub": any(name != "builtin" and is_hub_name(name) for name in config.data.datasets),
        **{name: name in config.train.log_to for name in TRACKERS},
    }
    return [extra for extra, used in extras.items() if used]


def _adapt_extras(context: Context) -> list[str]:
    from anarchobot.exchange.pretrained import load_pretrained
    from anarchobot.vocab.token_alignment import BASELINES, choose_method

    config = context.adapt.config
    method = config.alignment.method or choose_method(load_pretrained(config.models.source_model).model.tie_embeddings)
    return [] if method in BASELINES else ["vocab"]


def _installed(context: Context, extras: Collection[str] | None) -> Outcome:
    """Checks the packages of `extras`, or with None the core requirements."""
    from packaging.requirements import Requirement

    wanted = requirements() if extras is None else sorted(set(requirements(extras)) - set(requirements()))
    problems = unmet(wanted, installed_version)
    if problems:
        suffix = f"[{','.join(extras)}]" if extras else ""
        return (
            "fail",
            "; ".join(problems),
            f"pip install --upgrade '{PACKAGE}{suffix}' (in a source checkout: pip install -e '.{suffix}')",
        )
    names = [Requirement(text).name for text in wanted]
    return "pass", ", ".join(f"{name} {installed_version(name)}" for name in names) or "none"
