"""A file and the command line's KEY=VALUE into one checked Config, which remembers where each value came from."""

import json
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from anarchobot.config.errors import UserError, did_you_mean
from anarchobot.config.schema import Config, ModelConfig
from anarchobot.config.strict_yaml import MAX_BYTES, Tree, parse, parse_scalar
from anarchobot.config.validation import RUN_LENGTHS, contradictions

COMMAND_LINE = "command line"
UNBOUND = ("dropout", "max_seq_len", "bos_id", "zero_init_proj")  # of a model: what its weights don't decide

Schema = TypeVar("Schema", bound=BaseModel)


@dataclass(frozen=True)
class Loaded(Generic[Schema]):
    """A checked configuration and, for each key that somebody set, where: `"file.yaml:12"` or `"command line"`."""

    config: Schema
    sources: dict[str, str]

    def where(self, key: str) -> str:
        """`"configs/a.yaml:3: model.vocab_size"`: how an error found later names a setting."""
        source = self.sources.get(key)
        return f"{source}: {key}" if source else f"{key} (its default)"


class LoadedConfig(Loaded[Config]):
    """The configuration that all commands share, loaded."""


def load(path: str | Path | None, overrides: Sequence[str | tuple[str, Any]], schema: type[Schema]) -> Loaded[Schema]:
    """Reads and checks a configuration of any schema, as `load_config` does."""
    values, sources = _read_settings(path, overrides, schema)
    return Loaded(_checked(values, sources, schema), sources)


def load_config(
    path: str | Path | None,
    overrides: Sequence[str | tuple[str, Any]] = (),
    base_model: Callable[[str], ModelConfig] | None = None,
) -> LoadedConfig:
    """Reads and checks a configuration. Precedence: command line, file, default.

    `overrides` holds `section.key=value` words, and (key, value) pairs whose value is taken as it is; later ones are
    stronger. With `base_model`, the model section is what it gives for train.init_from, which must be there, and only
    UNBOUND keys may say otherwise. Raises UserError, one line that names file, line and key.
    """
    values, sources = _read_settings(path, overrides, Config)
    if base_model is not None:
        _take_model(values, sources, base_model)
    config = _checked(values, sources, Config)
    loaded = LoadedConfig(config, {key: source for key, source in sources.items() if "." in key})
    _refuse_contradictions(loaded)
    return loaded


def sections(path: str | Path | None, words: Sequence[str]) -> set[str]:
    """The sections that a file and KEY=VALUE words speak of. Raises UserError when the file can't be read."""
    in_file = {} if path is None else parse(_read(Path(path)), str(path)).values
    return {*in_file, *(word.partition(".")[0] for word in words)}


def config_from_dict(values: dict[str, Any], name: str) -> Config:
    """The configuration that a checkpoint carries. Raises UserError when this version doesn't know it."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{name}: {_describe(error, {}, Config)}") from error


def leaf_keys(schema: type[BaseModel] = Config) -> dict[str, FieldInfo]:
    """Every dotted key of the schema, in its order: `{"model.vocab_size": FieldInfo, ...}`."""
    keys: dict[str, FieldInfo] = {}
    for name, info in schema.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys |= {f"{name}.{key}": leaf for key, leaf in leaf_keys(inner).items()}
        else:
            keys[name] = info
    return keys


def _read_settings(
    path: str | Path | None, overrides: Sequence[str | tuple[str, Any]], schema: type[BaseModel]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the file and the command line say, and where; not checked yet."""
    tree = Tree() if path is None else parse(_read(Path(path)), str(path))
    sources = {key: f"{path}:{line}" for key, line in tree.lines.items()}
    for override in overrides:
        key, value = _parsed(override, schema) if isinstance(override, str) else override
        _override(tree.values, sources, key, value, schema)
    return tree.values, sources


def _checked(values: dict[str, Any], sources: dict[str, str], schema: type[Schema]) -> Schema:
    try:
        return schema.model_validate({k: {} if v is None else v for k, v in values.items()})
    except ValidationError as error:
        raise UserError(_describe(error, sources, schema)) from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)  # no more: it may be a shard given by mistake
    except FileNotFoundError as error:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise UserError(f"{path}: no such file{near}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error


def _parsed(word: str, schema: type[BaseModel]) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    section, _, leaf = key.partition(".")
    if not (equals and section and leaf):
        full = [k for k in leaf_keys(schema) if k.endswith(f".{key}")] if equals else []
        near = f"; did you mean '{full[0]}={text}'?" if full else ", such as train.lr=1e-3"
        raise UserError(f"{COMMAND_LINE}: '{word}': expected SECTION.KEY=VALUE{near}")
    return key, parse_scalar(text, key)


def _override(values: dict[str, Any], sources: dict[str, str], key: str, value: Any, schema: type[BaseModel]) -> None:
    whole, leaf = _split(key, schema)
    keys, section = values, ""
    for parent in whole.split("."):
        section = f"{section}.{parent}".removeprefix(".")
        inner = keys.get(parent)
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"{sources[section]}: {section}: expected a section of keys, got {_shown(inner)}")
        keys[parent] = keys = {**(inner or {})}
        sources.setdefault(section, COMMAND_LINE)
    keys[leaf] = value
    sources[key] = COMMAND_LINE
    if key in RUN_LENGTHS and value is not None:  # it replaces one in the file; two on the command line contradict
        for other in RUN_LENGTHS:
            if sources.get(other, COMMAND_LINE) != COMMAND_LINE:
                del sources[other], keys[other.partition(".")[2]]


