"""Strict YAML: reads plain values with the line number of each key, and writes them.

PyYAML follows YAML 1.1, where `3e-4` is a string, `no` is false, `0123` is 83, `12:30` is 750 and duplicate keys are
accepted. This module resolves scalars by the YAML 1.2 core schema. Duplicate keys, aliases and tags are errors.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from anarchobot.config.errors import UserError

MAX_BYTES = 1_000_000
MAX_DEPTH = 16

_INT = re.compile(r"[-+]?(0|[1-9](_?[0-9]){0,19})$|0x[0-9a-fA-F]{1,16}$|0o[0-7]{1,21}$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_SPECIAL = re.compile(r"([-+]?\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$")
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "True": True, "false": False, "False": False}


@dataclass
class YamlMapping:
    """The values of a YAML mapping, and the line number of each key by its dotted name."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)


class _Rejected(yaml.MarkedYAMLError):
    """Valid YAML that is not supported here. `where` is a node or an event."""

    def __init__(self, problem: str, where: Any) -> None:
        super().__init__(problem=problem, problem_mark=where.start_mark)


def parse(raw: bytes, name: str) -> YamlMapping:
    """Reads a YAML document with a mapping at the top level. An empty document is an empty mapping.

    Raises UserError with `name` and the line number for anything else.
    """
    if len(raw) > MAX_BYTES:
        raise UserError(f"{name}: larger than 1 MB: not a configuration file")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{line}: not UTF-8: expected a YAML file") from error
    result = YamlMapping()
    try:
        root = _compose(text)
        if isinstance(root, yaml.MappingNode):
            result.values = _mapping(root, "", result.lines)
        elif root is not None and _value(root, "", {}) is not None:
            kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
            raise _Rejected(f"expected sections such as 'model:' at the top level, got {kind}", root)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: invalid escapes
        raise UserError(f"{name}{_describe(error, text)}") from error
    return result


def parse_scalar(text: str, name: str) -> Any:
    """Parses the value of a command-line override `name=text` as it would be parsed in a file.

    >>> [parse_scalar(text, "x") for text in ("3e-4", "true", "[a, b]", "runs/x")]
    [0.0003, True, ['a', 'b'], 'runs/x']
    """
    try:
        node = _compose(text)
        return None if node is None else _value(node, "", {})
    except _Rejected as error:
        raise UserError(f"command line: {name}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"command line: {name}: {text!r} is not a YAML value (strings may need quotes)") from error


def dump(values: dict[str, Any], *, flow: bool = False) -> str:
    """Returns values as YAML that `parse` reads back unchanged; with `flow`, on one line as `{a: 1}`."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=2**31, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def _text(self, text: str) -> yaml.ScalarNode:
        # '3e-4' is a number here, a string to PyYAML. Unicode line breaks survive only as escapes in double quotes.
        quotes = '"' if not isinstance(_plain(text), str) or re.search("[\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=quotes)


_Dumper.add_representer(str, _Dumper._text)


def _compose(text: str) -> yaml.Node | None:
    # Events are produced without recursion or alias expansion, so deeply nested files and alias bombs are cheap here.
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise _Rejected(f"aliases (*{event.anchor}) are not supported: repeat the value", event)
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _Rejected(f"tags ({tag}) are not supported: use a plain value", event)
        if isinstance(event, yaml.ScalarEvent) and re.search("[\ud800-\udfff]", event.value):
            raise _Rejected("invalid character escape", event)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _Rejected(f"nested more than {MAX_DEPTH} levels deep", event)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    return node


def _mapping(node: yaml.MappingNode, prefix: str, lines: dict[str, int]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _Rejected("keys must be plain strings", key_node)
        key = key_node.value
        dotted = f"{prefix}{key}"
        if "." in key:
            section, _, leaf = key.partition(".")
            raise _Rejected(
                f"{dotted}: dotted keys are not supported in files: put '{leaf}:' under '{section}:'", key_node
            )
        if key in result:
            raise _Rejected(f"{dotted}: duplicate key (first on line {lines[dotted]})", key_node)
        lines[dotted] = key_node.start_mark.line + 1
        result[key] = _value(value_node, f"{dotted}.", lines)
    return result


def _value(node: yaml.Node, prefix: str, lines: dict[str, int]) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, prefix, lines)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, prefix, lines) for item in node.value]
    assert isinstance(node, yaml.ScalarNode)
    return node.value if node.style else _plain(node.value)  # style: quotes or a block scalar


def _plain(text: str) -> Any:
    """YAML 1.2 core schema, plus `_` between the digits of integers. `0123` remains a string."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.match(text):
        return int(text.replace("_", ""), 0)
    if _FLOAT.match(text):
        return float(text)
    if _SPECIAL.match(text):
        return float(text.replace(".", "", 1))
    return text


def _describe(error: Exception, text: str) -> str:
    """Returns `":3: what is wrong"`, to be appended to the file name."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f":{line}: invalid YAML: control character U+{error.character:04X}"
    if not isinstance(error, yaml.MarkedYAMLError):
        return ": invalid YAML: invalid character escape"
    mark = error.problem_mark or error.context_mark
    where = f":{mark.line + 1}" if mark else ""
    if isinstance(error, _Rejected):
        return f"{where}: {error.problem}"
    hint = " (indent with spaces)" if "'\\t'" in (error.problem or "") else ""
    return f"{where}: invalid YAML: {', '.join(part for part in (error.context, error.problem) if part)}{hint}"
