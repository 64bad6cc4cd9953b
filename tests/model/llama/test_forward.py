"""The loss against a float64 reference, gradients against finite differences; masks, KV cache, dropout, precision."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from anarchobot.config.schema import ModelConfig
from anarchobot.model.llama.forward import hidden_states, make_caches
from anarchobot.model.llama.gradients import loss_and_gradients
from anarchobot.model.loss import logits, loss_sum
from anarchobot.model.parameters import init_parameters, parameter_shapes
from anarchobot.model.step_options import MicroBatch, StepOptions
from anarchobot.numerics import eval_order
from tests.model.llama import reference

SHAPES = {
    "plain": {},
    "grouped heads, gelu, untied": {"n_kv_heads": 2, "ffn_activation": "gelu", "tie_embeddings": False},
    "qk_norm, softcap, own head_dim": {"qk_norm": True, "logit_softcap": 5.0, "head_dim": 6, "n_kv_heads": 1},
    "biases": {"attention_bias": True, "n_kv_heads": 2},
    "biases, qk_norm": {"attention_bias": True, "qk_norm": True},
    "other constants": {"rope_theta": 500.0, "norm_eps": 0.1, "mlp_multiple": 1.5},
    "embedding scale, three blocks": {"embedding_scale": 3.0, "n_layers": 3, "n_kv_heads": 2},
    "norms of outputs": {"post_norms": True, "ffn_activation": "gelu", "embedding_scale": 4.0, "n_kv_heads": 2},
    "windows, a full layer with scaled RoPE": {
        "n_kv_heads": 2,
        "qk_norm": True,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_local_theta": 50.0,
        "attention_scale": 0.9,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "softcap, scale, windows, partial rotation": {
        "n_kv_heads": 1,
        "attention_softcap": 2.0,
        "attention_scale": 0.7,
        "sliding_window": 7,
        "head_dim": 8,
        "rotary_fraction": 0.5,
    },
    "longrope": {
        "head_dim": 8,
        "rotary_fraction": 0.5,
        "rope_scaling": {
            "type": "longrope",
            "factor": 40.0,
            "original_max_seq_len": 8,
            "short_factor": [1.0, 1.5],
            "long_factor": [2.0, 9.0],
        },
    },
}


def tiny(**changes: object) -> ModelConfig:
    base = {"vocab_size": 37, "n_layers": 2, "d_model": 16, "n_heads": 4, "dropout": 0.0, "max_seq_len": 64}
    return ModelConfig(**{**base, **changes})  # type: ignore[arg-type]


def parameters(model: ModelConfig, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Larger than the initial values, so that every term of the gradient contributes."""
    rng = np.random.default_rng(seed)
    return {
        name: (1 + 0.3 * rng.standard_normal(s) if len(s) == 1 else 0.3 * rng.standard_normal(s)).astype(np.float32)
        for name, s in parameter_shapes(model).items()
    }


def random_tokens(model: ModelConfig, rows: int = 2, length: int = 12) -> npt.NDArray[np.int32]:
    return np.random.default_rng(1).integers(0, model.vocab_size, (rows, length)).astype(np.int32)


def as_mlx(params: dict[str, npt.NDArray[np.float32]]) -> dict[str, mx.array]:
    return {name: mx.array(p) for name, p in params.items()}


def mean_loss(
    params: dict[str, mx.array], tokens: npt.NDArray[np.int32], model: ModelConfig, **how: Any
) -> tuple[float, dict[str, mx.array]]:
    """The mean loss of predicting each next token, and its gradients."""
    inputs, targets = mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:])
    extra = {key: how.pop(key) for key in MicroBatch._fields if key in how}
    batch = MicroBatch(inputs, targets, mx.array(1 / targets.size), **extra)
    loss, grads = loss_and_gradients(params, batch, model, **how)
    return float(loss), grads


