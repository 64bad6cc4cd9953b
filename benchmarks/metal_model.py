"""A model of MLX's Metal backend, for machines without a Mac: which kernels a function runs, what they read and write,
how many FLOPs they have, and how much memory is allocated at the peak.

    graph = trace(function, *arrays)     # as MLX traces it; nothing is evaluated, so full shapes cost nothing
    graph = fuse(graph)                  # as mx.compile (mlx/compile.cpp)
    run = simulate(graph)                # as MLX's evaluation on Metal: run.kernels, run.peak

It follows the source of MLX 0.32: `trace` uses mx.export_function, which also simplifies the graph as mx.compile does;
`fuse` is compile.cpp's compile_fuse; `evaluation_order` is transforms.cpp's eval_impl; `simulate` computes the strides
of every array as each primitive's eval_gpu does, from which follow the copies of non-contiguous operands, and holds
buffers as metal/eval.cpp does: until the command buffer that uses them has completed, with up to ten in flight.

A few functions are a single kernel on Metal but many primitives on a CPU. While tracing, `metal_functions` replaces
them by stand-ins: primitives that only this module knows.

What it is checked against (tests/test_metal_model.py): the fused kernels are those of mx.compile, strides of views are
those of MLX's arrays, bytes and FLOPs of single operations are those computed by hand, and the measured peak memory of
MLX's CPU backend, which shares Metal's evaluation order and runs ahead in a similar way, is between the model's peaks
with and without run-ahead. What is not checked: nothing has been measured on a Mac, neither memory nor time.

What it does not know: caches (each kernel reads its distinct input elements once and writes its output once), the
efficiency of single kernels, allocation granularity, MLX's buffer cache, the time to build a graph, and an idle GPU
between evaluations.
"""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

Shape = tuple[int, ...]

MAX_FUSED_DEPTH, MAX_FUSED_INPUTS = 11, 24  # mlx/compile.cpp
MAX_WIDTH = 20  # of the breadth-first evaluation order (mlx/utils.h)
MAX_ACTIVE_BUFFERS = 10  # command buffers in flight (mlx/transforms.cpp)
DONATION_EXTRA = 16384  # bytes by which a donated buffer may be larger (mlx/backend/common/utils.h)
SMALL_DEVICE_SPLIT_K = 1024  # tiles of 16 x 16 up to which a matrix product is split along k (metal/matmul.cpp)

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


# ---- Layout of arrays in memory ----


@dataclass(eq=False)
class Buffer:
    """`users`: arrays that refer to it; `holds`: command buffers in flight that use it."""

    bytes: int
    users: int = 0
    holds: int = 0
    external: bool = False  # an input that is not freed


@dataclass(eq=False)
class Layout:
    """Strides (in elements) and MLX's flags of an array. `data_size`: elements of its buffer that it spans."""

    shape: Shape
    strides: Shape
    itemsize: int
    data_size: int
    contiguous: bool
    row: bool
    col: bool
    buffer: Buffer

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def touched(self) -> int:
        """Bytes of the distinct elements: a broadcast costs no more than its source."""
        return self.itemsize * math.prod(n for n, s in zip(self.shape, self.strides, strict=True) if s)

    def view(self, shape: Shape, strides: Shape, **changes: Any) -> "Layout":
        values = {
            "data_size": self.data_size,
            "contiguous": self.contiguous,
            "row": self.row,
            "col": self.col,
            **changes,
        }
        return Layout(shape, strides, self.itemsize, buffer=self.buffer, **values)


def row_strides(shape: Shape) -> Shape:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)
    return tuple(reversed(strides)) if shape else ()


def check_contiguity(shape: Shape, strides: Shape) -> tuple[int, bool, bool]:
    """Elements without broadcast axes, row contiguous, column contiguous (common/utils.h)."""
    size, row, col, forward, backward = 1, True, True, 1, 1
    for i in range(len(shape)):
        j = len(shape) - 1 - i
        col &= strides[i] == forward or shape[i] == 1
        row &= strides[j] == backward or shape[j] == 1
        forward, backward = forward * shape[i], backward * shape[j]
        size *= shape[i] if strides[i] > 0 else 1
    return size, row, col


