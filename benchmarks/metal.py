"""What a training step costs on Apple's GPUs and an H200, predicted without one.

metal_model.py counts the kernels that MLX would run on Metal, with their bytes and FLOPs. The predicted time of a
kernel is the larger of its bytes over a part of the memory bandwidth and its FLOPs over a part of the peak, plus a
constant for its launch. All predictions rest on these assumptions; none has been measured on a Mac. The H200's are for
the same kernels, although MLX's CUDA backend has others.

    .venv/bin/python benchmarks/metal.py                                  # configs/m3pro.yaml
    .venv/bin/python benchmarks/metal.py --config configs/medium.yaml --kernels 20
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from metal_graph import Graph, fuse, trace
from metal_model import Kernel, Run, simulate
from mlx.utils import tree_flatten, tree_unflatten

from anarchobot.config.errors import UserError
from anarchobot.config.loading import load_config
from anarchobot.config.schema import Config, ModelConfig
from anarchobot.model.architecture import forward_pass, gradients
from anarchobot.model.loss import logits
from anarchobot.model.parameters import parameter_shapes
from anarchobot.model.step_options import MicroBatch, StepOptions
from anarchobot.numerics.device import gpu_path
from anarchobot.numerics.eval_order import depend
from anarchobot.optim import muon_adamw
from anarchobot.optim.param_groups import state_shapes
from anarchobot.system.peak_flops import peak_tflops
from anarchobot.system.technique import default_settings
from anarchobot.training.mlx_engine import global_norm

HERE = Path(__file__).parent

# ---- Assumptions ----

MEMORY_EFFICIENCY = 0.85  # of the bandwidth
FLOP_EFFICIENCY, FLOP_EFFICIENCY_H200 = 0.75, 0.6  # of the peak
LAUNCH_SECONDS, LAUNCH_SECONDS_H200 = 4e-6, 3e-6
CACHED_TOKENS = 1024  # of the token row
LIMIT = 1.15  # memory limit as a multiple of the peak without run-ahead

# The largest GPU of each chip: cores and memory bandwidth in GB/s, from Apple's announcements (apple.com/newsroom) and
# technical specifications (support.apple.com/specs). FLOP/s: system/peak_flops.py. M5 is left out: the FLOP/s of its
# matrix units are not published.
APPLE_GPUS = {
    "M1": (8, 68.25), "M1 Pro": (16, 200), "M1 Max": (32, 400), "M1 Ultra": (64, 800),
    "M2": (10, 100), "M2 Pro": (19, 200), "M2 Max": (38, 400), "M2 Ultra": (76, 800),
    "M3": (10, 100), "M3 Pro": (18, 150), "M3 Max": (40, 400), "M3 Ultra": (80, 819),
    "M4": (10, 120), "M4 Pro": (20, 273), "M4 Max": (40, 546),
}  # fmt: skip
H200_GB_PER_SECOND = 4800  # NVIDIA's data sheet


class Chip(NamedTuple):
    name: str
    gb_per_second: float
    tflops: float

    def seconds(self, kernel: Kernel) -> tuple[float, float]:
        """The times for memory and for arithmetic."""
        flops = self.tflops * 1e12 * (FLOP_EFFICIENCY_H200 if self.name == "H200" else FLOP_EFFICIENCY)
        return kernel.bytes / (self.gb_per_second * 1e9 * MEMORY_EFFICIENCY), kernel.flops / flops

    @property
    def launch(self) -> float:
        return LAUNCH_SECONDS_H200 if self.name == "H200" else LAUNCH_SECONDS


def chip(name: str) -> Chip:
    cores, bandwidth = APPLE_GPUS.get(name, (None, H200_GB_PER_SECOND))
    tflops = peak_tflops(name, cores, "bfloat16")
    assert tflops is not None
    return Chip(name, bandwidth, tflops)


ALL_CHIPS = [chip(name) for name in [*APPLE_GPUS, "H200"]]
CHIPS = [chip(name) for name in ("M3 Pro", "M3 Max", "M4 Max", "H200")]  # the tables' columns


class Time(NamedTuple):
    """Seconds: of kernels limited by memory, of those limited by arithmetic, and of launches."""

    memory: float
    arithmetic: float
    launches: float

    @property
    def total(self) -> float:
        return sum(self)


def predict(kernels: Sequence[Kernel], chip: Chip) -> Time:
    memory = arithmetic = 0.0
    for kernel in kernels:
        m, a = chip.seconds(kernel)
        memory, arithmetic = (memory + m, arithmetic) if m >= a else (memory, arithmetic + a)
    return Time(memory, arithmetic, chip.launch * len(kernels))


class Subject(NamedTuple):
    """A function and its arguments; nothing else refers to the last `donated` of them."""

    function: Callable[..., Sequence[mx.array]]
    arguments: Sequence[mx.array]
    donated: int = 0

    def graph(self) -> Graph:
        with gpu_path():
            return fuse(trace(self.function, *self.arguments))

    def simulate(self, graph: Graph, **options: Any) -> Run:
        return simulate(graph, graph.inputs[len(graph.inputs) - self.donated :], **options)


# ---- The project's step ----


def zeros(shapes: dict[str, tuple[int, ...]], dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    return [mx.zeros(shape, dtype) for shape in shapes.values()]


def step_options(config: Config, checkpointing: bool) -> StepOptions:
    """As MLXEngine chooses them on Metal."""
    settings = default_settings(config, "metal", "bfloat16")
    return StepOptions(
        recompute=checkpointing,
        technique=settings.technique,
        wait=depend,
        attention_block=config.train.attention_block,
        loss_chunk=settings.loss_chunk,
    )


def micro_batch(config: Config, *, checkpointing: bool) -> Subject:
    """Loss and gradients of one micro-batch in bfloat16, added to float32 sums of earlier ones."""
    model, rows, length = config.model, config.train.micro_batch_size, config.data.seq_len
    shapes = parameter_shapes(model)
    names = list(shapes)
    options = step_options(config, checkpointing)

    def function(
        tokens: mx.array, targets: mx.array, segments: mx.array, key: mx.array, scale: mx.array, *arrays: mx.array
    ) -> list[mx.array]:
        params, sums = dict(zip(names, arrays, strict=False)), dict(zip(names, arrays[len(names) :], strict=True))
        batch = MicroBatch(
            tokens, targets, scale, segments if config.data.document_mask else None, key if model.dropout else None
        )
        loss, grads = gradients(model)(params, batch, model, sums=sums, dtype=mx.bfloat16, options=options)
        return [*grads.values(), loss]  # the order in which the engine evaluates them

    ids = mx.zeros((rows, length), mx.int32)
    scalars = [ids, ids, ids, mx.zeros((2,), mx.uint32), mx.array(1.0)]
    # MLXEngine casts matrices once per step.
    params = [x.astype(mx.bfloat16) if x.ndim == 2 else x for x in zeros(shapes)]
    return Subject(function, [*scalars, *params, *zeros(shapes)], donated=len(names))


def cast_and_norm(config: Config) -> Subject:
    """What else a step does once: matrices in bfloat16, and the norm of all gradients."""
    shapes = parameter_shapes(config.model)
    names = list(shapes)

    def function(*arrays: mx.array) -> list[mx.array]:
        params, grads = arrays[: len(names)], dict(zip(names, arrays[len(names) :], strict=True))
        return [*(p.astype(mx.bfloat16) for p in params if p.ndim == 2), global_norm(grads, depend)]

    return Subject(function, [*zeros(shapes), *zeros(shapes)])


def update(config: Config) -> Subject:
    """The optimizer's update of all parameters."""
    model, train = config.model, config.train
    shapes = parameter_shapes(model)
    names = list(shapes)
    states = state_shapes(shapes, train)
    slots = [(kind, name) for kind, by_name in states.items() for name in by_name]

    def function(
        factor: mx.array, lr: mx.array, momentum: mx.array, count: mx.array, *arrays: mx.array
    ) -> list[mx.array]:
        params, grads = dict(zip(names, arrays, strict=False)), dict(zip(names, arrays[len(names) :], strict=False))
        state: muon_adamw.State = {kind: {} for kind in states}
        for (kind, name), array in zip(slots, arrays[2 * len(names) :], strict=True):
            state[kind][name] = array
        new, moments = muon_adamw.update(
            params, grads, state, lr, momentum, count, train, model.head_size, depend, factor=factor
        )
        return [*new.values(), *(moments[kind][name] for kind, name in slots)]

    moments = [mx.zeros(states[kind][name]) for kind, name in slots]
    arrays = [*zeros(shapes), *zeros(shapes), *moments]
    return Subject(function, [*([mx.array(1.0)] * 4), *arrays], donated=len(arrays))