@pytest.mark.parametrize("name", SHAPES)
def test_loss_equals_the_float64_reference(name: str) -> None:
    model = tiny(**SHAPES[name])
    params, tokens = parameters(model), random_tokens(model)
    truth = reference.mean_loss({n: p.astype(np.float64) for n, p in params.items()}, tokens, model)
    assert mean_loss(as_mlx(params), tokens, model)[0] == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_equal_finite_differences_of_the_reference(name: str) -> None:
    """Moves each parameter in a random direction: the reference loss must change as the gradient predicts."""
    model = tiny(**SHAPES[name])
    params, tokens = parameters(model), random_tokens(model)
    _, gradients = mean_loss(as_mlx(params), tokens, model)
    exact = {n: p.astype(np.float64) for n, p in params.items()}
    rng, h = np.random.default_rng(2), 1e-6
    assert set(gradients) == set(exact)
    for key, value in exact.items():
        direction = rng.standard_normal(value.shape)
        ahead = reference.mean_loss({**exact, key: value + h * direction}, tokens, model)
        behind = reference.mean_loss({**exact, key: value - h * direction}, tokens, model)
        gradient = np.array(gradients[key], np.float64)
        # With a standard normal direction, the true value is about as large as the gradient's norm.
        assert abs((ahead - behind) / (2 * h) - np.vdot(gradient, direction)) < 1e-4 * np.linalg.norm(gradient), key


def test_gradient_checkpointing_is_bit_exact_with_dropout() -> None:
    model = tiny(dropout=0.3)
    params, tokens, key = as_mlx(parameters(model)), random_tokens(model), mx.random.key(7)
    _, kept = mean_loss(params, tokens, model, dropout_key=key)
    _, recomputed = mean_loss(params, tokens, model, dropout_key=key, options=StepOptions(recompute=True))
    assert all(mx.array_equal(kept[n], recomputed[n]) for n in params)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        StepOptions(attention_block=5, loss_chunk=7, mlp_rows=9),
        StepOptions(attention_block=1, wait=eval_order.eval_now),
        StepOptions(recompute=True, wait=eval_order.eval_now, mlp_rows=28),
        StepOptions(attention_block=4, wait=eval_order.unordered, recompute=True),
    ],
    ids=["chunks", "single queries", "recomputed", "recomputed in free order"],
)
def test_options_do_not_change_the_gradients(options: StepOptions, name: str) -> None:
    """With block sizes that do not divide the length, and gradients added to existing sums."""
    model = tiny(**SHAPES[name])
    params, tokens = as_mlx(parameters(model)), random_tokens(model, 2, 14)
    loss, plain = mean_loss(params, tokens, model, options=StepOptions(attention_block=100, loss_chunk=100))
    before = {n: mx.full(p.shape, 0.25) for n, p in params.items()}
    other, added = mean_loss(params, tokens, model, options=options, sums=before)
    assert other == pytest.approx(loss, rel=1e-6)
    for n, g in plain.items():
        difference = mx.linalg.norm(added[n] - 0.25 - g)
        assert float(difference) < 1e-5 * float(mx.linalg.norm(g)) + 1e-6 * p_size(params[n]), n


def p_size(p: mx.array) -> float:
    return float(np.sqrt(p.size))