def collapse(shape: Shape, strides: Shape) -> tuple[list[int], list[int]]:
    """Merges axes that are contiguous in memory (common/utils.cpp)."""
    sizes: list[int] = []
    steps: list[int] = []
    for n, s in zip(shape, strides, strict=True):
        if n == 1:
            continue
        if steps and n * s == steps[-1]:
            sizes[-1], steps[-1] = sizes[-1] * n, s
        else:
            sizes.append(n)
            steps.append(s)
    return sizes, steps


def reshaped_strides(x: Layout, shape: Shape) -> Shape | None:
    """The strides of a reshape without a copy, or None if it needs one (prepare_reshape)."""
    if x.row or x.size == 0:
        return row_strides(shape)
    if not x.shape:
        return (0,) * len(shape)
    sizes, steps = collapse(x.shape, x.strides)
    strides: list[int] = []
    j = 0
    for n in shape:
        if j < len(sizes) and sizes[j] % n == 0:
            sizes[j] //= n
            strides.append(sizes[j] * steps[j])
            j += sizes[j] == 1
        elif n == 1:
            strides.append(strides[-1])
        else:
            return None
    return tuple(strides)


# ---- Simulation ----


class Kernel(NamedTuple):
    """One launch. `bytes` are read and written. `shapes`: of inputs and output, as text."""

    kind: str
    bytes: int
    flops: int
    shapes: str


@dataclass
class Run:
    """`peak`: bytes allocated beside the inputs that stay (donated inputs count); `waits`: times that MLX waited for a
    command buffer; `layouts`: of the outputs."""

    kernels: list[Kernel]
    peak: int
    waits: int
    layouts: list[Layout]

    @property
    def bytes(self) -> int:
        return sum(k.bytes for k in self.kernels)

    @property
    def flops(self) -> int:
        return sum(k.flops for k in self.kernels)


def simulate(
    graph: Graph,
    donated: Sequence[Array] = (),
    *,
    run_ahead: bool = True,
    limit: int | None = None,
    max_ops: int = 40,
    max_megabytes: int = 40,
) -> Run:
    """Evaluates the graph on paper. `donated` inputs are referred to by nothing else, so their buffers can be reused.

    With `run_ahead`, the GPU is as late as MLX permits: up to ten command buffers are in flight, each closed after
    `max_ops` kernels or `max_megabytes` (2^20 elements, despite the name; 40 and 40 on base and Pro chips, 50 and 50 on
    Max and Ultra), and their inputs are neither freed nor reused. Without, each kernel has completed before the next.
    `limit`: MLX waits for command buffers while more than these bytes are allocated (mx.set_memory_limit, less what
    is not counted here). Raises ValueError for a primitive that the model does not know.
    """
    return Simulator(graph, donated, run_ahead, limit, max_ops, max_megabytes).run()


