"""The chunked loss against numpy in float64, and its memory."""

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import ModelConfig
from anarchobot.model import loss
from anarchobot.numerics.eval_order import eval_now

MODEL = ModelConfig(vocab_size=50, d_model=8, n_heads=2)
CAPPED = ModelConfig(vocab_size=50, d_model=8, n_heads=2, logit_softcap=2.0)


def random_case(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    targets = rng.integers(0, 50, n).astype(np.int32)
    targets[::3] = -100
    return rng.standard_normal((n, 8)).astype(np.float32), rng.standard_normal((50, 8)).astype(np.float32), targets


def truth(h: np.ndarray, w: np.ndarray, t: np.ndarray, cap: float | None) -> tuple[float, np.ndarray, np.ndarray]:
    """Returns the summed loss and its gradients with respect to h and w, by the chain rule, token by token."""
    h, w = h.astype(np.float64), w.astype(np.float64)
    total, dh, dw = 0.0, np.zeros_like(h), np.zeros_like(w)
    for i, target in enumerate(t):
        if target < 0:
            continue
        raw = w @ h[i]
        z = raw if cap is None else cap * np.tanh(raw / cap)
        p = np.exp(z) / np.exp(z).sum()
        total -= np.log(p[target])
        dz = p.copy()
        dz[target] -= 1
        if cap is not None:
            dz *= 1 - np.tanh(raw / cap) ** 2
        dh[i] = w.T @ dz
        dw += np.outer(dz, h[i])
    return total, dh, dw


@pytest.mark.parametrize("n", [1, 7, 8, 9, 23])
@pytest.mark.parametrize("model", [MODEL, CAPPED], ids=["plain", "softcap"])
def test_loss_and_gradients_equal_the_chain_rule_for_any_chunks(n: int, model: ModelConfig) -> None:
    h, w, t = random_case(n)
    total, dh, dw = truth(h, w, t, model.logit_softcap)
    hidden, weight, targets = mx.array(h), mx.array(w), mx.array(t)
    params = {"model.embed_tokens.weight": weight}
    assert float(loss.loss_sum(hidden, params, targets, model, 8)) == pytest.approx(total, rel=1e-5, abs=1e-6)
    scale = 0.125
    value, gh, gw = loss.loss_and_gradients(hidden, weight, targets, model, mx.array(scale), chunk=8)
    assert float(value) == pytest.approx(scale * total, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(np.array(gh), scale * dh, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.array(gw), scale * dw, rtol=1e-4, atol=1e-6)


def test_gradients_are_added_to_existing_sums() -> None:
    h, w, t = random_case(9)
    _, _, dw = truth(h, w, t, None)
    _, _, gw = loss.loss_and_gradients(
        mx.array(h), mx.array(w), mx.array(t), MODEL, mx.array(1.0), mx.full(w.shape, 2.0), chunk=4
    )
    np.testing.assert_allclose(np.array(gw), 2 + dw, rtol=1e-4, atol=1e-5)


def test_small_probabilities_survive_float16() -> None:
    """1e-7 rounds to zero in float16, so the loss scale must be applied before rounding."""
    model = ModelConfig(vocab_size=4, d_model=2, n_heads=1)
    weight = mx.array([[16.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    hidden = mx.array([[1.0, 0.0]]).astype(mx.float16)
    _, _, gradient = loss.loss_and_gradients(hidden, weight, mx.array([0]), model, mx.array(2.0**14))
    p = np.exp(-16.0) / (1 + 3 * np.exp(-16.0))
    np.testing.assert_allclose(np.array(gradient)[1, 0], p * 2**14, rtol=0.01)


def test_full_logits_are_never_materialized() -> None:
    """For 4,096 tokens and a vocabulary of 4,096, they would take 67 MB in float32, and so would their gradient."""
    model = ModelConfig(vocab_size=4096, d_model=32, n_heads=1)
    hidden, weight = mx.random.normal((4096, 32)), mx.random.normal((4096, 32))
    targets = mx.zeros((4096,), mx.int32)
    mx.eval(hidden, weight, targets)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(loss.loss_and_gradients(hidden, weight, targets, model, mx.array(1.0), wait=eval_now))
    one_chunk = 256 * 4096 * 4  # bytes; a chunk's softmax, one-hot targets and so on take about eight of these
    assert mx.get_peak_memory() - before < 10 * one_chunk < 0.35 * (2 * 4096 * 4096 * 4)
