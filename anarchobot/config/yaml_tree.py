"""YAML text to plain values, each with the line it stands on.

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

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)$|0x[0-9a-fA-F]+$|0o[0-7]+$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_SPECIAL = re.compile(r"([-+]?\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$")
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "True": True, "false": False, "False": False}


@dataclass
class Tree:
    """A mapping of the file: its plain values and the line of every key, by dotted name."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)


def parse(text: str, name: str) -> Tree:
    """Reads a YAML document whose top is a mapping (an empty document is an empty mapping).

    Raises UserError, one line with `name` and the line number, for anything that is not plain, safe YAML.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise UserError(f"{name}: larger than 1 MB: that is no configuration")
    tree = Tree()
    try:
        _refuse_deep_and_aliased(text, name)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return tree
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{_at(name, root)}: expected sections such as 'model:' at the top, got {_kind(root)}")
        tree.values = _mapping(root, name, "", tree.lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise UserError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:  # control characters and the like carry no mark
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    return tree


def parse_scalar(text: str) -> Any:
    """The value of `text` as it would be in a file: what stands behind `=` on the command line.

    >>> parse_scalar("3e-4"), parse_scalar("true"), parse_scalar("[a, b]"), parse_scalar("runs/x")
    (0.0003, True, ['a', 'b'], 'runs/x')
    """
    try:
        _refuse_deep_and_aliased(text, "command line")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _value(node, "command line", "", {})
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"command line: {text!r} is not a YAML value") from error


def _refuse_deep_and_aliased(text: str, name: str) -> None:
    # Events come without recursion or expansion, so neither a deep nor a self-multiplying file costs anything here.
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{_at(name, event)}: aliases (*{event.anchor}) are not taken: write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise UserError(f"{_at(name, event)}: nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _mapping(node: yaml.MappingNode, name: str, prefix: str, lines: dict[str, int]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{_at(name, key_node)}: a key must be a word")
        key = key_node.value
        dotted = f"{prefix}{key}"
        if key in result:
            raise UserError(f"{_at(name, key_node)}: {dotted}: given twice (first on line {lines[dotted]})")
        lines[dotted] = key_node.start_mark.line + 1
        result[key] = _value(value_node, name, f"{dotted}.", lines)
    return result


def _value(node: yaml.Node, name: str, prefix: str, lines: dict[str, int]) -> Any:
    standard = "tag:yaml.org,2002:"
    if not node.tag.startswith(standard) or node.tag.startswith(f"{standard}python"):
        raise UserError(f"{_at(name, node)}: the tag {node.tag} is not taken: write a plain value")
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, name, prefix, lines)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, name, prefix, lines) for item in node.value]
    return node.value if node.style in ("'", '"', "|", ">") else _plain(node.value)


def _plain(text: str) -> Any:
    """YAML 1.2's core schema, with `_` allowed between the digits of a whole number."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.match(text):
        return int(text.replace("_", ""), 0)
    if _FLOAT.match(text) and not re.match(r"[-+]?0[0-9]", text):
        return float(text)
    if _SPECIAL.match(text):
        return float(text.replace(".", "", 1))
    return text


def _at(name: str, marked: yaml.Node | yaml.Event) -> str:
    return f"{name}:{marked.start_mark.line + 1}" if marked.start_mark else name


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
