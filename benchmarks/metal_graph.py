"""The graph of a function as MLX would run it on Metal: traced, fused, and put into evaluation order.

It follows the source of MLX 0.32: `trace` uses mx.export_function, which also simplifies the graph as mx.compile does;
`fuse` is compile.cpp's compile_fuse; `evaluation_order` is transforms.cpp's eval_impl. metal_model.py runs the graph.

A few functions are a single kernel on Metal but many primitives on a CPU. While tracing, `metal_functions` replaces
them by stand-ins: primitives that only these two modules know.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

Shape = tuple[int, ...]

MAX_FUSED_DEPTH, MAX_FUSED_INPUTS = 11, 24  # mlx/compile.cpp
MAX_WIDTH = 20  # of the breadth-first evaluation order (mlx/utils.h)

UNARY = {
    "Abs", "ArcCos", "ArcCosh", "ArcSin", "ArcSinh", "ArcTan", "ArcTanh", "AsType", "Ceil", "Cos", "Conjugate", "Cosh",
    "Remainder", "Erf", "ErfInv", "Exp", "Floor", "Log", "Log2", "Log10", "Log1p", "LogicalNot", "Negative", "Round",
    "Sigmoid", "Sign", "Sin", "Sinh", "Square", "Sqrt", "Rsqrt", "Tan", "Tanh", "Expm1", "Real", "Imag",
    "BitwiseInvert",
}  # fmt: skip
BINARY = {
    "Add", "Divide", "Equal", "NaNEqual", "Greater", "GreaterEqual", "Less", "LessEqual", "LogicalAnd", "LogicalOr",
    "LogAddExp", "Maximum", "Minimum", "Multiply", "NotEqual", "Power", "Subtract", "BitwiseBinary", "BitwiseAnd",
    "BitwiseOr", "BitwiseXor", "LeftShift", "RightShift", "ArcTan2",
}  # fmt: skip
FUSABLE = UNARY | BINARY | {"Select", "Broadcast"}


# ---- The graph ----


@dataclass(eq=False)
class Primitive:
    """An operation. `fused` are the names of the operations that a fused kernel consists of."""

    name: str
    arguments: Sequence[Any]
    inputs: list["Array"]
    outputs: list["Array"] = field(default_factory=list)
    fused: tuple[str, ...] = ()


@dataclass(eq=False)
class Array:
    """An array of the graph: the output of a primitive or, without one, an input or a constant."""

    shape: Shape
    dtype: mx.Dtype
    primitive: Primitive | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.size

    @property
    def inputs(self) -> list["Array"]:
        return [] if self.primitive is None else self.primitive.inputs


@dataclass(eq=False)
class Graph:
    """`tape` has one output of each primitive, in the order of compile.cpp's tape."""

    inputs: list[Array]
    outputs: list[Array]
    tape: list[Array]


# ---- Stand-ins: one kernel on Metal, many primitives on a CPU ----

_TAG = 0x5A000000  # constants that mark stand-ins; no other constant of a traced function may be as large


Forward = Callable[..., list[mx.array]]
Backward = Callable[[list[mx.array], list[mx.array], list[mx.array]], list[mx.array]]
Recorder = Callable[[Forward, Backward, list[mx.array]], list[mx.array]]


@dataclass
class _Call:
    """A call of a function with its own gradient, and the placeholders of its outputs and of its inputs' gradients."""

    forward: Forward
    backward: Backward
    inputs: list[mx.array]
    outputs: list[mx.array]
    dinputs: list[mx.array]