@pytest.mark.parametrize("length", [1, 2, 31, 33])
def test_document_mask_gives_the_gradients_of_separate_documents(length: int) -> None:
    """Also in a row of one token."""
    model = tiny(n_kv_heads=2)
    params, tokens = as_mlx(parameters(model)), random_tokens(model, 1, length + 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    cuts = [0, length // 3, length // 2, length]
    numbers = np.repeat(np.arange(3), np.diff(cuts))[None].astype(np.int32)
    how = StepOptions(attention_block=8)

    def gradients(a: int, b: int, segments: mx.array | None) -> tuple[float, dict[str, mx.array]]:
        x, y = mx.array(inputs[:, a:b]), mx.array(targets[:, a:b])
        loss, grads = loss_and_gradients(params, MicroBatch(x, y, mx.array(1.0), segments), model, options=how)
        return float(loss), grads

    whole, grads = gradients(0, length, mx.array(numbers))
    parts = [gradients(a, b, None) for a, b in pairwise(cuts) if b > a]
    assert whole == pytest.approx(sum(loss for loss, _ in parts), rel=1e-5)
    for name, g in grads.items():
        alone = sum(np.array(part[name], np.float64) for _, part in parts)
        np.testing.assert_allclose(np.array(g), alone, atol=2e-5 * max(1.0, float(np.abs(alone).max())), err_msg=name)


def test_attention_is_causal() -> None:
    model = tiny()
    params, tokens = as_mlx(parameters(model)), random_tokens(model)
    changed = tokens.copy()
    changed[:, 8:] = (changed[:, 8:] + 1) % model.vocab_size
    before, after = (np.array(hidden_states(params, mx.array(t), model)) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert np.abs(before[:, 8:] - after[:, 8:]).max() > 1e-3


def test_document_mask_gives_the_outputs_of_separate_documents() -> None:
    """RoPE depends only on distances, so the position of a document in its row does not matter."""
    model = tiny(n_kv_heads=2, qk_norm=True)
    params, tokens = as_mlx(parameters(model)), random_tokens(model, 1, 12)
    segments = mx.array([[0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3]])
    row = np.array(hidden_states(params, mx.array(tokens), model, segments=segments))
    for start, end in ((0, 3), (3, 4), (4, 9), (9, 12)):
        alone = np.array(hidden_states(params, mx.array(tokens[:, start:end]), model))
        np.testing.assert_allclose(row[:, start:end], alone, atol=2e-5)
    unmasked = np.array(hidden_states(params, mx.array(tokens), model))
    assert np.abs(unmasked[:, 3:] - row[:, 3:]).max() > 0.01


WINDOWS = ("windows, a full layer with scaled RoPE", "softcap, scale, windows, partial rotation")
GENERATED = {"plain": {"n_kv_heads": 2, "qk_norm": True}, **{name: SHAPES[name] for name in (*WINDOWS, "longrope")}}


@pytest.mark.parametrize("name", GENERATED)
def test_kv_cache_equals_the_full_forward_pass(name: str) -> None:
    """A prompt in two parts, then single tokens: catches a wrong RoPE offset or a wrong mask. Caches of windows hold no
    more than the window."""
    model = tiny(**GENERATED[name])
    params, tokens = as_mlx(parameters(model)), random_tokens(model)
    whole = np.array(hidden_states(params, mx.array(tokens), model))
    caches: list[Any] = make_caches(params, model)
    parts = [
        hidden_states(params, mx.array(tokens[:, a:b]), model, caches=caches)
        for a, b in ((0, 5), (5, 9), (9, 10), (10, 11), (11, 12))
    ]
    np.testing.assert_allclose(np.concatenate([np.array(p) for p in parts], axis=1), whole, atol=2e-5)
    held = [cache.keys.shape[2] for cache, window in zip(caches, model.windows, strict=True) if window]
    assert held == [window for window in model.windows if window]


@pytest.mark.parametrize("name", GENERATED)
def test_batched_rows_of_different_lengths_equal_the_full_forward_pass(name: str) -> None:
    """Three tokens after prompts of 9 and 4, of which longrope counts only the first as long."""
    model = tiny(**GENERATED[name])
    params = as_mlx(parameters(model))
    rows, prompts = [random_tokens(model, 1, 12), random_tokens(model, 1, 7) + 1], [9, 4]
    lengths = [row.shape[1] for row in rows]
    caches = []
    for row, prompt, length in zip(rows, prompts, lengths, strict=True):
        caches.append(make_caches(params, model))
        hidden_states(params, mx.array(row[:, :prompt]), model, caches=caches[-1], lengths=[length])
    merged: list[Any] = [pair[0].merge(pair) for pair in zip(*caches, strict=True)]
    for i in range(3):
        step = np.concatenate([row[:, prompt + i : prompt + i + 1] for row, prompt in zip(rows, prompts, strict=True)])
        got = np.array(hidden_states(params, mx.array(step), model, caches=merged, lengths=lengths))
        for b, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            alone = np.array(hidden_states(params, mx.array(row), model))[0, prompt + i]
            np.testing.assert_allclose(got[b, 0], alone, atol=2e-5)


def test_dropout_rate_scale_and_key() -> None:
    model = tiny(dropout=0.25, n_layers=1, d_model=64, n_heads=1)
    params = as_mlx(init_parameters(model, 0))
    from anarchobot.model.llama.block import _dropout

    ones = mx.ones((200, 500))
    dropped = np.array(_dropout(ones, model, mx.random.key(0)))
    assert (dropped == 0).mean() == pytest.approx(0.25, abs=0.006)  # 4 standard deviations
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    tokens = random_tokens(model, 64, 64)
    losses = [mean_loss(params, tokens, model, dropout_key=key)[0] for key in (*map(mx.random.key, (1, 1, 2)), None)]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_stays_half_and_gradients_are_float32(dtype: mx.Dtype) -> None:
    """A single float32 array would silently promote everything after it."""
    model = tiny(dropout=0.2, qk_norm=True)
    params, tokens = as_mlx(parameters(model)), random_tokens(model)
    hidden = hidden_states(params, mx.array(tokens), model, dtype=dtype)
    assert hidden.dtype == dtype
    assert logits(hidden, params, model).dtype == mx.float32
    _, gradients = mean_loss(params, tokens, model, dtype=dtype)
    _, exact = mean_loss(params, tokens, model)
    for name, g in gradients.items():
        assert g.dtype == mx.float32
        assert float(mx.linalg.norm(g - exact[name]) / mx.linalg.norm(exact[name])) < 0.1, name


@pytest.mark.parametrize("vocab_size", [256, 8192])
def test_initial_loss_is_the_log_of_the_vocabulary_size(vocab_size: int) -> None:
    model = tiny(vocab_size=vocab_size, d_model=64, n_layers=4)
    params = as_mlx(init_parameters(model, 0))
    assert mean_loss(params, random_tokens(model, 8, 64), model)[0] == pytest.approx(np.log(vocab_size), rel=0.05)


def test_stories260k_matches_its_published_text(shared_data: Path) -> None:
    """A published Llama with grouped-query attention: the losses and greedy text of its own program."""
    folder = shared_data / "artifacts" / "stories260K"
    hf_config = json.loads((folder / "hf" / "config.json").read_text())
    model = ModelConfig(
        vocab_size=hf_config["vocab_size"],
        n_layers=hf_config["num_hidden_layers"],
        d_model=hf_config["hidden_size"],
        n_heads=hf_config["num_attention_heads"],
        n_kv_heads=hf_config["num_key_value_heads"],
        mlp_multiple=hf_config["intermediate_size"] / hf_config["hidden_size"],
        norm_eps=hf_config["rms_norm_eps"],
        rope_theta=float(hf_config.get("rope_theta", 10000.0)),
        dropout=0.0,
    )
    weights = mx.load(str(folder / "hf" / "model.safetensors"))
    assert isinstance(weights, dict)
    params = {name: weights[name] for name in parameter_shapes(model)}
    truth = json.loads((folder / "reference.json").read_text())
    for story in truth["stories"]:
        ids = mx.array(story["ids"])
        hidden = hidden_states(params, ids[None, :-1], model)[0]
        mean = float(loss_sum(hidden, params, ids[1:], model)) / (len(story["ids"]) - 1)
        assert mean == pytest.approx(story["mean_nll"], rel=1e-5)
    greedy = mx.array(truth["greedy_from_bos_ids"])
    hidden = hidden_states(params, greedy[None, :-1], model)[0]
    likeliest = mx.argmax(logits(hidden, params, model), axis=-1)
    assert likeliest.tolist() == greedy[1:].tolist()
