"""Automatic differentiation against the hand-written gradients, for every member of the Llama family."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.model import autodiff
from anarchobot.model.architecture import gradients
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.llama import gradients as hand_written
from anarchobot.model.step_options import MicroBatch, StepOptions
from anarchobot.numerics import eval_order
from tests.model.llama.test_forward import SHAPES, as_mlx, parameters, random_tokens, tiny
from tests.model.test_lora import CASES, adapted, adapters_of, lora

OPTIONS = {
    "whole": StepOptions(loss_chunk=7),
    "checkpointed": StepOptions(recompute=True, wait=eval_order.eval_now, loss_chunk=7),
    "checkpointed by dependencies": StepOptions(recompute=True),
}


def assert_same(
    model: Any, trained: Params, tokens: Any, options: StepOptions, frozen: Params | None = None, **how: Any
) -> None:
    """Compares the loss to 1e-6 and every gradient, added to existing sums, to 1e-5 of its norm."""
    batch = MicroBatch(mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:]), mx.array(1 / tokens[:, 1:].size), **how)
    results = []
    for function in (hand_written.loss_and_gradients, autodiff.loss_and_gradients):
        sums = {name: mx.full(p.shape, 0.25) for name, p in trained.items()}
        own = options if function is autodiff.loss_and_gradients else StepOptions(loss_chunk=7)
        loss, grads = function(trained, batch, model, frozen=frozen, sums=sums, options=own)
        results.append((np.array(loss, np.float64), {n: np.array(g, np.float64) - 0.25 for n, g in grads.items()}))
    (loss, wanted), (other, got) = results
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    assert list(got) == list(wanted) == list(trained)
    for name, g in wanted.items():
        # Each element of a sum near 0.25 is rounded to 1.5e-8.
        assert np.linalg.norm(got[name] - g) < 1e-5 * np.linalg.norm(g) + 3e-8 * np.sqrt(g.size), name


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_all_weights(name: str, options: str) -> None:
    """With dropout, and with several documents per row."""
    model = tiny(**{**SHAPES[name], "dropout": 0.2})
    tokens = random_tokens(model, 3, 15)
    segments = mx.array(np.arange(14)[None] // 6 + np.zeros((3, 1), np.int64))
    for how in ({"dropout_key": mx.random.key(3)}, {"segments": segments}):
        assert_same(model, as_mlx(parameters(model)), tokens, OPTIONS[options], **how)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_adapters(case: str, options: str) -> None:
    model, settings = tiny(**CASES[case][0]), lora(**CASES[case][1])
    trained, frozen = adapted(parameters(model), adapters_of(model, settings), model, settings)
    how = {"frozen": frozen, "dropout_key": mx.random.key(1), "adapter_dropout": 0.3}
    assert_same(model, trained, random_tokens(model), OPTIONS[options], **how)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_only(tied: bool, options: str) -> None:
    model = tiny(tie_embeddings=tied)
    weights = as_mlx(parameters(model))
    trained = {name: p for name, p in weights.items() if "embed" in name or "head" in name}
    frozen = {name: p for name, p in weights.items() if name not in trained}
    assert_same(model, trained, random_tokens(model), OPTIONS[options], frozen=frozen)


@pytest.mark.parametrize("options", OPTIONS)
def test_objective_on_log_probabilities(options: str) -> None:
    model = tiny()

    def objective(log_probs: mx.array) -> tuple[mx.array, mx.array]:
        return mx.stack([mx.sum(mx.square(log_probs)), mx.sum(log_probs)]), 2 * log_probs

    assert_same(model, as_mlx(parameters(model)), random_tokens(model), OPTIONS[options], objective=objective)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_a_bfloat16_embedding_is_summed_in_float32(tied: bool, options: str) -> None:
    """Of two ids, each about a thousand times. The engine passes matrices in the dtype of the products."""
    model = tiny(tie_embeddings=tied, max_seq_len=256)
    weights = as_mlx(parameters(model))
    tokens = random_tokens(model, 8, 257) % 2
    batch = MicroBatch(mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:]), mx.array(1.0))
    name = "model.embed_tokens.weight"
    exact = hand_written.loss_and_gradients(weights, batch, model)[1][name]
    half = {n: p.astype(mx.bfloat16) if p.ndim == 2 else p for n, p in weights.items()}
    got = autodiff.loss_and_gradients(half, batch, model, dtype=mx.bfloat16, options=OPTIONS[options])[1][name]
    assert float(mx.linalg.norm(got - exact) / mx.linalg.norm(exact)) < 0.02


def test_hand_written_gradients_are_preferred() -> None:
    model = tiny()
    assert gradients(model) is hand_written.loss_and_gradients
    assert gradients(model, "autodiff") is autodiff.loss_and_gradients


@pytest.mark.usefixtures("without_garbage")
def test_memory() -> None:
    """With eight blocks, activations are most of the memory: checkpointing saves only block inputs. Evaluation on a CPU
    happens outside the differentiated function, where it would keep all intermediate arrays."""
    model = tiny(n_layers=8, d_model=64, n_heads=4, mlp_multiple=4.0)
    params, tokens = as_mlx(parameters(model)), random_tokens(model, 8, 129)
    mx.eval(params)

    def peak(options: StepOptions) -> int:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        batch = MicroBatch(mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:]), mx.array(1.0))
        mx.eval(autodiff.loss_and_gradients(params, batch, model, options=options))
        return int(mx.get_peak_memory()) - before

    whole = peak(OPTIONS["whole"])
    assert peak(OPTIONS["checkpointed"]) < 0.5 * whole
    assert peak(replace(OPTIONS["whole"], wait=eval_order.eval_now)) < 1.2 * whole