class Simulator:
    """See `simulate`."""

    def __init__(
        self,
        graph: Graph,
        donated: Sequence[Array],
        run_ahead: bool,
        limit: int | None,
        max_ops: int,
        max_megabytes: int,
    ) -> None:
        self.graph, self.run_ahead, self.limit = graph, run_ahead, limit
        self.max_ops, self.max_megabytes = max_ops, max_megabytes
        self.kernels: list[Kernel] = []
        self.live = self.peak = self.waits = 0
        self.layouts: dict[Array, Layout] = {}
        self.references: Counter[Array] = Counter(graph.outputs)  # to an array: consumers, and the caller
        self.pending: deque[tuple[list[Buffer], bool]] = deque()  # command buffers in flight; whether MLX counts it
        self.held: list[Buffer] = []  # by the open command buffer
        self.ops = self.elements = 0  # in the open command buffer
        self.seen: set[Buffer] = set()
        for x in graph.inputs:
            self._set(x, self._allocate(x.bytes) if x in donated else Buffer(x.bytes, external=True))
            if x not in donated:
                self.references[x] += 1
        for array in graph.tape:
            assert array.primitive is not None
            self.references.update(array.inputs)
            for x in array.inputs:
                if x.primitive is None and x not in self.layouts:  # a constant
                    self._set(x, Buffer(x.bytes, external=True))
                    self.references[x] += 1

    def run(self) -> Run:
        for array in evaluation_order(self.graph):
            p = array.primitive
            assert p is not None
            before = len(self.kernels)
            handler = _HANDLERS.get(p.name)
            if handler is None:
                raise ValueError(f"metal_model.py does not know MLX's primitive {p.name}: add it to _HANDLERS")
            handler(self, p)
            self._after(array, len(self.kernels) - before)
        return Run(self.kernels, self.peak, self.waits, [self.layouts[x] for x in self.graph.outputs])

    # ---- What handlers use ----

    def launch(
        self, kind: str, read: Sequence[Layout], wrote: Sequence[Layout], flops: int = 0, extra: int = 0
    ) -> None:
        """A kernel that reads and writes each of these arrays once, and `extra` bytes."""
        shapes = ", ".join("x".join(map(str, x.shape)) for x in read if x.size > 1)
        shapes += " -> " + ", ".join("x".join(map(str, x.shape)) for x in wrote)
        distinct = {id(x): x for x in read if x.shape}.values()
        moved = sum(x.touched for x in distinct) + sum(x.touched for x in wrote) + extra
        self.kernels.append(Kernel(kind, moved, flops, shapes))
        for x in [*read, *wrote]:
            if x.buffer not in self.seen:
                self.seen.add(x.buffer)
                self.elements += x.data_size

    def inputs(self, p: Primitive) -> list[Layout]:
        return [self.layouts[x] for x in p.inputs]

    def fresh(self, output: Array, like: Layout | None = None) -> Layout:
        """Allocates the memory of an output, row contiguous or with the strides of `like`."""
        if like is None:
            return self._set(output, self._allocate(output.bytes))
        return self._share(output, like, self._allocate(like.data_size * output.dtype.size))

    def give(self, output: Array, x: Layout) -> Layout:
        """The output is a view of the memory of `x`, with its layout."""
        self.layouts[output] = x
        x.buffer.users += 1
        return x

    def donatable(self, x: Array, output: Array | None = None) -> bool:
        """Whether nothing else refers to the memory of an input, so that an output can take it."""
        buffer = self.layouts[x].buffer
        free = self.references[x] == 1 and buffer.users == 1 and buffer.holds == 0 and not buffer.external
        return free and (
            output is None or (x.dtype.size == output.dtype.size and buffer.bytes <= output.bytes + DONATION_EXTRA)
        )

    def take(self, output: Array, x: Array) -> Layout:
        """The output takes over the memory of `x`, with its layout."""
        return self._share(output, self.layouts[x], self.layouts[x].buffer)

    def reuse(self, output: Array, x: Array) -> Layout:
        """The output takes over the memory of `x`, row contiguous."""
        return self._set(output, self.layouts[x].buffer)

    def copy(self, x: Layout, why: str) -> Layout:
        """A row-contiguous temporary copy, freed when the command buffer has completed."""
        shape = x.shape
        made = _row_layout(shape, x.itemsize, self._allocate(x.size * x.itemsize))
        self.launch(f"Copy ({why})", [x], [made])
        self.hold(made.buffer)
        return made

    def temporary(self, size: int) -> Buffer:
        buffer = self._allocate(size)
        self.hold(buffer)
        return buffer

    def hold(self, buffer: Buffer) -> None:
        buffer.holds += 1
        self.held.append(buffer)

    # ---- Memory and command buffers ----

    def _set(self, array: Array, buffer: Buffer) -> Layout:
        layout = _row_layout(array.shape, array.dtype.size, buffer)
        self.layouts[array] = layout
        buffer.users += 1
        return layout

    def _share(self, output: Array, like: Layout, buffer: Buffer) -> Layout:
        layout = Layout(
            output.shape, like.strides, output.dtype.size, like.data_size, like.contiguous, like.row, like.col, buffer
        )
        self.layouts[output] = layout
        buffer.users += 1
        return layout

    def _allocate(self, size: int) -> Buffer:
        self.live += size
        self.peak = max(self.peak, self.live)
        return Buffer(size)

    def _release(self, buffer: Buffer) -> None:
        if buffer.users == 0 and buffer.holds == 0 and not buffer.external:
            self.live -= buffer.bytes

    def _drop(self, array: Array) -> None:
        buffer = self.layouts.pop(array).buffer
        buffer.users -= 1
        self._release(buffer)

    def _after(self, array: Array, launched: int) -> None:
        p = array.primitive
        assert p is not None
        buffers = {self.layouts[x].buffer for x in p.inputs}
        buffers |= {self.layouts[x].buffer for x in p.outputs if x is not array}
        for buffer in buffers - {self.layouts[array].buffer}:
            self.hold(buffer)
        # MLX detaches an array after submitting it: its inputs are no longer referred to.
        for x in p.inputs:
            self.references[x] -= 1
            if self.references[x] == 0:
                self._drop(x)
        for x in p.outputs:
            if self.references[x] == 0:
                self._drop(x)
        self._submit(launched)

    def _submit(self, launched: int) -> None:
        """Closes the command buffer if it is full, and waits if there are too many."""
        self.ops += launched
        if not self.run_ahead:
            self._commit(counted=False)
            self._complete_all()
        elif self.ops > self.max_ops or self.elements >> 20 > self.max_megabytes:
            self._commit(counted=True)
        over = self.limit is not None and self.live > self.limit
        if self._active() > MAX_ACTIVE_BUFFERS or (over and self._active() > 0):
            self._commit(counted=False)
            self._wait_for_one()
            while self.limit is not None and self.live > self.limit and self._active() > 0:
                self._wait_for_one()

    def _active(self) -> int:
        return sum(counted for _, counted in self.pending)

    def _commit(self, *, counted: bool) -> None:
        if self.held or counted:
            self.pending.append((self.held, counted))
        self.held, self.ops, self.elements, self.seen = [], 0, 0, set()

    def _complete(self) -> bool:
        buffers, counted = self.pending.popleft()
        for buffer in buffers:
            buffer.holds -= 1
            self._release(buffer)
        return counted

    def _complete_all(self) -> None:
        while self.pending:
            self._complete()

    def _wait_for_one(self) -> None:
        self.waits += 1
        while not self._complete():
            pass


