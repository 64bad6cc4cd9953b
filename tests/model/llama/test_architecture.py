"""FLOP counts against products listed by hand, and against the products that a training step executes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import Config, ModelConfig, TrainConfig
from anarchobot.data.windows import Batch
from anarchobot.model.architecture import architecture
from anarchobot.model.parameters import model_flops, parameter_shapes
from anarchobot.numerics.device import gpu_path
from anarchobot.optim.param_groups import muon_flops, optimizer_of, split_heads
from anarchobot.optim.polar_express import orthogonalize
from anarchobot.training.mlx_engine import MLXEngine

LLAMA = architecture("llama")
Product = tuple[int, int, int]  # m, n, k of [m, k] times [k, n]


def operations(products: list[Product]) -> int:
    return sum(2 * m * n * k for m, n, k in products)


# Two rows of 7 tokens in blocks of 3 queries, which see 3, 6 and 7 keys; 6 query heads share 2 key heads of size 4.
MODEL = ModelConfig(
    vocab_size=100, n_layers=3, d_model=12, n_heads=6, n_kv_heads=2, head_dim=4, mlp_multiple=2.5, tie_embeddings=False
)
ROWS, BLOCKS = 2, [(0, 3), (3, 6), (6, 7)]
PROJECTIONS: list[Product] = [(14, 24, 12), (14, 8, 12), (14, 8, 12), (14, 12, 24)]  # q, k, v, o
SCORES: list[Product] = [(3, 3, 4), (3, 6, 4), (1, 7, 4)] * (ROWS * 6)  # for each row and query head
VALUES: list[Product] = [(3, 4, 3), (3, 4, 6), (1, 4, 7)] * (ROWS * 6)
MLP: list[Product] = [(14, 30, 12), (14, 30, 12), (14, 12, 30)]  # gate, up, down


def backward(products: list[Product]) -> list[Product]:
    """dx = dy W and dW = dy^T x for each y = x W^T."""
    return [(m, k, n) for m, n, k in products] + [(n, k, m) for m, n, k in products]


def test_step_flops_by_part() -> None:
    head = [(14, 100, 12)]
    queries_and_keys = operations(SCORES + backward(SCORES) + backward(VALUES))
    again = operations(PROJECTIONS + SCORES + VALUES + MLP[:2])
    assert LLAMA.step_flops(MODEL, ROWS, BLOCKS) == {
        "embedding": 0,
        "attention forward": 3 * operations(PROJECTIONS + SCORES + VALUES),
        "MLP forward": 3 * operations(MLP),
        "head and loss": operations(head + backward(head)),
        "blocks forward again": 3 * again,
        "MLP backward": 3 * operations(backward(MLP)),
        "attention backward": 3 * (operations(backward(PROJECTIONS)) + queries_and_keys),
    }
    forward = 3 * (PROJECTIONS + SCORES + VALUES + MLP) + head
    assert model_flops(MODEL, ROWS, BLOCKS) == operations(forward + backward(forward))
    assert LLAMA.recomputed_flops(MODEL, ROWS, BLOCKS, False) == 3 * operations(SCORES)
    assert LLAMA.recomputed_flops(MODEL, ROWS, BLOCKS, True) == 3 * (operations(SCORES) + again)


def test_model_flops_are_six_per_weight_and_token_plus_attention() -> None:
    """One row in a single block: scores are computed for all keys, although half of them are masked."""
    matrices = 3 * (12 * 24 + 2 * 12 * 8 + 24 * 12 + 3 * 12 * 30) + 100 * 12
    assert model_flops(MODEL, 1, [(0, 7)]) == 7 * (6 * matrices + 3 * 6 * 2 * 24 * 7)


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the FLOPs of all MLX matrix products except row sums, which are products with one column."""
    counted = [0]
    product, sum_of_product = mx.array.__matmul__, mx.addmm

    def count(a: mx.array, b: mx.array) -> None:
        if b.shape[-1] > 1:
            leading = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
            counted[0] += 2 * int(np.prod(leading)) * a.shape[-2] * a.shape[-1] * b.shape[-1]

    def counted_product(a: mx.array, b: mx.array) -> mx.array:
        count(a, b)
        return product(a, b)

    def counted_sum(c: mx.array, a: mx.array, b: mx.array, /, alpha: float = 1.0, beta: float = 1.0) -> mx.array:
        count(a, b)
        return sum_of_product(c, a, b, alpha, beta)

    with monkeypatch.context() as patch:
        patch.setattr(mx.array, "__matmul__", counted_product)
        patch.setattr(mx, "addmm", counted_sum)
        yield counted


