"""The parts of a training step, each to be run alone, on arrays of the step's shapes.

Shapes: b rows of a worker, L tokens, N = b L, D d_model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from anarchobot.config.schema import Config
from anarchobot.data.batches import Batch
from anarchobot.model import loss
from anarchobot.model.gradient_accumulator import Gradients, Params
from anarchobot.model.llama import block, flops
from anarchobot.model.llama.attention import Attended, Attention
from anarchobot.model.llama.block import KeptAttention, KeptMLP
from anarchobot.model.llama.forward import blocks, embed, head_name
from anarchobot.model.llama.gradients import embed_backward
from anarchobot.model.norm import rms_norm, rms_norm_backward
from anarchobot.optim import muon_adamw as hybrid
from anarchobot.training.mlx_engine import MLXEngine


@dataclass(frozen=True)
class Part:
    """`flops` in a whole step. `work(i)` does what worker i does of it in one micro-batch (an update: in a step), and
    evaluates it; a step has that `times` times."""

    name: str
    flops: int
    work: Callable[[int], None]
    times: int


def parts_of(engine: MLXEngine, config: Config, batch: Batch) -> list[Part]:
    """The parts of a step on `batch`, in the order of the step."""
    micro_batches, sequences, _ = batch.inputs.shape
    model, layers = config.model, config.model.n_layers
    rows, tokens, seen = micro_batches * sequences, batch.inputs.size, query_blocks(engine, config)
    counts = {
        "embedding": 0,
        "attention forward": layers * flops.attention_forward(model, rows, seen),
        "MLP forward": layers * flops.mlp_forward(model, tokens),
        "head and loss": flops.head(model, tokens),
        "blocks forward again": layers * flops.block_again(model, rows, seen),
        "MLP backward": layers * flops.mlp_backward(model, tokens),
        "attention backward": layers * flops.attention_backward(model, rows, seen),
    }
    if not engine.technique.recompute:
        del counts["blocks forward again"]
    shares = [_share(engine, config, batch, worker) for worker in range(engine.workers.count)]
    parts = [Part(name, count, _by_name(shares, name), micro_batches) for name, count in counts.items()]
    if config.train.optimizer == "muon_adamw":
        muon = flops.muon(model, config.train.muon_split_heads, engine.device.type == mx.DeviceType.cpu)
        parts.append(Part("update by Muon", muon, _update(engine, config, "muon.momentum"), 1))
    return [*parts, Part("update by AdamW", 0, _update(engine, config, "adamw.first"), 1)]


def query_blocks(engine: MLXEngine, config: Config) -> list[tuple[int, int]]:
    """The blocks of queries that a worker's attention goes through."""
    rows = config.train.micro_batch_size // engine.workers.count
    return Attention(config.model, rows, config.data.seq_len, block=engine.technique.attention_block).query_blocks()


def _by_name(shares: list[dict[str, Callable[[], None]]], name: str) -> Callable[[int], None]:
    return lambda worker: shares[worker][name]()