def generation(model: ModelConfig, tokens: int, cached: int) -> Subject:
    """The logits of the last of `tokens` new tokens, given the keys and values of `cached` earlier ones."""
    shapes = parameter_shapes(model)
    names = list(shapes)

    def function(ids: mx.array, *arrays: mx.array) -> list[mx.array]:
        params, caches = dict(zip(names, arrays, strict=False)), kv_caches(model, arrays[len(names) :], cached)
        hidden = forward_pass(model).hidden_states(params, ids, model, dtype=mx.bfloat16, caches=caches)
        return [logits(hidden[:, -1], params, model), *cache_arrays(caches)]

    caches = cache_inputs(model, cached)
    return Subject(function, [mx.zeros((1, tokens), mx.int32), *zeros(shapes, mx.bfloat16), *caches], len(caches))


# ---- mlx-lm's model of the same shape ----


def peer(model: ModelConfig) -> Any:
    from mlx_lm.models.llama import Model, ModelArgs

    made = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=model.d_model,
            num_hidden_layers=model.n_layers,
            intermediate_size=model.mlp_size,
            num_attention_heads=model.n_heads,
            num_key_value_heads=model.kv_heads,
            head_dim=model.head_size,
            rms_norm_eps=model.norm_eps,
            vocab_size=model.vocab_size,
            tie_word_embeddings=model.tie_embeddings,
            rope_theta=model.rope_theta,
        )
    )
    names, weights = flat(made.parameters())
    made.update(
        tree_unflatten([(name, mx.zeros(x.shape, mx.bfloat16)) for name, x in zip(names, weights, strict=True)])
    )
    return made