def _row_layout(shape: Shape, itemsize: int, buffer: Buffer) -> Layout:
    size = math.prod(shape)
    col = size <= 1 or size == max(shape, default=1)
    return Layout(shape, row_strides(shape), itemsize, size, True, True, col, buffer)


# ---- Views ----


def _transpose(s: Simulator, p: Primitive) -> None:
    (x,) = s.inputs(p)
    shape = p.outputs[0].shape
    strides = tuple(x.strides[a] for a in p.arguments[0])
    row, col = x.row, x.col
    if x.contiguous and x.data_size == x.size:
        _, row, col = check_contiguity(shape, strides)
    s.give(p.outputs[0], x.view(shape, strides, row=row, col=col))


def _broadcast(s: Simulator, p: Primitive) -> None:
    x, shape = s.inputs(p)[0], p.outputs[0].shape
    tail = tuple(0 if n == 1 else step for n, step in zip(x.shape, x.strides, strict=True))
    strides = (0,) * (len(shape) - len(tail)) + tail
    larger = math.prod(shape) > x.size
    s.give(p.outputs[0], x.view(shape, strides, row=x.row and not larger, col=x.col and not larger))


def _expand_dims(s: Simulator, p: Primitive) -> None:
    (x,) = s.inputs(p)
    strides = list(x.strides)
    for axis in p.arguments[0]:
        strides.insert(axis, 1)
    s.give(p.outputs[0], x.view(p.outputs[0].shape, tuple(strides)))


def _squeeze(s: Simulator, p: Primitive) -> None:
    (x,) = s.inputs(p)
    strides = tuple(step for i, step in enumerate(x.strides) if i not in p.arguments[0])
    s.give(p.outputs[0], x.view(p.outputs[0].shape, strides))


def _slice(s: Simulator, p: Primitive) -> None:
    (x,) = s.inputs(p)
    shape = p.outputs[0].shape
    strides = tuple(step * by for step, by in zip(x.strides, p.arguments[2], strict=True))
    data_size = 1 + sum(abs(step) * (n - 1) for step, n in zip(strides, shape, strict=True))
    size, row, col = check_contiguity(shape, strides)
    s.give(p.outputs[0], x.view(shape, strides, data_size=data_size, contiguous=size == data_size, row=row, col=col))


