"""A budget for the work of a chat template, which comes with a model and may be hostile.

Jinja's sandbox limits what a template can reach, and a single `range`, but not loops in loops, repeated strings, or
lists of lists of lists. Here each rendering has a budget in proportion to its conversation, and pays in advance:

- for each pass through the body of a loop, macro or block: 1, the number of its nodes and the characters of its text;
- for each operation: the size of its operands, that is, characters of strings and, recursively, items of containers;
- for an operation whose result can be larger than its operands, such as replacing or repeating: the size of the result.

Time and memory are therefore bounded, without a clock. The output of other templates is unchanged.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jinja2 import TemplateError, pass_context
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from anarchobot.tokenizers.template_costs import (
    FILTER_COSTS,
    STRING_COSTS,
    Budget,
    check_bits,
    length,
    pay_arguments,
    pay_call,
    pay_format,
    size,
)
from anarchobot.tokenizers.template_payments import CHECKED, COPIED, MODULO, MULTIPLY, POWER, STEP, Payments

MAX_SOURCE = 100_000  # characters; Jinja needs up to 2 kB for each. Real templates have up to 30,000
BASE, PER_CHARACTER = 2_000_000, 100  # of the conversation
_CALL = 20  # the cost of a call, without what it does
# Filters that can take very long and have no use in a chat template; so can the global `lipsum`.
_REMOVED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap")
_FREE = {"count", "d", "default", "first", "last", "length"}  # filters that look at one item at most
# Filters that don't look into items.
_SHALLOW = {
    "batch", "items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr", "slice",
}  # fmt: skip
# Tests of a value's type. The others compare or search.
_TYPE_TESTS = {
    "boolean", "callable", "defined", "escaped", "false", "float", "integer", "iterable", "mapping", "none", "number",
    "sameas", "sequence", "string", "true", "undefined",
}  # fmt: skip


class BudgetContext(Context):
    """A template's variables, and the budget of the rendering."""

    budget: Budget

    def derived(self, locals: dict[str, Any] | None = None) -> "BudgetContext":
        context = super().derived(locals)
        assert isinstance(context, BudgetContext)
        context.budget = self.budget
        return context


class BudgetEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox; templates from `compile_source` pay for what they do."""

    context_class = BudgetContext

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        for name in self.filters.keys() - _FREE:
            self.add_filter(name, self.filters[name])
        self.filters |= {
            CHECKED: _check, COPIED: _copy, STEP: _step,
            MULTIPLY: _multiply, POWER: _power, MODULO: _modulo,
        }  # fmt: skip
        self.tests = {
            name: function if name in _TYPE_TESTS else _paid_test(function) for name, function in self.tests.items()
        }

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        self.filters[name] = _paid_filter(name, function)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function or method; the body of a macro pays for itself."""
        assert isinstance(context, BudgetContext)
        owner = getattr(function, "__self__", None)
        if type(owner) is str and not kwargs and (cost := STRING_COSTS.get(function.__name__)) is not None:
            context.budget.spend(cost(owner, *args))
            return function(*args)
        context.budget.spend(_CALL)
        if not isinstance(function, Macro | LoopContext | BlockReference):
            args = pay_call(context.budget, function, args, kwargs)
        return super().call(context, function, *args, **kwargs)


def compile_source(environment: BudgetEnvironment, source: str) -> Callable[[Mapping[str, Any], int], str]:
    """Returns a function that renders the template: (variables, characters of the conversation) to text. It raises
    TemplateError if the budget is spent, and what the template raises.

    Raises TemplateError, or whatever Jinja and Python raise for a source that is too large or too deep.
    """
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"{len(source):,} characters, at most {MAX_SOURCE:,}")
    tree = environment.parse(source)
    Payments().visit(tree)
    tree.set_environment(environment)
    template = environment.from_string(tree)

    def render(variables: Mapping[str, Any], characters: int) -> str:
        context = template.new_context(dict(variables))
        assert isinstance(context, BudgetContext)
        context.budget = Budget(BASE + PER_CHARACTER * characters)
        return "".join(template.root_render_func(context))

    return render


@pass_context
def _step(context: BudgetContext, cost: int) -> None:
    budget = context.budget
    budget.left -= cost
    if budget.left < 0:
        budget.spend(0)


@pass_context
def _check(context: BudgetContext, value: Any) -> Any:
    """Pays for a value and returns it."""
    budget = context.budget
    budget.left -= len(value) if type(value) is str else size(value, budget.left)
    if budget.left < 0:
        budget.spend(0)
    return value


@pass_context
def _copy(context: BudgetContext, value: Any) -> Any:
    """Pays for a value whose items are copied as they are."""
    context.budget.spend(length(value))
    return value


@pass_context
def _multiply(context: BudgetContext, left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        check_bits(left.bit_length() + right.bit_length())
    else:
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int):
                context.budget.spend(size(value, context.budget.left) * max(times, 0))
    return left * right


@pass_context
def _power(context: BudgetContext, base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int):
        check_bits(base.bit_length() * abs(exponent))
    return base**exponent


@pass_context
def _modulo(context: BudgetContext, left: Any, right: Any) -> Any:
    if isinstance(left, str):
        pay_format(context.budget, left, "%", right)
    return left % right


def _paid_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = getattr(getattr(function, "jinja_pass_arg", None), "name", "")  # the kind of its first argument
    shallow, extra_cost = name in _SHALLOW, FILTER_COSTS.get(name)

    @pass_context
    def paid(context: BudgetContext, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = context.budget
        if isinstance(value, Iterator):
            value = list(value)  # each of a chain of lazy filters pays for its items
        if type(value) is str:
            budget.spend(len(value))
        else:
            budget.spend(length(value) if shallow else size(value, budget.left))
        if args or kwargs:
            arguments = (*args, *kwargs.values())
            pay_arguments(budget, arguments)
            # An attribute such as "function.name" is looked up in several steps, for each item.
            budget.spend(length(value) * sum(text.count(".") for text in arguments if isinstance(text, str)))
            if extra_cost is not None:
                value = extra_cost(budget, value, *args, **kwargs)
        if not passed:
            return function(value, *args, **kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}[passed]
        return function(first, value, *args, **kwargs)

    return paid


def _paid_test(function: Any) -> Callable[..., Any]:
    first_argument = getattr(function, "jinja_pass_arg", None)

    @pass_context
    def paid(context: BudgetContext, *operands: Any) -> Any:
        for operand in operands:
            context.budget.spend(size(operand, context.budget.left))
        return function(*operands) if first_argument is None else function(context.environment, *operands)

    return paid