def flat(parameters: Any) -> tuple[list[str], list[mx.array]]:
    leaves: list[tuple[str, Any]] = tree_flatten(parameters)  # type: ignore[assignment]
    return [name for name, _ in leaves], [x for _, x in leaves]


def peer_micro_batch(config: Config, *, checkpointing: bool) -> Subject:
    """mlx-lm's loss and its gradients by automatic differentiation, with weights and gradients in bfloat16."""
    from mlx_lm.tuner import trainer

    rows, length = config.train.micro_batch_size, config.data.seq_len
    model = peer(config.model)
    names, weights = flat(model.trainable_parameters())

    def function(tokens: mx.array, targets: mx.array, *arrays: mx.array) -> list[mx.array]:
        def loss(*arrays: mx.array) -> mx.array:
            model.update(tree_unflatten(list(zip(names, arrays, strict=True))))
            z = model(tokens)
            losses = mx.fast.cross_entropy(z, targets).astype(z.dtype)  # nn.losses.cross_entropy on a GPU
            return losses.astype(mx.float32).sum() / targets.size

        layer = type(model.model.layers[0])
        call = layer.__call__
        try:
            if checkpointing:
                trainer.grad_checkpoint(model.model.layers[0])  # type: ignore[no-untyped-call]
            (value,), grads = mx.vjp(loss, list(arrays), [mx.array(1.0)])
        finally:
            layer.__call__ = call
        return [value, *grads]

    ids = mx.zeros((rows, length), mx.int32)
    return Subject(function, [ids, ids, *weights])


