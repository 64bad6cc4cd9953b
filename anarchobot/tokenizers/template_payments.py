"""Rewrites a chat template so that it pays from its budget (template_budget.py), by filters around its operands.

What depends on the source alone costs nothing, except in a body that is run repeatedly.
"""

from collections.abc import Iterator
from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

# The filters' names have a space, so that no template can use them.
CHECKED, COPIED, STEP, MULTIPLY, POWER, MODULO = (f" {name}" for name in ("check", "copy", "step", "*", "**", "%"))


class Payments(NodeTransformer):
    """Makes a template pay, by filters around its operands. What is of a fixed size costs nothing."""

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        cost = 1 + sum(1 + _constant_size(inner) for statement in node.body for inner in _all_nodes(statement))
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(cost), STEP), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_For(self, node: nodes.For) -> nodes.For:
        self._body(node)
        node.test = node.test and _filter(node.test, CHECKED)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [_check_node(child) for child in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Concat:
        self.generic_visit(node)
        node.nodes = [_check_node(child) for child in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        searches = any(operand.op in ("in", "notin") for operand in node.ops)
        if searches or not any(_is_small(expr) for expr in (node.expr, *(operand.expr for operand in node.ops))):
            node.expr = _check_node(node.expr)
            for operand in node.ops:
                operand.expr = _check_node(operand.expr)
        return node

    def _sum(self, node: Any) -> Any:
        self.generic_visit(node)
        if not _is_small(node):
            node.left, node.right = (
                side if isinstance(side, nodes.Add) else _check_node(side) for side in (node.left, node.right)
            )
        return node

    visit_Add = visit_Sub = _sum

    def _binary(self, node: nodes.BinExpr) -> nodes.Filter:
        self.generic_visit(node)
        name = {nodes.Mul: MULTIPLY, nodes.Pow: POWER, nodes.Mod: MODULO}[type(node)]
        return _filter(node.left, name, node.right)

    visit_Mul = visit_Pow = visit_Mod = _binary

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(node.node, COPIED)
        else:
            node.arg = _check_node(node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        node.key = _check_node(node.key)
        return node


def _all_nodes(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    yield from node.find_all(nodes.Node)


def _constant_size(node: nodes.Node) -> int:
    if isinstance(node, nodes.TemplateData):
        return len(node.data)
    value = node.value if isinstance(node, nodes.Const) else None
    if isinstance(value, str):
        return len(value)
    return value.bit_length() // 8 if type(value) is int else 0


def _is_small(node: nodes.Node) -> bool:
    """Whether the value is a constant, a boolean or a number, so that comparing it takes constant time."""
    if isinstance(node, nodes.Add):
        return any(
            isinstance(side, nodes.Const) and not isinstance(side.value, str) for side in (node.left, node.right)
        )
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(isinstance(item, nodes.Const) for item in node.items)
    if isinstance(node, nodes.Sub):
        return _is_small(node.left) or _is_small(node.right)
    return isinstance(node, nodes.Const | nodes.TemplateData | nodes.Compare | nodes.Test | nodes.Not | nodes.Neg)


def _check_node(node: Any) -> Any:
    return node if _is_small(node) else _filter(node, CHECKED)


def _filter(node: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)