class _Tracing:
    """State of a running `trace`. mx.export_function cannot export primitives that only exist on a GPU, nor functions
    with a gradient of their own (mx.custom_function, mx.checkpoint). Both are expressed by `mx.depends`:

    A stand-in is Depends(templates of the outputs, tag, inputs); `trace` turns it into a primitive of its own.

    A function with its own gradient inside a differentiated function: its outputs are placeholders, new variables of
    that function, and its inputs are further results. `vjp` differentiates this function, whose cotangents for the
    inputs are placeholders as well, and then ties each placeholder to the array that it stands for.
    """

    def __init__(self) -> None:
        self.kinds: list[tuple[str, tuple[Any, ...]]] = []  # of stand-ins, by tag
        self.ties: list[tuple[mx.array, mx.array]] = []  # placeholder, array
        self.recorders: list[Recorder | None] = [None]
        self.differentiating = 0

    def stand_in(
        self,
        kind: str,
        arguments: tuple[Any, ...],
        inputs: Sequence[mx.array],
        outputs: Sequence[tuple[Shape, mx.Dtype]],
    ) -> list[mx.array]:
        tag = mx.array(_TAG + len(self.kinds), mx.int32)
        self.kinds.append((kind, arguments))
        templates = [mx.zeros(shape, dtype) for shape, dtype in outputs]
        return list(mx.depends(templates, [tag, *inputs]))

    def custom(self, forward: Forward, backward: Backward, inputs: list[mx.array]) -> list[mx.array]:
        """A function with its own gradient. `backward(inputs, outputs, cotangents)` returns the gradients of the
        floating-point inputs."""
        recorder = self.recorders[-1]
        return forward(*inputs) if recorder is None else recorder(forward, backward, inputs)

    def vjp(
        self, function: Callable[..., Any], primals: Sequence[mx.array], cotangents: Sequence[mx.array]
    ) -> tuple[list[mx.array], list[mx.array]]:
        """mx.vjp of a function that may contain `custom` functions."""
        calls: list[_Call] = []

        def discover(forward: Forward, backward: Backward, inputs: list[mx.array]) -> list[mx.array]:
            outputs = self._differentiating(forward, inputs, None)
            dinputs = [self._placeholder(x) for x in inputs if _is_float(x)]
            calls.append(_Call(forward, backward, inputs, [self._placeholder(x) for x in outputs], dinputs))
            return outputs

        self._differentiating(function, primals, discover)

        def opened(*arrays: mx.array) -> list[mx.array]:
            variables, remaining = iter(arrays[len(primals) :]), iter(calls)

            def record(forward: Forward, backward: Backward, inputs: list[mx.array]) -> list[mx.array]:
                call = next(remaining)
                call.forward, call.backward, call.inputs = forward, backward, inputs
                return [next(variables) for _ in call.outputs]

            outputs = self._differentiating(function, arrays[: len(primals)], record)
            return [*outputs, *(x for call in calls for x in call.inputs if _is_float(x))]

        results, gradients = _mx_vjp(
            opened,
            [*primals, *(x for call in calls for x in call.outputs)],
            [*cotangents, *(x for call in calls for x in call.dinputs)],
        )
        inputs, doutputs = iter(results[len(cotangents) :]), iter(gradients[len(primals) :])
        for call in calls:
            arguments = [next(inputs) if _is_float(x) else x for x in call.inputs]
            outputs = self._differentiating(call.forward, arguments, None)
            dinputs = call.backward(arguments, outputs, [next(doutputs) for _ in call.outputs])
            self.ties += zip([*call.outputs, *call.dinputs], [*outputs, *dinputs], strict=True)
        return list(results[: len(cotangents)]), list(gradients[: len(primals)])

    def _differentiating(
        self, function: Callable[..., Any], inputs: Sequence[mx.array], recorder: Recorder | None
    ) -> list[mx.array]:
        """The outputs of a function that is being differentiated; `recorder` takes the calls of `custom` functions."""
        self.recorders.append(recorder)
        self.differentiating += 1
        outputs = function(*inputs)
        self.differentiating -= 1
        self.recorders.pop()
        return list(outputs) if isinstance(outputs, list | tuple) else [outputs]

    def _placeholder(self, like: mx.array) -> mx.array:
        return self.stand_in("Placeholder", (), [], [(like.shape, like.dtype)])[0]


def _is_float(x: mx.array) -> bool:
    return mx.issubdtype(x.dtype, mx.floating)


_tracing: _Tracing | None = None
_mx_vjp, _mx_sdpa = mx.vjp, mx.fast.scaled_dot_product_attention


def _active() -> _Tracing:
    assert _tracing is not None
    return _tracing


def _rms_norm(x: mx.array, weight: mx.array, eps: float, **_: Any) -> mx.array:
    def forward(x: mx.array, w: mx.array) -> list[mx.array]:
        return _active().stand_in("RMSNorm", (), [x, w], [(x.shape, x.dtype)])

    def backward(inputs: list[mx.array], _: list[mx.array], d: list[mx.array]) -> list[mx.array]:
        x, w = inputs
        return _active().stand_in("RMSNormVJP", (), [x, w, *d], [(x.shape, x.dtype), (w.shape, w.dtype)])

    return _active().custom(forward, backward, [x, weight.astype(x.dtype)])[0]


