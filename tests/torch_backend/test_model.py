"""Loss and gradients against float64, against the MLX backend, and with every option."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import ModelConfig
from anarchobot.data.windows import Batch
from anarchobot.model.llama.gradients import loss_and_gradients
from anarchobot.model.parameters import by_block, init_parameters
from anarchobot.model.step_options import MicroBatch
from tests.model.llama import reference
from tests.torch_backend.settings import SHAPES, VOCAB, batch, config

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from anarchobot.torch_backend.loss import add_gradients  # noqa: E402
from anarchobot.torch_backend.model import (  # noqa: E402
    StepOptions,
    attention_context,
    block_forward,
    block_size_by_memory,
    hidden_states,
)

Arrays = dict[str, np.ndarray]


def weights(model: ModelConfig) -> Arrays:
    """Initial values plus noise, so that norms are not one and projections are not zero."""
    rng = np.random.default_rng(1)
    return {
        n: (v + 0.1 * rng.standard_normal(v.shape)).astype(np.float32) for n, v in init_parameters(model, 0).items()
    }


def by_torch(params: Arrays, rows: Batch, model: ModelConfig, scale: float = 1.0, **how: Any) -> tuple[float, Arrays]:
    tensors = {name: torch.tensor(p).requires_grad_() for name, p in params.items()}
    key, dtype = how.pop("dropout_key", None), how.pop("dtype", torch.float32)
    segments = None if rows.segments is None else torch.tensor(rows.segments[0])
    ids, targets = (torch.tensor(x[0].astype(np.int64)) for x in (rows.inputs, rows.targets))
    loss = add_gradients(
        tensors, ids, targets, model, scale=scale, dtype=dtype, segments=segments, dropout_key=key,
        options=StepOptions(**how),
    )  # fmt: skip
    return float(loss), {name: p.grad.numpy() for name, p in tensors.items()}


def assert_close(got: Arrays, wanted: Arrays, relative: float) -> None:
    """Compares each gradient to `relative` times its norm."""
    assert set(got) == set(wanted)
    for name, g in wanted.items():
        assert np.linalg.norm(got[name] - g) <= relative * np.linalg.norm(g), name


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_equals_the_float64_reference(shape: str) -> None:
    model = config(SHAPES[shape]).model
    params, rows = weights(model), batch(1, 2)
    tokens = np.concatenate([rows.inputs[0], rows.targets[0][:, -1:]], axis=1)
    exact = reference.mean_loss({n: p.astype(np.float64) for n, p in params.items()}, tokens, model)
    assert by_torch(params, rows, model)[0] / 32 == pytest.approx(exact, rel=2e-6)


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_match_the_mlx_backend(shape: str, documents: bool) -> None:
    model = config(SHAPES[shape]).model
    params, rows = weights(model), batch(1, 3, documents=documents)
    loss, grads = by_torch(params, rows, model, scale=0.5)
    segments = None if rows.segments is None else mx.array(rows.segments[0])
    ours = MicroBatch(mx.array(rows.inputs[0]), mx.array(rows.targets[0]), mx.array(0.5), segments)
    wanted, by_mlx = loss_and_gradients({n: mx.array(p) for n, p in params.items()}, ours, model)
    assert 0.5 * loss == pytest.approx(float(wanted), rel=1e-5)
    assert_close(grads, {n: np.array(g) for n, g in by_mlx.items()}, 1e-4)


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize(
    "how",
    [{"recompute": True}, {"attention_block": 5}, {"recompute": True, "attention_block": 7}, {"loss_chunk": 7}],
    ids=str,
)
def test_options_do_not_change_the_gradients(how: dict[str, Any], documents: bool) -> None:
    """Also with dropout: a recomputed block drops the same elements."""
    model = config({"dropout": 0.3}).model
    params, rows = weights(model), batch(1, 3, documents=documents)
    loss, grads = by_torch(params, rows, model, dropout_key="1")
    again, others = by_torch(params, rows, model, dropout_key="1", **how)
    assert again == pytest.approx(loss, rel=1e-6)
    assert_close(others, grads, 1e-5)
    if how == {"recompute": True}:
        assert all(np.array_equal(g, others[name]) for name, g in grads.items())


def test_dropout_rate_and_key() -> None:
    """The block adds the same large number to all elements of a token, so elements that stay small were dropped."""
    model = config({"dropout": 0.25, "n_layers": 1}).model
    params = {n: torch.tensor(p) for n, p in weights(model).items()}
    params["model.embed_tokens.weight"].copy_(1e-4 * torch.arange(32))
    params["model.layers.0.self_attn.o_proj.weight"].zero_()
    params["model.layers.0.mlp.down_proj.weight"].fill_(1.0)
    params["model.norm.weight"].fill_(1.0)
    tokens = torch.zeros(4, 64, dtype=torch.int64)

    def hidden(key: str | None) -> Any:
        return hidden_states(params, tokens, model, dropout_key=key)

    dropped = hidden("1").abs() < 0.5 * hidden("1").abs().amax(dim=-1, keepdim=True)
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(hidden("1"), hidden("1"))
    assert not torch.equal(hidden("1"), hidden("2"))
    # Not bit for bit: a matrix product may round rows differently depending on the thread that computes them.
    assert torch.allclose(hidden(None)[0], hidden(None)[1], atol=1e-5)


def test_attention_and_mlp_of_each_block_have_their_own_dropout_mask() -> None:
    model = config({"dropout": 0.25, "n_layers": 3}).model
    masks: list[Any] = []

    def record(p: Any, x: Any, model: Any, context: Any, keep: Any) -> Any:
        masks.extend(keep)
        return block_forward(p, x, model, context, keep)

    params = {n: torch.tensor(p) for n, p in weights(model).items()}
    hidden_states(params, torch.zeros(2, 8).long(), model, dropout_key="1", options=StepOptions(block=record))
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 6


def test_gradient_checkpointing_saves_only_block_inputs() -> None:
    """Autograd saves one [3, 16, 32] float32 array for each of six blocks, and what the end of the model needs."""
    model = config({"n_layers": 6}).model
    params = {n: torch.tensor(p).requires_grad_() for n, p in weights(model).items()}
    own = {p.untyped_storage().data_ptr() for p in params.values()}

    def saved_bytes(recompute: bool) -> int:
        sizes: dict[int, int] = {}

        def note(x: Any) -> Any:
            storage = x.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            hidden_states(params, torch.zeros(3, 16).long(), model, options=StepOptions(recompute=recompute))
        return sum(sizes.values())

    one = 3 * 16 * 32 * 4
    assert saved_bytes(True) < 9 * one < 40 * one < saved_bytes(False)


def test_dropout_scales_kept_elements() -> None:
    model = config({"dropout": 0.25, "n_layers": 1}).model
    p = by_block({n: torch.tensor(a) for n, a in weights(model).items()}, model)[0]
    p["self_attn.o_proj.weight"].zero_()  # only the MLP contributes
    x, everything = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)), torch.ones(2, 8, 32).bool()
    context = attention_context(torch.zeros(2, 8), model)
    plain, kept = (block_forward(p, x, model, context, keep) for keep in (None, (everything, everything)))
    torch.testing.assert_close(0.75 * (kept - x), plain - x, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients_are_close_to_float32(dtype: Any) -> None:
    model = config().model
    params, rows = weights(model), batch(1, 3, documents=True)
    loss, grads = by_torch(params, rows, model)
    half, others = by_torch(params, rows, model, dtype=dtype, scale=256.0)
    assert half == pytest.approx(loss, rel=0.01)
    assert {g.dtype for g in others.values()} == {np.dtype(np.float32)}
    assert_close({n: g / 256 for n, g in others.items()}, grads, 0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_inputs_have_one_dtype_without_autocast(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where autocast does not cover attention, a float32 query and a half-precision value would be an error."""
    kernel, dtypes = torch.nn.functional.scaled_dot_product_attention, []

    def record(q: Any, k: Any, v: Any, **how: Any) -> Any:
        dtypes.append({q.dtype, k.dtype, v.dtype})
        return kernel(q, k, v, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    model = config(SHAPES[shape]).model
    by_torch(weights(model), batch(1, 2), model, dtype=torch.bfloat16)
    assert dtypes == [{torch.bfloat16}] * model.n_layers


@pytest.mark.parametrize(
    ("how", "forwards"),
    [
        ({}, 1),
        ({"recompute": True}, 2),
        ({"attention_block": 4}, 2),
        ({"attention_block": 4, "recompute": True}, 2),
    ],
    ids=str,
)
def test_attention_runs_forward_at_most_twice(
    how: dict[str, Any], forwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of query blocks inside a checkpoint of the transformer block would make it three times."""
    kernel, queries = torch.nn.functional.scaled_dot_product_attention, [0]

    def count(q: Any, k: Any, v: Any, *mask: Any, **options: Any) -> Any:
        queries[0] += q.shape[2]
        return kernel(q, k, v, *mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    model = config().model
    by_torch(weights(model), batch(1, 2), model, **how)
    assert queries[0] == forwards * 16 * model.n_layers


def test_products_have_two_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With three, MPS computes wrong products on some chips in some versions of PyTorch."""
    product, dimensions = torch.nn.functional.linear, set()

    def record(x: Any, *weights: Any) -> Any:
        dimensions.add(x.ndim)
        return product(x, *weights)

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    model = config(SHAPES["biases"]).model
    by_torch(weights(model), batch(1, 2), model)
    assert dimensions == {2}


class TensorRecorder(TorchDispatchMode):
    """Records the shape and dtype of every operation's output."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.dtypes: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.shapes.add(tuple(x.shape))
                self.dtypes.add(x.dtype)
        return out


def test_full_logits_and_scores_are_never_materialized() -> None:
    """With eight rows of 20 tokens, no tensor holds 160 x 61 logits or 20 x 20 scores per head."""
    model = config({"d_model": 24, "mlp_multiple": 2.0}).model
    with TensorRecorder() as seen:
        by_torch(weights(model), batch(1, 8, 20), model, loss_chunk=32, attention_block=4)
    assert (32, VOCAB) in seen.shapes
    assert not {s for s in seen.shapes if s[-1:] == (VOCAB,) and np.prod(s) > 32 * VOCAB}
    assert not {s for s in seen.shapes if s[-2:] == (20, 20)}


def test_query_block_size_by_memory_of_scores() -> None:
    """64 MiB of float32 scores: for 8 rows, 12 heads and 1,024 keys, 170 queries, rounded to 160; at least 32."""
    model = ModelConfig(d_model=768, n_heads=12)
    assert block_size_by_memory(8, 1024, model) == 160
    assert block_size_by_memory(64, 4096, model) == 32