def _take_model(values: dict[str, Any], sources: dict[str, str], base_model: Callable[[str], ModelConfig]) -> None:
    own, train = values.get("model"), values.get("train")
    path = train.get("init_from") if isinstance(train, dict) else None
    if not isinstance(path, str):
        source = sources.get("train.init_from")
        raise UserError(
            f"{f'{source}: ' if source else ''}train.init_from (--model): expected the model to tune: a run's "
            "folder, or a Hugging Face model's"
        )
    if isinstance(own, dict | None):  # anything else is refused by the types
        base = base_model(path).model_dump()
        for key, value in (own or {}).items():
            if key in base and key not in UNBOUND and value != base[key]:
                raise UserError(
                    f"{sources[f'model.{key}']}: model.{key}: {_shown(value)}, and the model in {path} has "
                    f"{_shown(base[key])}: leave it out"
                )
        values["model"] = {**base, **(own or {})}


def _refuse_contradictions(loaded: LoadedConfig) -> None:
    """Tells the first contradiction in the order of setting. Of its keys the first one set takes the blame, or the
    first on the command line: that is the likelier slip."""
    order = list(loaded.sources)
    given = [key for key in order if attrgetter(key)(loaded.config) is not None]
    found = []
    for keys, problem in contradictions(loaded.config, given):
        ranks = [(loaded.sources[key] != COMMAND_LINE, order.index(key)) for key in keys if key in order]
        found.append((min(ranks)[1], problem))
    if found:
        index, problem = min(found)
        raise UserError(f"{loaded.where(order[index])}: {problem}")


def _describe(error: ValidationError, sources: dict[str, str], schema: type[BaseModel]) -> str:
    """The first problem in the file's order as `file:line: key: what was expected`, and how many more there are."""
    order = list(sources)
    problems: dict[str, Any] = {}
    for problem in error.errors(include_url=False):
        problems.setdefault(_key_of(problem["loc"], schema), problem)
    key = min(problems, key=lambda k: order.index(k) if k in sources else -1)
    more = f" ({len(problems) - 1} more after this one)" if len(problems) > 1 else ""
    return ": ".join(part for part in (sources.get(key), key, _expected(key, problems[key], schema)) if part) + more


def _key_of(place: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """The dotted key of a place in the values, without what is inside a key's own value."""
    key = ""
    for part in place:
        if key and key not in _sections(schema):
            break
        key = f"{key}.{part}".removeprefix(".")
    return key


def _sections(schema: type[BaseModel]) -> set[str]:
    return {key.rpartition(".")[0] for key in leaf_keys(schema)}


def _split(key: str, schema: type[BaseModel]) -> tuple[str, str]:
    """A dotted key as its section, the innermost that there is, and the rest."""
    section, _, leaf = key.partition(".")
    head, _, rest = leaf.partition(".")
    while rest and f"{section}.{head}" in _sections(schema):
        section, leaf = f"{section}.{head}", rest
        head, _, rest = leaf.partition(".")
    return section, leaf


def _expected(key: str, problem: Any, schema: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden":
        return _unknown(key, schema)
    if problem["type"] == "missing":
        return "is missing"
    if key not in leaf_keys(schema):
        return f"expected a section of keys, got {_shown(problem['input'])}"
    return f"expected {expectation(leaf_keys(schema)[key])}, got {_shown(problem['input'])}"


def _unknown(key: str, schema: type[BaseModel]) -> str:
    section, leaf = _split(key, schema)
    keys = leaf_keys(schema)
    elsewhere = [k for k in keys if k.endswith(f".{leaf or section}")]
    if not leaf:
        hint = f"; it belongs under '{elsewhere[0].split('.')[0]}:'" if elsewhere else ""
        return f"unknown section{hint or did_you_mean(section, schema.model_fields)}"
    if elsewhere:
        return f"unknown key; did you mean '{elsewhere[0]}'?"
    own = [k.removeprefix(f"{section}.") for k in keys if k.startswith(f"{section}.")]
    near = did_you_mean(leaf, own) or did_you_mean(leaf, keys)
    return "unknown key" + (near or f"; {section} has {', '.join(own)}")


def expectation(info: FieldInfo) -> str:
    """What a field takes, in words: `"a whole number of at least 1, or null"`."""
    return _type_in_words(info.annotation, list(info.metadata))


def _type_in_words(annotation: Any, metadata: list[Any]) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_in_words(args[0], [*args[1:], *metadata])
    if origin is typing.Literal:
        return " | ".join(json.dumps(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        words = [_type_in_words(a, metadata) for a in args if a is not type(None)]
        return ", or ".join(words) + (", or null" if type(None) in args else "")
    if origin is list:
        return f"a list, each {_type_in_words(args[0], [])}"
    name = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]
    return name + _bounds_in_words(metadata)


def _bounds_in_words(metadata: list[Any]) -> str:
    flat = [m for item in metadata for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
    words = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
    parts = [
        f"{words[bound]} {getattr(item, bound)}"
        for item in flat
        for bound in ("ge", "gt", "le", "lt")
        if getattr(item, bound, None) is not None
    ]
    return f" {' and '.join(parts)}" if parts else ""


def _shown(value: Any) -> str:
    """`value` as one would write it in the file, on one line, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