def _rope(
    x: mx.array, dims: int, *, traditional: bool, base: float | None, scale: float, offset: Any, freqs: Any = None
) -> mx.array:
    if dims != x.shape[-1] or freqs is not None:
        raise ValueError("rope: the model knows only rotations of whole heads, without given frequencies")
    offset = offset if isinstance(offset, mx.array) else mx.array(offset, mx.int32)

    def forward(x: mx.array, offset: mx.array) -> list[mx.array]:
        return _active().stand_in("RoPE", (), [x, offset], [(x.shape, x.dtype)])

    def backward(inputs: list[mx.array], _: list[mx.array], d: list[mx.array]) -> list[mx.array]:
        return forward(d[0], inputs[1])

    return _active().custom(forward, backward, [x, offset])[0]


def _cross_entropy(logits: mx.array, targets: mx.array, **_: Any) -> mx.array:
    def forward(z: mx.array, t: mx.array) -> list[mx.array]:
        return _active().stand_in("CrossEntropy", (), [z, t], [(t.shape, mx.float32)])

    def backward(inputs: list[mx.array], _: list[mx.array], d: list[mx.array]) -> list[mx.array]:
        z, t = inputs
        return _active().stand_in("CrossEntropyVJP", (), [z, t, *d], [(z.shape, z.dtype)])

    return _active().custom(forward, backward, [logits, targets])[0]


