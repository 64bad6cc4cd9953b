"""A file and the command line's KEY=VALUE into one checked Config, which remembers where each value came from."""

import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from anarchobot.config.checks import RUN_LENGTHS, contradictions
from anarchobot.config.errors import UserError, did_you_mean
from anarchobot.config.schema import Config
from anarchobot.config.yaml_tree import Tree, parse, parse_scalar


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration and, for each key that somebody set, where: `"file.yaml:12"` or `"command line"`."""

    config: Config
    sources: dict[str, str]

    def where(self, key: str) -> str:
        """`"configs/a.yaml:3: model.vocab_size"`: how an error found later names a setting."""
        source = self.sources.get(key)
        return f"{source}: {key}" if source else f"{key} (its default)"


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> LoadedConfig:
    """Reads and checks a configuration. Precedence: command line, file, default.

    `overrides` holds `section.key=value` words. Raises UserError, one line that names file, line and key.
    """
    name = "command line" if path is None else str(path)
    tree = Tree() if path is None else parse(_read(Path(path)), name)
    sources = {key: f"{name}:{line}" for key, line in tree.lines.items()}
    for word in overrides or []:
        _override(tree.values, sources, word)
    try:
        config = Config.model_validate({k: {} if v is None else v for k, v in tree.values.items()})
    except ValidationError as error:
        raise UserError(_describe(error, sources)) from error
    loaded = LoadedConfig(config, {key: source for key, source in sources.items() if "." in key})
    for key, problem in contradictions(config, list(loaded.sources)):
        raise UserError(f"{loaded.where(key)}: {problem}")
    return loaded


def config_from_dict(values: dict[str, Any], name: str) -> Config:
    """The configuration that a checkpoint carries. Raises UserError when this version doesn't know it."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{name}: {_describe(error, {})}") from error


def leaf_keys() -> dict[str, FieldInfo]:
    """Every dotted key of the schema, in its order: `{"model.vocab_size": FieldInfo, ...}`."""
    return {
        f"{section}.{key}": info
        for section, section_info in Config.model_fields.items()
        for key, info in typing.cast(type[BaseModel], section_info.annotation).model_fields.items()
    }


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > 1_000_000:  # before reading it: it may be a shard given by mistake
            raise UserError(f"{path}: larger than 1 MB: that is no configuration")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [])
        raise UserError(f"{path}: no such file{near}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}): expected a YAML configuration") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error


def _override(values: dict[str, Any], sources: dict[str, str], word: str) -> None:
    key, equals, text = word.partition("=")
    section, dot, leaf = key.partition(".")
    if not (equals and dot and section and leaf):
        raise UserError(f"command line: {word!r}: expected SECTION.KEY=VALUE, such as train.lr=1e-3")
    if not isinstance(values.setdefault(section, {}) or {}, dict):
        raise UserError(f"{sources.get(section, section)}: {section}: expected a section, got a single value")
    values[section] = (values[section] or {}) | {leaf: parse_scalar(text)}
    sources.setdefault(section, "command line")
    sources.pop(key, None)  # set again, so last in the order of setting
    sources[key] = "command line"
    if key in RUN_LENGTHS:  # one length replaces another that the file gives; two on the command line contradict
        for other in RUN_LENGTHS:
            if other != key and sources.get(other, "command line") != "command line":
                del sources[other], values[section][other.split(".")[1]]


def _describe(error: ValidationError, sources: dict[str, str]) -> str:
    """The first problem in the file's order as `file:line: key: what was expected`, and how many more there are."""
    problems = error.errors(include_url=False)
    located = [(".".join(str(part) for part in p["loc"][:2]), p) for p in problems]
    order = list(sources)
    located.sort(key=lambda item: order.index(item[0]) if item[0] in sources else -1)
    key, problem = located[0]
    distinct = len({k for k, _ in located})
    more = f" ({distinct - 1} more after this one)" if distinct > 1 else ""
    source = sources.get(key)
    return f"{source + ': ' if source else ''}{key}: {_expected(key, problem)}{more}"


def _expected(key: str, problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return _unknown(key)
    section, _, leaf = key.partition(".")
    if not leaf:
        return f"expected a section of keys, got {problem['input']!r}"
    info = leaf_keys()[key]
    return f"expected {expectation(info)}, got {_shown(problem['input'])}"


def _unknown(key: str) -> str:
    section, _, leaf = key.partition(".")
    if not leaf:
        elsewhere = [k for k in leaf_keys() if k.endswith(f".{section}")]
        hint = f"; it belongs under '{elsewhere[0].split('.')[0]}:'" if elsewhere else ""
        return f"unknown section{hint or did_you_mean(section, Config.model_fields)}"
    own = [k.split(".")[1] for k in leaf_keys() if k.startswith(f"{section}.")]
    near = did_you_mean(leaf, own)
    if not near:
        elsewhere = [k for k in leaf_keys() if k.endswith(f".{leaf}")]
        near = f"; did you mean '{elsewhere[0]}'?" if elsewhere else f"; {section} has {', '.join(own)}"
    return f"unknown key{near}"


def expectation(info: FieldInfo) -> str:
    """What a field takes, in words: `"a whole number of at least 1, or null"`."""
    return _type_in_words(info.annotation, list(info.metadata))


def _type_in_words(annotation: Any, metadata: list[Any]) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_in_words(args[0], [*args[1:], *metadata])
    if origin is typing.Literal:
        return " | ".join(f'"{a}"' for a in args)
    if origin in (typing.Union, types.UnionType):
        words = [_type_in_words(a, metadata) for a in args if a is not type(None)]
        return ", or ".join(words) + (", or null" if type(None) in args else "")
    if origin is list:
        return "a list of texts"
    name = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]
    return name + _bounds_in_words(metadata)


def _bounds_in_words(metadata: list[Any]) -> str:
    flat = [m for item in metadata for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
    words = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
    parts = [
        f"{words[bound]} {getattr(item, bound):g}"
        for item in flat
        for bound in ("ge", "gt", "le", "lt")
        if getattr(item, bound, None) is not None
    ]
    return f" {' and '.join(parts)}" if parts else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
