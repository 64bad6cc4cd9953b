"""A model of MLX's Metal backend, for machines without a Mac: which kernels a function runs, what they read and write,
how many FLOPs they have, and how much memory is allocated at the peak.

    graph = trace(function, *arrays)     # as MLX traces it; nothing is evaluated, so full shapes cost nothing
    graph = fuse(graph)                  # as mx.compile (mlx/compile.cpp)
    run = simulate(graph)                # as MLX's evaluation on Metal: run.kernels, run.peak

`trace` and `fuse` are in metal_graph.py. It follows the source of MLX 0.32: `simulate` computes the strides of every
array as each primitive's eval_gpu does, from which follow the copies of non-contiguous operands, and holds buffers as
metal/eval.cpp does: until the command buffer that uses them has completed, with up to ten in flight.

What it is checked against (tests/test_metal_model.py): the fused kernels are those of mx.compile, strides of views are
those of MLX's arrays, bytes and FLOPs of single operations are those computed by hand, and the measured peak memory of
MLX's CPU backend, which shares Metal's evaluation order and runs ahead in a similar way, is between the model's peaks
with and without run-ahead. What is not checked: nothing has been measured on a Mac, neither memory nor time.

What it does not know: caches (each kernel reads its distinct input elements once and writes its output once), the
efficiency of single kernels, allocation granularity, MLX's buffer cache, the time to build a graph, and an idle GPU
between evaluations.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from metal_graph import BINARY, UNARY, Array, Graph, Primitive, Shape, evaluation_order

MAX_ACTIVE_BUFFERS = 10  # command buffers in flight (mlx/transforms.cpp)
DONATION_EXTRA = 16384  # bytes by which a donated buffer may be larger (mlx/backend/common/utils.h)
SMALL_DEVICE_SPLIT_K = 1024  # tiles of 16 x 16 up to which a matrix product is split along k (metal/matmul.cpp)


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
