"""Rotary embeddings: frequencies against transformers, rotations against NumPy."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import ModelConfig
from anarchobot.model.llama.attention import rope, rope_of_rows
from anarchobot.model.llama.rope import attention_factor, inverse_frequencies

SHORT, LONG = [1 + 0.05 * i for i in range(12)], [1 + 1.5 * i for i in range(12)]
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 4.0},
    "llama3 of Llama 3.1": {"type": "llama3", "factor": 8.0, "original_max_seq_len": 8192},
    "llama3, other bands": {
        "type": "llama3", "factor": 32.0, "original_max_seq_len": 512, "low_freq_factor": 0.5, "high_freq_factor": 9.0,
    },
    "yarn": {"type": "yarn", "factor": 16.0, "original_max_seq_len": 4096},
    "yarn of gpt-oss": {
        "type": "yarn", "factor": 32.0, "original_max_seq_len": 4096, "beta_fast": 16.0, "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn with a given factor": {
        "type": "yarn", "factor": 4.0, "original_max_seq_len": 32, "attention_factor": 0.75, "beta_fast": 40.0,
    },
    "yarn without a band": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 3},
    "yarn, factor 1": {"type": "yarn", "original_max_seq_len": 64},
    "longrope": {
        "type": "longrope", "factor": 32.0, "original_max_seq_len": 4096, "short_factor": SHORT, "long_factor": LONG,
    },
    "longrope with a given factor": {
        "type": "longrope", "factor": 8.0, "original_max_seq_len": 64, "short_factor": SHORT, "long_factor": LONG,
        "attention_factor": 1.25,
    },
}  # fmt: skip


def scaled(name: str, **changes: Any) -> ModelConfig:
    """With 24 of 32 elements rotated."""
    settings = {"head_dim": 32, "rotary_fraction": 0.75, "rope_theta": 5e5, **changes}
    return ModelConfig(rope_scaling=SCALINGS[name], **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [8, 64, 65, 5000])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers(name: str, length: int) -> None:
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model, values = scaled(name), dict(SCALINGS[name])
    kind = values.pop("type")
    names = {"original_max_seq_len": "original_max_position_embeddings"}
    parameters = {
        "rope_type": kind, "rope_theta": 5e5, "partial_rotary_factor": 0.75, "factor": 1.0,
        **({"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}),
        **{names.get(key, key): value for key, value in values.items()},
    }  # fmt: skip
    config = LlamaConfig(head_dim=32, rope_parameters=parameters)
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, device=None, seq_len=length)
    # Theirs are computed in float32.
    np.testing.assert_allclose(inverse_frequencies(model, None, length), inverse.numpy(), rtol=1e-6)
    assert attention_factor(model, None) == pytest.approx(factor, rel=1e-12)


def rotated(x: np.ndarray, model: ModelConfig, positions: np.ndarray, length: int = 8) -> np.ndarray:
    """`x` [H, L, E] at `positions` [L], in float64."""
    width, factor = model.rotary_size, attention_factor(model, None)
    angles = positions[:, None] * inverse_frequencies(model, None, length)
    a, b, rest = np.split(x.astype(np.float64), [width // 2, width], axis=-1)
    cos, sin = factor * np.cos(angles), factor * np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


@pytest.mark.parametrize("name", SCALINGS)
def test_rotation_and_its_gradient(name: str) -> None:
    model = scaled(name)
    x, dy = np.random.default_rng(0).standard_normal((2, 2, 3, 8, 32)).astype(np.float32)
    embeddings = rope(model, None, 8)
    for offset in (0, 3):
        expected = np.stack([rotated(row, model, offset + np.arange(8)) for row in x])
        np.testing.assert_allclose(np.array(embeddings.rotate(mx.array(x), offset)), expected, atol=5e-6)
    offsets = np.array([5, 11])
    expected = np.stack([rotated(row, model, offset + np.arange(8)) for row, offset in zip(x, offsets, strict=True)])
    np.testing.assert_allclose(np.array(embeddings.rotate(mx.array(x), mx.array(offsets))), expected, atol=5e-6)
    _, (dx,) = mx.vjp(embeddings.rotate, [mx.array(x)], [mx.array(dy)])
    np.testing.assert_allclose(np.array(embeddings.backward(mx.array(dy))), np.array(dx), atol=1e-6)


def test_local_layers_are_not_scaled() -> None:
    """As in Gemma 3: their frequencies are those of rope_local_theta."""
    model = scaled("longrope with a given factor", sliding_window=4, rope_local_theta=100.0)
    expected = 100.0 ** (-np.arange(0, 24, 2) / 24)
    np.testing.assert_allclose(inverse_frequencies(model, 4, 9999), expected, rtol=1e-12)
    assert attention_factor(model, 4) == 1
    assert rope(model, 4, 9999) == (24, 100.0, None, 1.0)
    same = scaled("linear", sliding_window=4)  # without rope_local_theta, all blocks are scaled
    np.testing.assert_array_equal(inverse_frequencies(same, 4, 8), inverse_frequencies(same, None, 8))


def test_rows_of_a_batch_have_the_frequencies_of_their_own_length() -> None:
    model = scaled("longrope with a given factor")  # 64 tokens are short
    x = np.random.default_rng(0).standard_normal((3, 2, 1, 32)).astype(np.float32)
    offsets, lengths = np.array([60, 60, 70]), [64, 65, 700]
    got = rope_of_rows(model, None, lengths).rotate(mx.array(x), mx.array(offsets))
    expected = [rotated(row, model, np.array([at]), n) for row, at, n in zip(x, offsets, lengths, strict=True)]
    np.testing.assert_allclose(np.array(got), np.stack(expected), atol=2e-5)
    assert np.abs(rotated(x[1], model, offsets[1:2], 64) - expected[1]).max() > 0.1