def _share(engine: MLXEngine, config: Config, batch: Batch, worker: int) -> dict[str, Callable[[], None]]:
    """A worker's rows of the first micro-batch through each part, all layers of it."""
    model, technique = config.model, engine.technique
    params = dict(engine.params)  # a step uses the engine's own up
    rows = batch.inputs.shape[1] // engine.workers.count
    own_rows = slice(worker * rows, (worker + 1) * rows)
    tokens, targets = (mx.array(ids[0, own_rows]) for ids in (batch.inputs, batch.targets))
    segments = None if batch.segments is None else mx.array(batch.segments[0, own_rows])
    attention = Attention(model, rows, tokens.shape[1], segments, technique.attention_block, technique.wait)
    key = mx.random.key(0) if model.dropout else None
    head, layers = head_name(model), blocks(params, model)

    def embedding(params: Params, sums: Params) -> tuple[mx.array, Params]:
        x = embed(params, tokens, model, engine.dtype)
        embed_backward(tokens, x, model, Gradients(sums))
        return x, sums

    def attention_forward(p: Params, x: mx.array, first_v: mx.array | None) -> list[mx.array]:
        out, kept = block.attention_forward(p, x, model, attention, key, first_v)
        return [out, kept.q, kept.k, kept.v, *kept.attended]

    def mlp_forward(p: Params, x: mx.array) -> tuple[mx.array, list[tuple[mx.array, mx.array]]]:
        out, kept = block.mlp_forward(p, x, model, key, technique.mlp_rows)
        return out, kept.chunks

    def forward_again(p: Params, x: mx.array, first_v: mx.array | None) -> list[Any]:
        x, *kept = attention_forward(p, x, first_v)
        return [x, kept, mlp_forward(p, x)[1]]

    def head_and_loss(params: Params, x: mx.array, sums: Params) -> tuple[mx.array, Params]:
        norm = params["model.norm.weight"]
        hidden = rms_norm(x, norm, model.norm_eps)
        _, dhidden, sums[head] = loss.loss_and_gradients(
            hidden, params[head], targets.reshape(-1), model, mx.array(1.0), sums.pop(head, None),
            technique.loss_chunk, technique.wait,
        )  # fmt: skip
        dx, dnorm = rms_norm_backward(x, norm, model.norm_eps, dhidden)
        Gradients(sums).add("model.norm.weight", dnorm)
        return dx, sums

    def mlp_backward(
        p: Params, x: mx.array, chunks: list[tuple[mx.array, mx.array]], dy: mx.array, sums: Params
    ) -> tuple[mx.array, Params]:
        kept = KeptMLP(x, list(chunks))  # which it uses up
        return block.mlp_backward(p, kept, dy, model, technique.wait, key, Gradients(sums)), sums

    def attention_backward(
        p: Params, x: mx.array, kept: list[mx.array], dy: mx.array, sums: Params
    ) -> tuple[mx.array, Params]:
        q, k, v, *attended = kept
        halves = KeptAttention(x, q, k, v, Attended(*attended), model.value_residual)
        dx, _ = block.attention_backward(p, halves, dy, attention, key, Gradients(sums))
        return dx, sums

    x = embed(params, tokens, model, engine.dtype)  # stands for every block's input, and for every gradient
    first_v = attention_forward(layers[0], x, None)[3] if model.value_residual else None
    kept = attention_forward(layers[0], x, first_v)[1:]
    chunks = mlp_forward(layers[0], x)[1]
    mx.eval(tokens, targets, segments, key, x, first_v, kept, chunks)

    def forward(function: Any, *inputs: Any) -> Callable[[], None]:
        function = mx.compile(function) if engine.compiled else function

        def work() -> None:
            for p in layers:
                mx.eval(function(p, *inputs))

        return work

    def backward(function: Any, params: list[Params], *inputs: Any, adds: bool = False) -> Callable[[], None]:
        """`adds`: to sums that there are already, as also in the later of several micro-batches."""
        function = mx.compile(function) if engine.compiled else function
        sums: Params = {}
        adds = adds or len(batch.inputs) > 1

        def work() -> None:
            nonlocal sums
            for p in params:
                dx, sums = function(p, *inputs, sums if adds else {})
                mx.eval(dx, sums)

        return work

    return {
        "embedding": backward(embedding, [params], adds=model.tie_embeddings),
        "attention forward": forward(attention_forward, x, first_v),
        "MLP forward": forward(mlp_forward, x),
        "head and loss": backward(head_and_loss, [params], x),
        "blocks forward again": forward(forward_again, x, first_v),
        "MLP backward": backward(mlp_backward, layers, x, chunks, x),
        "attention backward": backward(attention_backward, layers, x, kept, x),
    }


def _update(engine: MLXEngine, config: Config, moment: str) -> Callable[[int], None]:
    """One update of the parameters that have this moment, each worker its share, gradients clipped first."""
    train, params = config.train, dict(engine.params)
    state = hybrid.init_state(params, train)

    def update(params: Params, grads: Params, state: hybrid.State, scalars: list[mx.array]) -> Any:
        factor, lr, momentum, count = scalars
        grads = {name: grads.pop(name) * factor for name in list(grads)}
        return hybrid.update(
            params, grads, state, lr, momentum, count, train, config.model.head_size, engine.technique.wait
        )

    run = mx.compile(update) if engine.compiled else update
    scalars = [mx.array(x) for x in (1.0, 0.0, train.momentum, 1.0)]  # a rate of zero: all is computed, nothing moves
    held = []  # each worker's parameters and state, which an update uses up and gives back
    for names in hybrid.shares(params, state, engine.workers.count):
        own = {name: params[name] for name in names if name in state[moment]}
        held.append((own, {kind: {n: a[n] for n in own if n in a} for kind, a in state.items()}))
    mx.eval(state, scalars)

    def work(worker: int) -> None:
        new = run(held[worker][0], {n: params[n] for n in held[worker][0]}, held[worker][1], scalars)
        mx.eval(new)
        held[worker] = new

    return work