@pytest.mark.parametrize(
    ("model", "train"),
    [
        ({}, {}),
        ({"n_kv_heads": 2, "head_dim": 6, "tie_embeddings": False}, {"attention_block": 5, "grad_accum_steps": 3}),
        ({"qk_norm": True}, {"muon_split_heads": False, "loss_chunk": 10, "normuon": False}),
        ({"n_kv_heads": 1, "n_heads": 2, "head_dim": 4}, {"muon_split_heads": False}),
        ({"ffn_activation": "gelu", "logit_softcap": 10.0}, {"optimizer": "adamw"}),
        ({}, {"gradient_checkpointing": True, "attention_block": 16}),
        ({"post_norms": True}, {"gradient_checkpointing": True}),
        (
            {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"], "attention_softcap": 50.0},
            {"attention_block": 16},
        ),
        ({"d_model": 512, "n_layers": 1, "mlp_multiple": 1.5}, {}),  # wide enough for Muon's products in strips
    ],
    ids=[
        "plain",
        "blocks",
        "whole heads",
        "one key head",
        "adamw",
        "recomputed",
        "recomputed norms",
        "windows",
        "strips",
    ],
)
def test_executed_flops_equal_the_count(
    model: dict[str, Any], train: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"vocab_size": 61, "n_layers": 2, "d_model": 32, "n_heads": 4, **model}
    settings = {"device": "cpu", "cpu_threads": 1, "micro_batch_size": 2, "grad_accum_steps": 1, **train}
    config = Config.model_validate({"model": shape, "data": {"seq_len": 40}, "train": settings})
    engine = MLXEngine(config)
    micro_batches = config.train.grad_accum_steps
    ids = np.random.default_rng(0).integers(0, 61, (2, micro_batches, 2, 40)).astype(np.int32)
    with counting(monkeypatch) as counted:
        engine.train_step(Batch(ids[0], ids[1]), 1, 0.01, 0.9)

    size, again = config.train.attention_block or 10**6, config.train.gradient_checkpointing
    blocks = [(start, min(start + size, 40)) for start in range(0, 40, size)]
    expected = model_flops(config.model, 2 * micro_batches, blocks)
    expected += LLAMA.recomputed_flops(config.model, 2 * micro_batches, blocks, again)
    if config.train.optimizer == "muon_adamw":
        shapes, head_size = parameter_shapes(config.model), config.model.head_size
        expected += muon_flops(shapes, config.train, head_size, on_cpu=True, reduced_float32=False)
    if again and not config.model.post_norms:  # a recomputed block's down_proj is in the graph but never evaluated
        expected += 2 * 2 * 80 * config.model.mlp_size * 32
    assert counted[0] == expected


def test_muon_uses_strips_only_on_a_cpu() -> None:
    model = ModelConfig(vocab_size=8, n_layers=1, d_model=512, n_heads=1, mlp_multiple=2.0)
    whole = 4 * (4 * 512**3 + 34 * 512**3) + 3 * (4 * 512**2 * 1024 + 34 * 512**3)
    shapes, train = parameter_shapes(model), TrainConfig(muon_split_heads=False)
    assert muon_flops(shapes, train, model.head_size, on_cpu=False, reduced_float32=False) == whole
    spared = 4 * (2 + 34) * 512**3 + 3 * (2 * 512**2 * 1024 + 34 * 512**3)  # strips save 3/8 of symmetric products
    assert muon_flops(shapes, train, model.head_size, on_cpu=True, reduced_float32=False) == whole - spared * 3 // 8


@pytest.mark.parametrize("tf32", [False, True])
def test_a_gpus_muon_executes_the_count(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products rounded to TF32, it takes other steps (optim/polar_express.py)."""
    model, train = ModelConfig(vocab_size=8, n_layers=1, d_model=24, n_heads=3), TrainConfig()
    shapes = parameter_shapes(model)
    with counting(monkeypatch) as counted, gpu_path(tf32=tf32):
        for name, shape in shapes.items():
            if optimizer_of(name, len(shape), "muon_adamw") == "muon":
                orthogonalize(split_heads(name, mx.ones((1, *shape)), model.head_size))
    assert counted[0] == muon_flops(shapes, train, model.head_size, on_cpu=False, reduced_float32=tf32)