def _split(s: Simulator, p: Primitive) -> None:
    (x,) = s.inputs(p)
    for output in p.outputs:
        size, row, col = check_contiguity(output.shape, x.strides)
        contiguous = x.contiguous and (size == x.data_size or row or col)
        s.give(output, x.view(output.shape, x.strides, data_size=size, contiguous=contiguous, row=row, col=col))


def _depends(s: Simulator, p: Primitive) -> None:
    for output, x in zip(p.outputs, s.inputs(p), strict=False):
        s.give(output, x)


def _view_dtype(s: Simulator, p: Primitive) -> None:
    (x,), output = s.inputs(p), p.outputs[0]
    if x.itemsize != output.dtype.size and not x.row:
        raise ValueError("View: the model knows only views of the same item size or of contiguous arrays")
    size = output.size if x.row else x.data_size
    strides = row_strides(output.shape) if x.row else x.strides
    made = Layout(output.shape, strides, output.dtype.size, size, x.contiguous, x.row, x.col, x.buffer)
    s.give(output, made)


def _reshape(s: Simulator, p: Primitive) -> None:
    x, output = s.inputs(p)[0], p.outputs[0]
    strides = reshaped_strides(x, output.shape)
    if strides is None:
        s.launch("Copy (reshape)", [x], [s.fresh(output)])
        return
    row = x.row
    col = output.size <= 1 or output.size == max(output.shape, default=1) if row else x.col
    s.give(output, x.view(output.shape, strides, row=row, col=col))


def _contiguous_copy(s: Simulator, p: Primitive) -> None:
    x, output = s.inputs(p)[0], p.outputs[0]
    if x.row and x.buffer.bytes <= output.bytes + DONATION_EXTRA:
        s.give(output, x)
    else:
        s.launch("Copy (contiguous)", [x], [s.fresh(output)])


# ---- Element-wise kernels ----


def _elementwise(s: Simulator, p: Primitive) -> None:
    """Unary, binary, ternary and fused kernels (compiled_check_contiguity, compiled_allocate_outputs)."""
    shape = p.outputs[0].shape
    # Without scalars; a kernel that is not fused also treats broadcast scalars as such.
    arrays = [x for x in p.inputs if s.layouts[x].shape and (p.fused or s.layouts[x].data_size > 1)]
    layouts = [s.layouts[x] for x in arrays]
    same = [x for x in layouts if x.shape == shape]
    rows, cols = (len(same) == len(layouts) and all(getattr(x, flag) for x in same) for flag in ("row", "col"))
    contiguous = bool(layouts) and (rows or cols or (len(layouts) == 1 and bool(same) and same[0].contiguous))
    outputs: list[Layout] = []
    free = list(p.outputs)
    for x in dict.fromkeys(arrays):
        fits = s.layouts[x].size == math.prod(shape) and (contiguous or s.layouts[x].row)
        if free and fits and p.inputs.count(x) == 1 and s.donatable(x, free[0]):
            outputs.append(s.take(free.pop(0), x) if contiguous else s.reuse(free.pop(0), x))
    outputs += [s.fresh(output, same[0] if contiguous else None) for output in free]
    kind = "Fused" if p.fused else p.name
    s.launch(f"{kind} {' '.join(p.fused)}" if p.fused else kind, layouts, outputs)


def _full(s: Simulator, p: Primitive) -> None:
    s.launch("Full", s.inputs(p), [s.fresh(p.outputs[0])])


def _write(s: Simulator, p: Primitive) -> None:
    s.launch(p.name, s.inputs(p), [s.fresh(p.outputs[0])])


# ---- Kernels over rows ----


def _rows_contiguous(x: Layout) -> bool:
    return x.contiguous and (not x.strides or x.strides[-1] == 1)


def _row_wise(s: Simulator, p: Primitive) -> None:
    """Softmax and RMSNorm: the output takes the input's memory or layout; other layouts are copied first."""
    x, others, output = p.inputs[0], s.inputs(p)[1:], p.outputs[0]
    layout = s.layouts[x]
    fine = _rows_contiguous(layout)
    if p.name == "RMSNorm" and fine and len(layout.shape) > 1:
        fine = layout.strides[-2] in (0, layout.shape[-1]) or layout.shape[-2] == 1
    if not fine:
        made = s.fresh(output)
        s.launch(f"Copy ({p.name})", [layout], [made])
        s.launch(p.name, [made, *others], [made])
    elif s.donatable(x):
        s.launch(p.name, [layout, *others], [s.take(output, x)])
    else:
        s.launch(p.name, [layout, *others], [s.fresh(output, layout)])