def peer_generation(model: ModelConfig, tokens: int, cached: int) -> Subject:
    """As mlx_lm.generate does it: the tokens but the last only fill the cache, then the last one yields the logits."""
    made = peer(model)
    names, weights = flat(made.parameters())

    def function(ids: mx.array, *arrays: mx.array) -> list[mx.array]:
        made.update(tree_unflatten(list(zip(names, arrays, strict=False))))
        caches = kv_caches(model, arrays[len(names) :], cached)
        if tokens > 1:
            made(ids[:, :-1], cache=caches)
        return [made(ids[:, -1:], cache=caches)[:, -1], *cache_arrays(caches)]

    caches = cache_inputs(model, cached)
    return Subject(function, [mx.zeros((1, tokens), mx.int32), *weights, *caches], len(caches))


def cache_inputs(model: ModelConfig, cached: int) -> list[mx.array]:
    """mlx-lm grows its caches by 256 tokens; these have room for the next token."""
    shape = (1, model.kv_heads, cached + 256, model.head_size)
    return [mx.zeros(shape, mx.bfloat16) for _ in range(2 * model.n_layers)] if cached else []


def kv_caches(model: ModelConfig, arrays: Sequence[mx.array], cached: int) -> list[Any]:
    from mlx_lm.models.cache import KVCache

    caches: list[Any] = [KVCache() for _ in range(model.n_layers)]  # type: ignore[no-untyped-call]
    for cache, keys, values in zip(caches, arrays[::2], arrays[1::2], strict=False):
        cache.keys, cache.values, cache.offset = keys, values, cached
    return caches


def cache_arrays(caches: Sequence[Any]) -> Iterator[mx.array]:
    for cache in caches:
        yield cache.keys
        yield cache.values


# ---- Tables ----


class Row(NamedTuple):
    """`seconds` by chip; peaks in bytes: with run-ahead, without, and with run-ahead under a memory limit."""

    kernels: int
    bytes: int
    flops: int
    seconds: dict[str, Time]
    peak: int
    peak_without: int
    peak_limited: int

    def json(self) -> dict[str, Any]:
        seconds = {chip: t._asdict() for chip, t in self.seconds.items()}
        return self._asdict() | {"seconds": seconds}


def measure(subject: Subject) -> tuple[Row, list[Kernel]]:
    graph = subject.graph()
    run, without = subject.simulate(graph), subject.simulate(graph, run_ahead=False)
    limited = subject.simulate(graph, limit=int(LIMIT * without.peak))
    seconds = {chip.name: predict(run.kernels, chip) for chip in ALL_CHIPS}
    row = Row(len(run.kernels), run.bytes, run.flops, seconds, run.peak, without.peak, limited.peak)
    return row, run.kernels


def in_ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def table(rows: dict[str, Row]) -> Iterator[str]:
    first = CHIPS[0].name
    others = [chip.name for chip in CHIPS[1:]]
    yield f"| | kernels | GB | TFLOP | {first} ms (memory, FLOPs, launches) | " + " | ".join(others) + " | peak GB |"
    yield "| --- | ---: | ---: | ---: | ---: | " + "---: | " * len(others) + "---: |"
    for name, row in rows.items():
        time = row.seconds[first]
        parts = ", ".join(f"{1e3 * seconds:.0f}" for seconds in time)
        peaks = " / ".join(f"{peak / 1e9:.2f}" for peak in (row.peak, row.peak_without, row.peak_limited))
        milliseconds = " | ".join(in_ms(row.seconds[chip].total) for chip in others)
        yield (
            f"| {name} | {row.kernels:,} | {row.bytes / 1e9:.2f} | {row.flops / 1e12:.3f} | "
            f"{in_ms(time.total)} ({parts}) | {milliseconds} | {peaks} |"
        )


