"""Loads a YAML file and command-line overrides into a validated configuration, and records where each value is set."""

import json
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from anarchobot.config.errors import UserError, did_you_mean
from anarchobot.config.names_elsewhere import KEYS_ELSEWHERE
from anarchobot.config.schema import Config, ModelConfig, Section
from anarchobot.config.strict_yaml import MAX_BYTES, YamlMapping, parse, parse_scalar
from anarchobot.config.validation import RUN_LENGTH_KEYS, conflicts

MAX_ERRORS, MAX_KEYS = 3, 10  # in a message
COMMAND_LINE = "command line"
# Model settings that do not depend on the weights, and so may differ from a pretrained model's.
WEIGHT_INDEPENDENT_KEYS = ("dropout", "max_seq_len", "bos_id")

Schema = TypeVar("Schema", bound=Section)
Override = str | tuple[str, Any]  # `section.key=value`, or a key and a value that is used as it is


@dataclass(frozen=True)
class Loaded(Generic[Schema]):
    """A validated configuration and the source of each setting: `"file.yaml:12"` or `"command line"`.

    `aliases` maps a key to the deprecated name under which it was set.
    """

    config: Schema
    sources: dict[str, str]
    aliases: dict[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """Describes a setting for an error message: `"configs/a.yaml:3: model.vocab_size"`."""
        source = self.sources.get(key)
        return f"{source}: {self.aliases.get(key, key)}" if source else f"{key} (default)"


LoadedConfig = Loaded[Config]


@dataclass
class _Settings:
    """Settings that are not validated yet."""

    values: dict[str, Any]
    sources: dict[str, str]
    schema: type[Section]
    path: str = ""
    aliases: dict[str, str] = field(default_factory=dict)


def load(path: str | Path | None, overrides: Sequence[Override], schema: type[Schema]) -> Loaded[Schema]:
    """Like `load_config`, for any schema."""
    settings = _read_settings(path, overrides, schema)
    return Loaded(_validate(settings, schema), settings.sources, settings.aliases)


def load_config(
    path: str | Path | None,
    overrides: Sequence[Override] = (),
    base_model: Callable[[str], ModelConfig] | None = None,
    *,
    limit_lengths: bool = False,
) -> LoadedConfig:
    """Loads and validates a configuration. Precedence: command line, file, default. Later overrides win.

    With `base_model`, train.init_from is required and `base_model(train.init_from)` returns the model section, of
    which only WEIGHT_INDEPENDENT_KEYS can be changed. With `limit_lengths`, the file has defaults for any model: its
    data.seq_len is at most model.max_seq_len, and its grpo.max_completion_length half of data.seq_len. Raises UserError
    with file, line and key.
    """
    settings = _read_settings(path, overrides, Config)
    if base_model is not None:
        _use_base_model(settings, base_model)
    if limit_lengths:
        _limit(settings, "data.seq_len", "model.max_seq_len")
        _limit(settings, "grpo.max_completion_length", "data.seq_len", 2)
    config = _validate(settings, Config)
    leaves = leaf_keys()
    loaded = LoadedConfig(config, {key: source for key, source in settings.sources.items() if key in leaves})
    _reject_conflicts(loaded)
    return loaded


def override(config: Config, section_names: Sequence[str], overrides: Sequence[Override]) -> Config:
    """A valid configuration's sections, overridden; all other sections have their defaults. Raises UserError."""
    sections = {name: getattr(config, name).model_dump() for name in section_names}
    values = [(f"{name}.{key}", value) for name, section in sections.items() for key, value in section.items()]
    return load_config(None, [*values, *overrides]).config


def sections(path: str | Path | None, words: Sequence[str]) -> set[str]:
    """Returns the names of the sections set by a file and KEY=VALUE words. Raises UserError for an unreadable file."""
    in_file = {} if path is None else parse(_read(Path(path)), str(path)).values
    return {*in_file, *(word.partition(".")[0] for word in words)}


def config_from_dict(values: dict[str, Any], name: str) -> Config:
    """Validates the configuration stored in a checkpoint. Raises UserError if this version does not support it."""
    settings = _Settings(values, {}, Config, name)
    if isinstance(values, dict):
        _drop_removed(settings, in_checkpoint=True)
    try:
        return Config.model_validate(settings.values)
    except ValidationError as error:
        raise UserError(f"{name}: {_describe(error, _Settings({}, {}, Config))}") from error


def leaf_keys(schema: type[BaseModel] = Config) -> dict[str, FieldInfo]:
    """Returns every dotted key in the order of the schema: `{"model.vocab_size": FieldInfo, ...}`."""
    keys: dict[str, FieldInfo] = {}
    for name, info in schema.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys |= {f"{name}.{key}": leaf for key, leaf in leaf_keys(inner).items()}
        else:
            keys[name] = info
    return keys


def find_key(name: str, schema: type[BaseModel] = Config) -> str | None:
    """Returns the dotted key of a setting named without its section, or with its name in another program."""
    keys = leaf_keys(schema)
    found = [key for key in keys if key.endswith(f".{name}")]
    elsewhere = KEYS_ELSEWHERE.get(name)
    return found[0] if found else elsewhere if elsewhere in keys else None


def dotted_items(values: dict[str, Any], parents: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every dotted key with its value, each section before its keys."""
    for name, value in values.items():
        yield f"{parents}{name}", value
        if isinstance(value, dict):
            yield from dotted_items(value, f"{parents}{name}.")


def _read_settings(path: str | Path | None, overrides: Sequence[Override], schema: type[Section]) -> _Settings:
    file = YamlMapping() if path is None else parse(_read(Path(path)), str(path))
    settings = _Settings(
        file.values, {key: f"{path}:{line}" for key, line in file.lines.items()}, schema, str(path or "")
    )
    _resolve_aliases(settings)
    for override in overrides:
        key, value = _parse_override(override, schema) if isinstance(override, str) else override
        _apply_override(settings, key, value)
    _drop_removed(settings)
    return settings


def _resolve_aliases(settings: _Settings) -> None:
    """Moves the values of a file that are set under deprecated names to the current keys."""
    for old, alias in settings.schema.aliases.items():
        if old not in settings.sources:
            continue
        source = settings.sources[old]
        if alias.key in settings.sources:
            raise _duplicate_key_error(source, old, alias.key, settings.sources[alias.key])
        section, _, leaf = old.partition(".")
        keys = settings.values[section]
        keys[alias.key.partition(".")[2]] = _convert(settings, old, keys.pop(leaf), source)
        settings.sources = {alias.key if key == old else key: place for key, place in settings.sources.items()}
        settings.aliases[alias.key] = old


def _drop_removed(settings: _Settings, in_checkpoint: bool = False) -> None:
    """Drops removed switches that are off. Raises UserError for one that is on; in a checkpoint, only if its weights
    depend on it."""
    for key, removed in settings.schema.removed.items():
        section, _, leaf = key.partition(".")
        keys = settings.values.get(section)
        if not isinstance(keys, dict) or leaf not in keys:
            continue
        if keys[leaf] is not False and (removed.in_weights or not in_checkpoint):
            raise UserError(f"{settings.sources.pop(key, settings.path)}: {key}: {removed.remedy}")
        settings.values = {**settings.values, section: {name: v for name, v in keys.items() if name != leaf}}
        settings.sources.pop(key, None)


def _convert(settings: _Settings, old: str, value: Any, source: str) -> Any:
    """Converts the value of a deprecated key to a value of its current key."""
    values = settings.schema.aliases[old].values
    if values is None:
        return value
    if not isinstance(value, bool):
        raise UserError(f"{source}: {old}: expected true or false, got {_format(value)}")
    return values[value]


def _duplicate_key_error(source: str, old: str, key: str, other: str) -> UserError:
    return UserError(f"{source}: {old}: deprecated name of {key}, which is also set ({other}): keep one")


def _validate(settings: _Settings, schema: type[Schema]) -> Schema:
    try:
        return schema.model_validate({k: {} if v is None else v for k, v in settings.values.items()})
    except ValidationError as error:
        raise UserError(_describe(error, settings)) from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)  # limited: the path may be a shard or a device
    except FileNotFoundError as error:
        hint = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise UserError(f"{path}: no such file{hint}") from error
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise UserError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from error


def _parse_override(word: str, schema: type[BaseModel]) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    section, _, leaf = key.partition(".")
    if not (equals and section and leaf):
        full = find_key(key, schema) if equals else None
        hint = f"; did you mean '{full}={text}'?" if full else ", such as train.lr=1e-3"
        raise UserError(f"{COMMAND_LINE}: '{word}': expected SECTION.KEY=VALUE{hint}")
    return key, parse_scalar(text, key)


def _apply_override(settings: _Settings, key: str, value: Any) -> None:
    sources, name = settings.sources, key
    if name in settings.schema.aliases:
        value = _convert(settings, name, value, COMMAND_LINE)
        key = settings.schema.aliases[name].key
    earlier = settings.aliases.pop(key, key)
    if sources.get(key) == COMMAND_LINE and earlier != name:
        raise _duplicate_key_error(COMMAND_LINE, name if name != key else earlier, key, COMMAND_LINE)
    if name != key:
        settings.aliases[key] = name
    parents, leaf = _split(key, settings.schema)
    keys, section = settings.values, ""
    for parent in parents.split("."):
        section = f"{section}.{parent}".removeprefix(".")
        inner = keys.get(parent)
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"{sources[section]}: {section}: expected a mapping, got {_format(inner)}")
        keys[parent] = keys = {**(inner or {})}
        sources.setdefault(section, COMMAND_LINE)
    keys[leaf] = value
    sources[key] = COMMAND_LINE
    if key in RUN_LENGTH_KEYS and value is not None:  # replaces the one in the file; two on the command line conflict
        for other in RUN_LENGTH_KEYS:
            if sources.get(other, COMMAND_LINE) != COMMAND_LINE:
                del sources[other], keys[other.partition(".")[2]]


def _use_base_model(settings: _Settings, base_model: Callable[[str], ModelConfig]) -> None:
    model, train = settings.values.get("model"), settings.values.get("train")
    path = train.get("init_from") if isinstance(train, dict) else None
    if not isinstance(path, str):
        source = settings.sources.get("train.init_from")
        raise UserError(
            f"{f'{source}: ' if source else ''}train.init_from (--model): expected the model to fine-tune: a run "
            "folder, a Hugging Face model folder, or a name on the Hub (ORG/NAME)"
        )
    if isinstance(model, dict | None):  # validation rejects anything else
        base = base_model(path).model_dump()
        for key, value in (model or {}).items():
            if key in base and key not in WEIGHT_INDEPENDENT_KEYS and value != base[key]:
                raise UserError(
                    f"{settings.sources[f'model.{key}']}: model.{key}: {_format(value)}, but the model in {path} has "
                    f"{_format(base[key])}: remove it"
                )
        settings.values["model"] = {**base, **(model or {})}


def _limit(settings: _Settings, key: str, limit_key: str, divisor: int = 1) -> None:
    """Limits a setting of the file to that of `limit_key` over `divisor`; validation rejects what is no number."""
    section, leaf = key.split(".")
    limit_section, limit_leaf = limit_key.split(".")
    limit = settings.values[limit_section].get(limit_leaf)
    if settings.sources.get(key, COMMAND_LINE) != COMMAND_LINE and isinstance(limit, int):
        settings.values[section][leaf] = min(settings.values[section][leaf], limit // divisor)


def _reject_conflicts(loaded: LoadedConfig) -> None:
    """Raises UserError for the first conflict, in the order in which settings were given.

    The error names the key of the conflict that was set first, or the first one on the command line, since an override
    of a valid file is the more likely mistake.
    """
    order = list(loaded.sources)
    given = [key for key in order if attrgetter(key)(loaded.config) is not None]
    found = []
    for keys, problem in conflicts(loaded.config, given):
        # Without a key that was set, a default conflicts with the base model.
        known = [key for key in keys if key in order] or ["train.init_from"]
        ranks = [(loaded.sources[key] != COMMAND_LINE, order.index(key)) for key in known]
        found.append((min(ranks)[1], problem))
    if found:
        index, problem = min(found)
        raise UserError(f"{loaded.where(order[index])}: {problem}")


def _describe(error: ValidationError, settings: _Settings) -> str:
    """Returns the errors in file order, missing keys last, each as `file:line: key: what was expected`: the first
    MAX_ERRORS, and how many more there are."""
    order = list(settings.sources)
    problems: dict[str, Any] = {}
    for problem in error.errors(include_url=False):
        problems.setdefault(_key_of(problem["loc"], settings.schema), problem)
    keys = sorted(problems, key=lambda k: order.index(k) if k in order else len(order))
    lines = []
    for key in keys[:MAX_ERRORS]:
        parts = [
            settings.sources.get(key, settings.path),
            settings.aliases.get(key, key),
            _describe_problem(key, problems[key], settings.schema),
        ]
        lines.append(": ".join(filter(None, parts)))
    more = f" (and {len(keys) - MAX_ERRORS} more)" if len(keys) > MAX_ERRORS else ""
    return "; also ".join(lines) + more


def _key_of(location: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """Returns the dotted key of a location in the values, without positions inside the key's value."""
    key = ""
    for part in location:
        if key and key not in _section_names(schema):
            break
        key = f"{key}.{part}".removeprefix(".")
    return key


def _section_names(schema: type[BaseModel]) -> set[str]:
    return {key.rpartition(".")[0] for key in leaf_keys(schema)}


def _split(key: str, schema: type[BaseModel]) -> tuple[str, str]:
    """Splits a dotted key into its innermost known section and the rest."""
    section, _, leaf = key.partition(".")
    head, _, rest = leaf.partition(".")
    while rest and f"{section}.{head}" in _section_names(schema):
        section, leaf = f"{section}.{head}", rest
        head, _, rest = leaf.partition(".")
    return section, leaf


def _describe_problem(key: str, problem: Any, schema: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden":
        return _unknown(key, schema)
    if problem["type"] == "missing":
        return "is required"
    if key not in leaf_keys(schema):
        return f"expected a mapping, got {_format(problem['input'])}"
    return f"expected {describe_type(leaf_keys(schema)[key])}, got {_format(problem['input'])}"


def _unknown(key: str, schema: type[BaseModel]) -> str:
    section, leaf = _split(key, schema)
    keys = leaf_keys(schema)
    if not leaf:
        elsewhere = find_key(section, schema)
        hint = f"; move it under '{elsewhere.split('.')[0]}:'" if elsewhere else ""
        return f"unknown section{hint or did_you_mean(section, schema.model_fields)}"
    synonym = KEYS_ELSEWHERE.get(leaf, "")
    if near := synonym if synonym in keys and synonym.startswith(f"{section}.") else find_key(leaf, schema):
        return f"unknown key; did you mean '{near}'?"
    known = [k.removeprefix(f"{section}.").partition(".")[0] for k in keys if k.startswith(f"{section}.")]
    known = list(dict.fromkeys(known))
    if hint := did_you_mean(leaf, known) or did_you_mean(leaf, keys):
        return f"unknown key{hint}"
    if len(known) <= MAX_KEYS:
        return f"unknown key; keys of {section}: {', '.join(known)}"
    return "unknown key; all keys: docs/configuration.md"


def describe_type(info: FieldInfo) -> str:
    """Describes the values that a field accepts: `"an integer >= 1, or null"`."""
    return _describe_annotation(info.annotation, list(info.metadata))


def _describe_annotation(annotation: Any, metadata: list[Any], plural: bool = False) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _describe_annotation(args[0], [*args[1:], *metadata], plural)
    if origin is typing.Literal:
        return " | ".join(json.dumps(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        parts = [_describe_annotation(a, metadata) for a in args if a is not type(None)]
        return ", or ".join(parts) + (", or null" if type(None) in args else "")
    if origin is list:
        return f"a list of {_describe_annotation(args[0], [], plural=True)}"
    one, several = {
        int: ("an integer", "integers"),
        float: ("a number", "numbers"),
        bool: ("true or false", "booleans"),
        str: ("a string", "strings"),
    }[annotation]
    return (several if plural else one) + _describe_bounds(metadata)


def _describe_bounds(metadata: list[Any]) -> str:
    flat = [m for item in metadata for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    parts = [
        f"{sign} {getattr(item, bound)}"
        for item in flat
        for bound, sign in signs.items()
        if getattr(item, bound, None) is not None
    ]
    return f" {' and '.join(parts)}" if parts else ""


def _format(value: Any) -> str:
    """Returns `value` as it would be written in the file, on one line of at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