def _logsumexp(s: Simulator, p: Primitive) -> None:
    (x,) = s.inputs(p)
    x = x if _rows_contiguous(x) else s.copy(x, p.name)
    s.launch(p.name, [x], [s.fresh(p.outputs[0])])


def _rms_norm_vjp(s: Simulator, p: Primitive) -> None:
    """One kernel, with partial sums of the weight's gradient for each of up to 512 groups of rows, and their sum."""
    x, w, d = s.inputs(p)
    x, d = (layout if layout.row else s.copy(layout, p.name) for layout in (x, d))
    dx, dw = p.outputs
    rows, width = x.size // x.shape[-1], x.shape[-1]
    per_group = -(-rows // 512)
    partial = -(-rows // per_group) * width * w.itemsize
    s.temporary(partial)
    if s.donatable(p.inputs[0]):
        made = s.take(dx, p.inputs[0])
    elif s.donatable(p.inputs[2]):
        made = s.take(dx, p.inputs[2])
    else:
        made = s.fresh(dx)
    s.launch(p.name, [x, w, d], [made], extra=partial)
    s.launch("Reduce (RMSNormVJP)", [], [s.fresh(dw)], extra=partial)


def _rope_kernel(s: Simulator, p: Primitive) -> None:
    x, offset = s.inputs(p)
    output = p.outputs[0]
    heads = math.prod(x.shape[1:-2])
    length, width = x.shape[-2:]
    leading = len(x.shape)
    while leading > 3 and x.shape[-leading] == 1:
        leading -= 1
    if x.row:
        made = s.take(output, p.inputs[0]) if s.donatable(p.inputs[0], output) else s.fresh(output)
    elif leading == 3 or (len(x.shape) == 4 and x.strides[:3] == (length * heads * width, width, heads * width)):
        made = s.fresh(output)
    else:
        made = s.fresh(output)
        s.launch("Copy (RoPE)", [x], [made])
        x = made
    s.launch(p.name, [x, offset], [made])


def _cross_entropy_kernel(s: Simulator, p: Primitive) -> None:
    """Reads the logits once, although the gradient's kernel needs each row twice: the second time from a cache."""
    z, *others = s.inputs(p)
    z = z if z.row else s.copy(z, p.name)
    s.launch(p.name, [z, *others], [s.fresh(p.outputs[0])])


# ---- Matrix products ----


def _operand(s: Simulator, x: Layout, is_vector: bool) -> tuple[Layout, bool]:
    """A matrix as a kernel can read it, copied if need be, and whether it is transposed (check_transpose)."""
    rows, cols = x.strides[-2:]
    if cols == 1 and (not is_vector or rows == x.shape[-1]):
        return x, False
    if rows == 1 and (not is_vector or cols == x.shape[-2]):
        return x, True
    return s.copy(x, "matrix product"), False


def _matmul(s: Simulator, p: Primitive) -> None:
    """Matmul and AddMM: one kernel, or two with split k. A product c + a b also reads c."""
    a, b, *c = s.inputs(p)
    output = p.outputs[0]
    m, n, k = a.shape[-2], b.shape[-1], a.shape[-1]
    made = s.fresh(output)
    a, transposed = _operand(s, a, m == 1)
    b, _ = _operand(s, b, n == 1)
    flops = 2 * output.size * k
    batch = output.size // (m * n)
    if batch > 1 and not transposed and _is_one_matrix(a) and _is_broadcast_batch(b):
        m, batch = m * batch, 1
    tiles = -(-m // 16) * -(-n // 16)
    if min(m, n) > 1 and batch == 1 and tiles <= SMALL_DEVICE_SPLIT_K and k // 16 >= 8 and k >= max(m, n):
        blocks = -(-m // 32) * -(-n // 32)
        parts = min(max(2, _next_power_of_2(k // 16 // blocks)), 32)
        partial = s.temporary(parts * m * n * 4).bytes
        s.launch(f"{p.name} (split k)", [a, b], [], flops, extra=partial)
        s.launch("Sum of split k", c, [made], extra=partial)
    elif m == n == batch == 1:
        s.launch("Dot product", [a, b], [made], flops)
        s.launch("Sum of dot product", [], [made])
        s.launch("Copy (dot product)", [], [made])
    else:
        s.launch(p.name, [a, b, *c], [made], flops)


def _is_one_matrix(a: Layout) -> bool:
    """Whether the matrices of a batch follow each other in memory as the rows of one."""
    return (
        a.strides[-2] == a.shape[-1]
        and len(collapse(a.shape[:-2], a.strides[:-2])[0]) == 1
        and (a.strides[-3] == a.shape[-2] * a.shape[-1])
    )


def _is_broadcast_batch(b: Layout) -> bool:
    return all(step == 0 or n == 1 for n, step in zip(b.shape[:-2], b.strides[:-2], strict=True))


def _next_power_of_2(n: int) -> int:
    return 1 if n < 1 else 1 << (n - 1).bit_length()


def _sdpa_kernel(s: Simulator, p: Primitive) -> None:
    """The fused forward pass: causal, half of the scores are computed; with an array mask, all of them."""
    q, k, v, *mask = s.inputs(p)
    output = p.outputs[0]
    (causal,) = p.arguments
    batch, heads, length, width = q.shape
    keys = k.shape[2]
    visible = length * keys - (length * (length - 1) // 2 if causal else 0)
    q, k, v = (x if x.strides[-1] == 1 else s.copy(x, "SDPA") for x in (q, k, v))
    strides = (length * heads * width, width, heads * width, 1) if length > 8 else row_strides(output.shape)
    made = s.fresh(output)
    _, row, col = check_contiguity(output.shape, strides)
    made.strides, made.row, made.col = strides, row, col
    flops = 4 * batch * heads * visible * width
    s.launch("SDPA", [q, k, v, *mask], [made], flops)


# ---- Reductions ----


def _reduce(s: Simulator, p: Primitive) -> None:
    (x,), output = s.inputs(p), p.outputs[0]
    axes = list(p.arguments[1])
    if output.size == x.size:
        s.launch("Copy (reduce)", [x], [s.fresh(output)])
        return
    made = s.fresh(output)
    plan = _reduction_plan(x, axes)
    if plan is None:
        x = s.copy(x, "reduce")
        plan = _reduction_plan(x, axes)
        assert plan is not None
    kind, shape, strides = plan
    partial = 0  # elements
    if kind == "all":
        if x.size > 4 * 1024:
            partial = 32 * 4 if x.size * x.itemsize <= 1 << 26 else 1024 * 4
    elif kind == "columns":
        columns, count = strides[-1], math.prod(shape)
        if count < 32:
            pass
        elif columns < 32 and count >= 1024:
            partial = (128 if count >= 32768 else 32) * output.size
        elif count > 256 and output.size // 32 < 1024:
            partial = 32 * output.size
    if partial:
        size = s.temporary(partial * output.dtype.size).bytes
        s.launch(f"Reduce {kind}", [x], [], extra=size)
        s.launch("Reduce, second pass", [], [made], extra=size)
    else:
        s.launch(f"Reduce {kind}", [x], [made])


def _reduction_plan(x: Layout, axes: list[int]) -> tuple[str, list[int], list[int]] | None:
    """get_reduction_plan: all, rows or columns, with the reduced sizes and strides; None: copy first."""
    if x.size == x.data_size and len(axes) == len(x.shape) and x.contiguous:
        return "all", [x.size], [1]
    if x.row:
        shape, strides = [x.shape[axes[0]]], [x.strides[axes[0]]]
        for before, axis in pairwise(axes):
            if axis - 1 == before and x.shape[axis] > 1:
                shape[-1], strides[-1] = shape[-1] * x.shape[axis], x.strides[axis]
            else:
                shape.append(x.shape[axis])
                strides.append(x.strides[axis])
        kept = [(n, step) for n, step in zip(shape, strides, strict=True) if n > 1]
        shape, strides = [n for n, _ in kept], [step for _, step in kept]
        return ("rows" if strides[-1] == 1 else "columns"), shape, strides
    reductions = sorted(
        ((x.shape[a], x.strides[a]) for a in axes if x.shape[a] > 1),
        key=lambda r: (r[1] != 0, -r[1]),
    )
    for i in range(len(reductions) - 1, 0, -1):
        (n, step), (m, larger) = reductions[i], reductions[i - 1]
        if larger == n * step:
            del reductions[i]
            reductions[i - 1] = (n * m, step)
    shape, strides = [n for n, _ in reductions], [step for _, step in reductions]
    if strides[-1] == 1:
        return "rows", shape, strides
    if strides[-1] > 1:
        size, expanded = 1, False
        for i in range(len(x.shape) - 1, -1, -1):
            if i == axes[-1]:
                continue
            if x.strides[i] == 0:
                if x.shape[i] == 1:
                    continue
                expanded = True
                break
            if x.strides[i] != size and x.shape[i] != 1:
                break
            size *= x.shape[i]
        if size > strides[-1] or (size == strides[-1] and not expanded):
            return "columns", shape, strides
    return None


# ---- Gather, scatter, concatenation ----


def _gather(s: Simulator, p: Primitive) -> None:
    """Reads only the elements that it writes, and the indices."""
    output = p.outputs[0]
    made = s.fresh(output)
    s.launch(p.name, s.inputs(p)[1:], [made], extra=output.bytes)


def _copied_or_donated(s: Simulator, p: Primitive) -> Layout:
    """The first input as the output's initial value: in place if nothing else refers to it, otherwise copied."""
    x, output = p.inputs[0], p.outputs[0]
    layout = s.layouts[x]
    vector = layout.contiguous and layout.size == layout.data_size if p.name == "SliceUpdate" else layout.row
    if vector and layout.data_size > 1 and s.donatable(x, output):
        return s.take(output, x)
    made = s.fresh(output, layout if vector and layout.data_size > 1 else None)
    s.launch(f"Copy ({p.name})", [layout], [made])
    return made


def _scatter(s: Simulator, p: Primitive) -> None:
    """Reads the updates and the indices, and writes as many elements; a sum reads them first."""
    made = _copied_or_donated(s, p)
    *indices, updates = s.inputs(p)[1:]
    sums = p.arguments[0] == (2 if p.name == "Scatter" else 0)
    written = updates.size * made.itemsize
    s.launch(p.name, [*indices, updates], [], extra=written * (2 if sums else 1))


def _slice_update(s: Simulator, p: Primitive) -> None:
    made = _copied_or_donated(s, p)
    (update,) = s.inputs(p)[1:2]
    s.launch(p.name, [update], [], extra=update.size * made.itemsize)


def _concatenate(s: Simulator, p: Primitive) -> None:
    """One copy for each input."""
    made = s.fresh(p.outputs[0])
    for x in s.inputs(p):
        s.launch("Concatenate", [x], [], extra=x.size * made.itemsize)


_HANDLERS: dict[str, Callable[[Simulator, Primitive], None]] = {
    **dict.fromkeys([*UNARY, *BINARY, "Select", "Compiled"], _elementwise),
    "Transpose": _transpose,
    "Broadcast": _broadcast,
    "BroadcastAxes": _broadcast,
    "ExpandDims": _expand_dims,
    "Squeeze": _squeeze,
    "Slice": _slice,
    "Split": _split,
    "Depends": _depends,
    "View": _view_dtype,
    **dict.fromkeys(["Reshape", "Flatten", "Unflatten"], _reshape),
    "Contiguous": _contiguous_copy,
    "Full": _full,
    **dict.fromkeys(["Arange", "RandomBits", "ArgReduce"], _write),
    **dict.fromkeys(["Softmax", "RMSNorm"], _row_wise),
    "LogSumExp": _logsumexp,
    "RMSNormVJP": _rms_norm_vjp,
    "RoPE": _rope_kernel,
    **dict.fromkeys(["CrossEntropy", "CrossEntropyVJP"], _cross_entropy_kernel),
    **dict.fromkeys(["Matmul", "AddMM"], _matmul),
    "SDPA": _sdpa_kernel,
    "Reduce": _reduce,
    **dict.fromkeys(["Gather", "GatherAxis"], _gather),
    **dict.fromkeys(["Scatter", "ScatterAxis"], _scatter),
    "SliceUpdate": _slice_update,
    "Concatenate": _concatenate,
}