def step_table(config: Config, rows: dict[str, Row], chips: Sequence[Chip]) -> Iterator[str]:
    """Tokens per second of a whole step, and the update's share of its time."""
    train = config.train
    tokens = train.grad_accum_steps * train.micro_batch_size * config.data.seq_len
    names = ("ours", "ours, checkpointed")
    yield f"| tokens/s, micro-batches x {train.grad_accum_steps} and an update | " + " | ".join(names) + " |"
    yield "| --- | ---: | ---: |"
    for c in chips:
        cells = []
        for name in names:
            update = rows["update"].seconds[c.name].total
            once = rows["cast and norm"].seconds[c.name].total + update
            total = train.grad_accum_steps * rows[name].seconds[c.name].total + once
            cells.append(f"{tokens / total:,.0f} (update {update / total:.1%})")
        yield f"| {c.name} | {' | '.join(cells)} |"


def kernel_table(kernels: Sequence[Kernel], count: int) -> Iterator[str]:
    """The most expensive kernels on the first chip, by kind and shapes."""
    chip = CHIPS[0]
    groups: dict[tuple[str, str], list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[kernel.kind, kernel.shapes].append(kernel)
    times = {key: predict(group, chip) for key, group in groups.items()}
    total = sum(time.total for time in times.values())
    yield f"| kernel | shapes | launches | GB | TFLOP | {chip.name} ms | share | limited by |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"
    for key in sorted(groups, key=lambda key: -times[key].total)[:count]:
        group, time = groups[key], times[key]
        moved, flops = sum(k.bytes for k in group) / 1e9, sum(k.flops for k in group) / 1e12
        by = max(zip(time, ("memory", "FLOPs", "launches"), strict=True))[1]
        kind = key[0] if len(key[0]) < 90 else key[0][:90] + "..."
        yield (
            f"| {kind} | {key[1]} | {len(group):,} | {moved:.2f} | {flops:.3f} | {1e3 * time.total:.1f} | "
            f"{time.total / total:.1%} | {by} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default=HERE.parent / "configs" / "m3pro.yaml", type=Path, help="default: m3pro.yaml"
    )
    parser.add_argument("--kernels", type=int, metavar="N", help="also print the N most expensive kernels of each row")
    parser.add_argument("--only", metavar="TEXT", help="only rows whose name contains TEXT, and no whole step")
    parser.add_argument("--all-chips", action="store_true", help="also print the whole step on every chip")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config).config
    except UserError as error:
        sys.exit(f"error: {error}")
    length = config.data.seq_len
    subjects: dict[str, Callable[[], Subject]] = {
        "ours": lambda: micro_batch(config, checkpointing=False),
        "ours, checkpointed": lambda: micro_batch(config, checkpointing=True),
        "mlx-lm": lambda: peer_micro_batch(config, checkpointing=False),
        "mlx-lm, checkpointed": lambda: peer_micro_batch(config, checkpointing=True),
        "cast and norm": lambda: cast_and_norm(config),
        "update": lambda: update(config),
        "prompt, ours": lambda: generation(config.model, length, 0),
        "prompt, mlx-lm": lambda: peer_generation(config.model, length, 0),
        "token, ours": lambda: generation(config.model, 1, CACHED_TOKENS),
        "token, mlx-lm": lambda: peer_generation(config.model, 1, CACHED_TOKENS),
    }
    rows: dict[str, Row] = {}
    kernels: dict[str, list[Kernel]] = {}
    for name, subject in subjects.items():
        if arguments.only is None or arguments.only in name:
            rows[name], kernels[name] = measure(subject())
    print(f"{arguments.config.name}: micro-batches of {config.train.micro_batch_size} x {length} tokens, bfloat16\n")
    print("\n".join(table(rows)))
    print(
        "\nPeak GB beside arrays that stay (weights; of a micro-batch, the sums of gradients count): with run-ahead, "
        f"without, and with run-ahead under a memory limit of {LIMIT} times the peak without."
    )
    if arguments.only is None:
        print("\n" + "\n".join(step_table(config, rows, ALL_CHIPS if arguments.all_chips else CHIPS)))
    if arguments.kernels:
        for name in rows:
            print(f"\n{name}\n\n" + "\n".join(kernel_table(kernels[name], arguments.kernels)))
    if arguments.json:
        arguments.json.write_text(json.dumps({name: row.json() for name, row in rows.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
