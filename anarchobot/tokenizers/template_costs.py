"""What the operations of a chat template cost: the size of their operands, or of a result that can be larger."""

import re
from collections.abc import Callable, Collection, ItemsView, KeysView, Mapping, ValuesView
from typing import Any

from jinja2 import TemplateError
from jinja2.utils import Namespace

MAX_INTEGER_BITS = 4096
_ITEM = 5  # the cost of an item of a container
MAX_DEPTH = 100
# Of strings, integers and types. Without `encode` and `to_bytes` there are no bytes.
_REFUSED_METHODS = (
    "encode", "expandtabs", "format_map", "from_bytes", "fromkeys", "maketrans", "striptags", "to_bytes", "translate",
)  # fmt: skip


class Budget:
    """What is left of a rendering's budget."""

    def __init__(self, left: int) -> None:
        self.left = left

    def spend(self, cost: int) -> None:
        """Raises TemplateError if less than `cost` is left."""
        self.left -= cost
        if self.left < 0:
            raise TemplateError("it takes too much work or memory for this conversation")


def check_bits(bits: int) -> None:
    if bits > MAX_INTEGER_BITS:
        raise TemplateError("an integer that is too large")


def pay_format(budget: Budget, text: str, mark: str, values: Any) -> None:
    """Each directive may insert all values, and as many spaces as the largest number in the format says."""
    if re.search(r"%[^a-zA-Z%]*\*" if mark == "%" else r"\{[^{}]*\{", text.replace("{{", "")):
        raise TemplateError("a format whose widths are variables is not supported")
    width = max(
        (int(number[-9:]) if len(number) < 10 else budget.left for number in re.findall("[0-9]+", text)), default=0
    )
    budget.spend(len(text) + text.count(mark) * (size(values, budget.left) + width))


def pay_arguments(budget: Budget, arguments: tuple[Any, ...]) -> None:
    """A number may be the width of a result."""
    for value in arguments:
        budget.spend(abs(value) if type(value) is int else size(value, budget.left))


def pay_call(budget: Budget, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the arguments to call with: `join` gets a list, whose length is known."""
    method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if name in _REFUSED_METHODS and isinstance(owner, str | int | type):
        raise TemplateError(f"{name} is not supported in chat templates")
    if name == "join" and args:
        args = (list(args[0]),)
    if name == "format" or isinstance(function, type):  # dict, namespace
        budget.spend(size([*args, *kwargs.values()], budget.left))
    else:
        pay_arguments(budget, (*args, *kwargs.values()))
    if isinstance(owner, str):
        budget.spend(len(owner))
        if name == "join" and args:
            budget.spend(len(owner) * len(args[0]))
        elif name == "format":
            pay_format(budget, owner, "{", [*args, *kwargs.values()])
        elif (cost := STRING_COSTS.get(name)) is not None:  # a Markup
            budget.spend(cost(owner, *args, *kwargs.values()))
    elif isinstance(owner, Collection):
        budget.spend(size(owner, budget.left) if name in ("count", "index") else len(owner))
    elif name == "strftime":  # C libraries fill a field to any width; Python stops at 256 times the format's length
        budget.spend(256 * length(args[0] if args else ""))
    return args


def _linear(owner: str, text: Any = None, *args: Any) -> int:
    """`text`: a string to search for; startswith and endswith also take a tuple of them."""
    return len(owner) + length(text) if not isinstance(text, tuple) else len(owner) * len(text)


def _product(owner: str, text: Any = None, *args: Any) -> int:
    return len(owner) * (len(text) if isinstance(text, str) else 1)


def _replacing(owner: str, old: Any = "", new: Any = "", *args: Any) -> int:
    found = owner.count(old) if isinstance(old, str) else 0
    return len(owner) + found * length(new)


# What methods of strings cost. Those not listed pay for the numbers in their arguments, which may be widths.
STRING_COSTS: dict[str, Callable[..., int]] = {
    "capitalize": _linear, "casefold": _linear, "count": _linear, "endswith": _linear, "find": _linear,
    "index": _linear, "isdigit": _linear, "islower": _linear, "isspace": _linear, "isupper": _linear,
    "lower": _linear, "partition": _linear, "removeprefix": _linear, "removesuffix": _linear, "split": _linear,
    "splitlines": _linear, "startswith": _linear, "swapcase": _linear, "title": _linear, "upper": _linear,
    # Stripping looks up each character in the argument; searching from the right is quadratic in the worst case.
    "lstrip": _product, "rstrip": _product, "strip": _product,
    "rfind": _product, "rindex": _product, "rpartition": _product, "rsplit": _product,
    "replace": _replacing,
}  # fmt: skip


def _replace(budget: Budget, value: Any, old: Any, new: Any, *args: Any) -> Any:
    budget.spend(_replacing(str(value), str(old), str(new)))
    return value


def _join(budget: Budget, value: Any, d: str = "", *args: Any, **kwargs: Any) -> Any:
    budget.spend(length(value) * len(str(d)))
    return value


def _indent(budget: Budget, value: Any, width: Any = 4, *args: Any, **kwargs: Any) -> Any:
    budget.spend(str(value).count("\n") * (abs(width) if isinstance(width, int) else len(width)))
    return value


def _trim(budget: Budget, value: Any, chars: Any = None) -> Any:
    budget.spend(length(value) * len(chars or ""))
    return value


def _format(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> Any:
    pay_format(budget, str(value), "%", [*args, *kwargs.values()])
    return value


def _sum(budget: Budget, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, int | float):
        raise TemplateError("sum is only supported for numbers")
    return value


def _int(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> Any:
    check_bits(4 * length(value))
    return value


# What some filters cost in addition; each returns the value to pass to the filter.
FILTER_COSTS: dict[str, Callable[..., Any]] = {
    "format": _format, "indent": _indent, "int": _int, "join": _join, "replace": _replace, "sum": _sum, "trim": _trim,
}  # fmt: skip


def length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 1  # of an iterator, whose source has paid


def size(value: Any, limit: int) -> int:
    """Characters and items, recursively and with repetitions; stops counting beyond `limit`.

    Raises TemplateError for containers that are nested too deeply: the hash of such a tuple would overflow the stack.
    """
    total, level = _ITEM, [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, str | range):
                total += len(value)
            elif isinstance(value, Mapping):
                total += 2 * _ITEM * len(value)
                inner += [*value, *value.values()]
            elif isinstance(value, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
                total += _ITEM * len(value)
                inner += value
            elif isinstance(value, Namespace):
                total += _ITEM
                inner.append(value._Namespace__attrs)
            if total > limit:
                return total
        if not inner:
            return total
        level = inner
    raise TemplateError("containers nested too deeply")
