"""YAML text to plain values, each with the line it stands on, and back.

PyYAML follows YAML 1.1 and takes what surprises people: `3e-4` is text, `no` is false, `0123` is 83, `12:30` is 750, a
key given twice counts once. Here scalars are resolved by YAML 1.2's core rules and the rest is refused with its line.
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
class Tree:
    """A mapping of the file: its plain values and the line of every key, by dotted name."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)


class _Refused(yaml.MarkedYAMLError):
    """YAML that a configuration has no use for; `where` is a node or an event."""

    def __init__(self, problem: str, where: Any) -> None:
        super().__init__(problem=problem, problem_mark=where.start_mark)


def parse(raw: bytes, name: str) -> Tree:
    """Reads a YAML document whose top is a mapping (an empty document is an empty mapping).

    Raises UserError, one line with `name` and the line number, for anything that is not plain, safe YAML.
    """
    if len(raw) > MAX_BYTES:
        raise UserError(f"{name}: larger than 1 MB: that is no configuration")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{line}: not UTF-8 text: expected a YAML configuration") from error
    tree = Tree()
    try:
        root = _compose(text)
        if isinstance(root, yaml.MappingNode):
            tree.values = _mapping(root, "", tree.lines)
        elif root is not None and _value(root, "", {}) is not None:
            kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
            raise _Refused(f"expected sections such as 'model:' at the top, got {kind}", root)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two: escapes of no character
        raise UserError(f"{name}{_explained(error, text)}") from error
    return tree


def parse_scalar(text: str, name: str) -> Any:
    """The value of `text` as it would be in a file: what stands behind `=` on the command line, for the key `name`.

    >>> [parse_scalar(text, "x") for text in ("3e-4", "true", "[a, b]", "runs/x")]
    [0.0003, True, ['a', 'b'], 'runs/x']
    """
    try:
        node = _compose(text)
        return None if node is None else _value(node, "", {})
    except _Refused as error:
        raise UserError(f"command line: {name}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"command line: {name}: {text!r} is not a YAML value (a text may need quotes)") from error


def dump(values: dict[str, Any], *, flow: bool = False) -> str:
    """Plain values as YAML that `parse` reads back to the same values; `flow` writes `{a: 1}` on one line."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=2**31, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def _text(self, text: str) -> yaml.ScalarNode:
        quotes = None if isinstance(_plain(text), str) else '"'  # '3e-4' is a number to parse, text to PyYAML
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=quotes)


_Dumper.add_representer(str, _Dumper._text)


def _compose(text: str) -> yaml.Node | None:
    # Events come without recursion or expansion, so neither a deep nor a self-multiplying file costs anything here.
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(f"aliases (*{event.anchor}) are not taken: write the value out", event)
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _Refused(f"tags ({tag}) are not taken: write a plain value", event)
        if isinstance(event, yaml.ScalarEvent) and re.search("[\ud800-\udfff]", event.value):
            raise _Refused("an escape that is no character", event)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _Refused(f"nested more than {MAX_DEPTH} deep", event)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    return node


def _mapping(node: yaml.MappingNode, prefix: str, lines: dict[str, int]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _Refused("a key must be a word", key_node)
        key = key_node.value
        dotted = f"{prefix}{key}"
        if "." in key:
            section, _, leaf = key.partition(".")
            raise _Refused(
                f"{dotted}: a key in a file has no dot: write '{section}:', and '{leaf}:' under it", key_node
            )
        if key in result:
            raise _Refused(f"{dotted}: given twice (first on line {lines[dotted]})", key_node)
        lines[dotted] = key_node.start_mark.line + 1
        result[key] = _value(value_node, f"{dotted}.", lines)
    return result


def _value(node: yaml.Node, prefix: str, lines: dict[str, int]) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, prefix, lines)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, prefix, lines) for item in node.value]
    assert isinstance(node, yaml.ScalarNode)
    return node.value if node.style else _plain(node.value)  # a style is a kind of quotes, or a block of text


def _plain(text: str) -> Any:
    """YAML 1.2's core schema, with `_` allowed between the digits of a whole number, and `0123` left as text."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.match(text):
        return int(text.replace("_", ""), 0)
    if _FLOAT.match(text):
        return float(text)
    if _SPECIAL.match(text):
        return float(text.replace(".", "", 1))
    return text


def _explained(error: Exception, text: str) -> str:
    """`":3: what is wrong"`, to stand behind a file's name."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f":{line}: not valid YAML: the control character U+{error.character:04X}"
    if not isinstance(error, yaml.MarkedYAMLError):
        return ": not valid YAML: an escape that is no character"
    mark = error.problem_mark or error.context_mark
    where = f":{mark.line + 1}" if mark else ""
    if isinstance(error, _Refused):
        return f"{where}: {error.problem}"
    hint = " (indent with spaces)" if "'\\t'" in (error.problem or "") else ""
    return f"{where}: not valid YAML: {', '.join(part for part in (error.context, error.problem) if part)}{hint}"