def _sdpa(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **options: Any) -> mx.array:
    """Metal has a fused forward pass only. Where a function is differentiated, and for widths without a fused kernel,
    MLX composes attention of other primitives, as it always does on a CPU."""
    length, width = q.shape[2], q.shape[3]
    fused = {64, 72, 80, 96, 128} if length > 8 else {64, 96, 128, 256}
    few_queries = length > 8 or length * (q.shape[1] // k.shape[1]) <= 32
    if _active().differentiating or width != v.shape[3] or width not in fused or not few_queries:
        return _mx_sdpa(q, k, v, scale=scale, mask=mask, **options)
    inputs, causal = [q, k, v], mask == "causal" if isinstance(mask, str) else False
    if isinstance(mask, mx.array):
        inputs.append(mx.broadcast_to(mask, (*q.shape[:3], k.shape[2])))
    return _active().stand_in("SDPA", (causal,), inputs, [(q.shape, q.dtype)])[0]


def _contiguous(x: mx.array, *_: Any, **__: Any) -> mx.array:
    return _active().stand_in("Contiguous", (), [x], [(x.shape, x.dtype)])[0]


def _vjp(function: Any, primals: Any, cotangents: Any) -> Any:
    return _active().vjp(function, primals, cotangents)


def _checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """mx.checkpoint for functions of trees of arrays and other values that return one array."""

    def checkpointed(*arguments: Any, **options: Any) -> Any:
        leaves: list[tuple[str, Any]] = tree_flatten({"arguments": list(arguments), **options})  # type: ignore[assignment]
        positions = [i for i, (_, x) in enumerate(leaves) if isinstance(x, mx.array)]

        def forward(*arrays: mx.array) -> list[mx.array]:
            values = dict(zip(positions, arrays, strict=True))
            tree: Any = tree_unflatten([(name, values.get(i, x)) for i, (name, x) in enumerate(leaves)])
            return [function(*tree.pop("arguments"), **tree)]

        def backward(inputs: list[mx.array], outputs: list[mx.array], d: list[mx.array]) -> list[mx.array]:
            return _active().vjp(forward, mx.depends(inputs, outputs), d)[1]

        return _active().custom(forward, backward, [leaves[i][1] for i in positions])[0]

    return checkpointed


@contextmanager
def metal_functions() -> Iterator[_Tracing]:
    """A context manager in which MLX's functions have Metal's kernels: for `trace`."""
    global _tracing
    replaced = [
        (mx.fast, "rms_norm", _rms_norm),
        (mx.fast, "rope", _rope),
        (mx.fast, "scaled_dot_product_attention", _sdpa),
        (mx.fast, "cross_entropy", _cross_entropy),
        (mx, "contiguous", _contiguous),
        (mx, "vjp", _vjp),
        (mx, "checkpoint", _checkpoint),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    _tracing = _Tracing()
    mx.disable_compile()  # functions compiled on their own become part of the graph
    for owner, name, function in replaced:
        setattr(owner, name, function)
    try:
        yield _tracing
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
        mx.enable_compile()
        _tracing = None


# ---- Tracing ----


def trace(function: Callable[..., Sequence[mx.array]], *arguments: mx.array, stand_ins: bool = True) -> Graph:
    """The graph of `function`, after mx.compile's simplification and before its fusion. Does not evaluate anything.

    Without `stand_ins`, it is the graph of a CPU, without any function that mx.export_function does not know.
    """
    events: list[dict[str, Any]] = []
    with metal_functions() if stand_ins else nullcontext(_Tracing()) as tracing:
        count = 0

        def traced(*arrays: mx.array) -> list[mx.array]:
            nonlocal count
            outputs = list(function(*arrays))
            count = len(outputs)
            return [*outputs, *(x for pair in tracing.ties for x in pair)]

        mx.export_function(events.append, traced, *arguments)
    arrays: dict[str, Array] = {}
    inputs: list[Array] = []
    results: list[str] = []
    tags: dict[Array, int] = {}
    for event in events:
        if event["type"] == "inputs":
            for name, shape, dtype in event["inputs"]:
                arrays[name] = Array(tuple(shape), dtype)
                inputs.append(arrays[name])
        elif event["type"] == "outputs":
            results = [name for name, _, _ in event["outputs"]]
        elif event["type"] == "constants":
            for name, value in event["constants"]:
                arrays[name] = Array(value.shape, value.dtype)
                if value.ndim == 0 and value.dtype == mx.int32 and value.item() >= _TAG:
                    tags[arrays[name]] = value.item() - _TAG
        elif event["type"] == "primitive":
            operands = [arrays[name] for name, _, _ in event["inputs"]]
            primitive = Primitive(event["name"], event["arguments"], operands)
            marks = [i for i, x in enumerate(operands) if x in tags]
            if primitive.name == "Depends" and marks:
                kind, kind_arguments = tracing.kinds[tags[operands[marks[0]]]]
                primitive = Primitive(kind, kind_arguments, operands[marks[0] + 1 :])
            for name, shape, dtype in event["outputs"]:
                arrays[name] = Array(tuple(shape), dtype, primitive)
                primitive.outputs.append(arrays[name])
    outputs = [arrays[name] for name in results]
    ties = dict(zip(outputs[count::2], outputs[count + 1 :: 2], strict=True))

    def tied(x: Array) -> Array:
        while x in ties:
            x = ties[x]
        return x

    for x in arrays.values():
        if x.primitive is not None:
            x.primitive.inputs[:] = [tied(y) for y in x.primitive.inputs]
    outputs = [tied(x) for x in outputs[:count]]
    return Graph(inputs, outputs, _tape(outputs))


def _tape(outputs: Sequence[Array]) -> list[Array]:
    """Depth-first order, as compile.cpp's compile_dfs."""
    tape: list[Array] = []
    seen: set[Array] = set()
    stack = [(x, 0) for x in reversed(outputs)]
    while stack:
        array, i = stack.pop()
        if i == 0 and array in seen:
            continue
        if i < len(array.inputs):
            stack.append((array, i + 1))
            stack.append((array.inputs[i], 0))
            continue
        if array.primitive is not None and array not in seen:
            seen.update(array.primitive.outputs)
            tape.append(array)
    return tape


# ---- Fusion ----


def fuse(graph: Graph) -> Graph:
    """mx.compile's fusion of element-wise operations (compile_fuse), in place."""
    parents: dict[Array, list[tuple[Array, int]]] = defaultdict(list)
    for array in graph.tape:
        assert array.primitive is not None
        for output in array.primitive.outputs:
            for i, x in enumerate(array.inputs):
                if x.primitive is not None:
                    parents[x].append((output, i))
    results = set(graph.outputs)
    fused_arrays: set[Array] = set()
    tape: list[Array] = []
    for array in reversed(graph.tape):
        if array in fused_arrays:
            continue
        assert array.primitive is not None
        section = _fusable_section(array, parents, results) if array.primitive.name != "Broadcast" else set()
        if len(section) <= 1:
            tape.append(array)
            continue
        inputs, operations = _section_in_order(array, section)
        outputs = [x for x in operations[:-1] if x in results] + [array]
        fused_arrays.update(operations[:-1])
        names = tuple(x.primitive.name for x in operations if x.primitive is not None)
        for x in operations[:-1]:
            if x in results:
                parents[x] = [(p, i) for p, i in parents[x] if p not in section]
            else:
                parents.pop(x, None)
        for x in inputs:
            if x.primitive is not None:
                parents[x] = [(p, i) for p, i in parents[x] if p not in section]
        compiled = Primitive("Compiled", (), inputs, outputs, names)
        for output in outputs:
            output.primitive = compiled
            for i, x in enumerate(inputs):
                if x.primitive is not None:
                    parents[x].append((output, i))
        tape.append(array)
    graph.tape = tape[::-1]
    return graph


def _fusable_section(root: Array, parents: dict[Array, list[tuple[Array, int]]], results: set[Array]) -> set[Array]:
    section: set[Array] = set()
    inputs: set[Array] = set()

    def visit(array: Array, depth: int) -> None:
        if array in section:
            return
        p = array.primitive
        if (
            depth >= MAX_FUSED_DEPTH
            or p is None
            or p.name not in FUSABLE
            or (array in results and array.shape != root.shape)
        ):
            inputs.add(array)
            return
        if depth > 0 and not all(parent in section for parent, _ in parents[array]):
            if p.name == "Broadcast" and len(inputs) < MAX_FUSED_INPUTS:
                visit(_split_broadcast(array, parents, section), depth)
            else:
                inputs.add(array)
            return
        if array in results:
            inputs.add(array)
        else:
            inputs.discard(array)
        if len(inputs) >= MAX_FUSED_INPUTS:
            return
        section.add(array)
        for x in array.inputs:
            visit(x, depth + 1)

    visit(root, 0)
    return section


def _split_broadcast(array: Array, parents: dict[Array, list[tuple[Array, int]]], section: set[Array]) -> Array:
    """A copy of a broadcast for its consumers in `section`, so that other consumers do not stop the fusion."""
    assert array.primitive is not None
    copy = Array(array.shape, array.dtype)
    copy.primitive = Primitive("Broadcast", array.primitive.arguments, list(array.inputs), [copy])
    for parent, i in parents[array]:
        if parent in section:
            parent.inputs[i] = copy
            parents[copy].append((parent, i))
    parents[array] = [(p, i) for p, i in parents[array] if p not in section]
    for i, x in enumerate(copy.inputs):
        parents[x].append((copy, i))
    return copy


def _section_in_order(root: Array, section: set[Array]) -> tuple[list[Array], list[Array]]:
    """The inputs of a section and its arrays, each after its inputs."""
    inputs: dict[Array, None] = {}
    operations: dict[Array, None] = {}

    def visit(array: Array) -> None:
        if array not in section:
            inputs[array] = None
        elif array not in operations:
            for x in array.inputs:
                visit(x)
            operations[array] = None

    visit(root)
    return list(inputs), list(operations)


# ---- Evaluation order ----


def evaluation_order(graph: Graph) -> list[Array]:
    """One output of each primitive, in the order in which MLX evaluates them: backward breadth first, at most MAX_WIDTH
    wide (eval_impl). Graph outputs count as inputs of a final array."""
    consumers: Counter[Primitive] = Counter()
    stack = [list(graph.outputs)]
    while stack:
        for x in stack.pop():
            if x.primitive is not None:
                consumers[x.primitive] += 1
                if consumers[x.primitive] == 1:
                    stack.append(x.primitive.inputs)
    tape: list[list[Array]] = [list(graph.outputs)]  # the inputs of what comes later
    order: list[Array] = []
    later: list[tuple[list[Array], int]] = []
    done = 0
    while consumers and (done < len(tape) or later):
        if done < len(tape):
            inputs, j = tape[done], 0
            done += 1
        else:
            inputs, j = later.pop()
        while j < len(inputs):
            primitive = inputs[j].primitive
            if primitive is not None and primitive in consumers:
                if len(tape) - done >= MAX_WIDTH:
                    later.append((inputs, j))
                    break
                consumers[primitive] -= 1
                if consumers[primitive] == 0:
                    del consumers[primitive]
                    tape.append(primitive.inputs)
                    order.append(inputs[j])
            j += 1
    return order[::-1]
