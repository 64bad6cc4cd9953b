"""AdamW against MLX's with bias correction, and which parameters decay."""

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest

from anarchobot.config.schema import TrainConfig
from anarchobot.numerics.eval_order import EvalOrder, depend, eval_now
from anarchobot.optim.adamw import adamw
from anarchobot.optim.param_groups import ADAMW_BETA1 as BETA1
from anarchobot.optim.param_groups import ADAMW_BETA2 as BETA2
from anarchobot.optim.param_groups import ADAMW_EPS as EPSILON


@pytest.mark.parametrize("wait", [depend, eval_now], ids=["depend", "eval_now"])
def test_ten_steps_match_mlx(wait: EvalOrder) -> None:
    train = TrainConfig(weight_decay=0.1, cautious_weight_decay=False)
    rng = np.random.default_rng(0)
    w = {"w": mx.array(rng.standard_normal((5, 7)), mx.float32)}
    other, first, second = dict(w), {"w": mx.zeros((5, 7))}, {"w": mx.zeros((5, 7))}
    library = mlx.optimizers.AdamW(0.01, betas=[BETA1, BETA2], eps=EPSILON, weight_decay=0.1, bias_correction=True)
    for count in range(1, 11):
        g = {"w": mx.array(rng.standard_normal((5, 7)), mx.float32)}
        w, first, second = adamw(w, dict(g), first, second, mx.array(0.01), mx.array(float(count)), train, wait)
        other = library.apply_gradients(g, other)
    np.testing.assert_allclose(np.array(w["w"]), np.array(other["w"]), rtol=2e-5, atol=1e-6)


def test_first_step_has_size_lr_and_vectors_do_not_decay() -> None:
    """m / (1 - b1) over sqrt(v / (1 - b2)) is the gradient's sign in the first step; uncorrected, 0.45 of it."""
    params = {"matrix": mx.full((2, 2), 10.0), "norm": mx.full((2,), 10.0)}
    grads = {name: mx.full(p.shape, -3.0) for name, p in params.items()}
    train = TrainConfig(weight_decay=0.5, cautious_weight_decay=False)
    new, _, _ = adamw(params, grads, zeros(params), zeros(params), mx.array(0.01), mx.array(1.0), train, depend)
    assert np.array(new["norm"]) == pytest.approx(10.01, rel=1e-6)
    assert np.array(new["matrix"]) == pytest.approx(10.01 - 0.01 * 0.5 * 10, rel=1e-6)


def test_cautious_decay_acts_only_where_the_update_shrinks_the_weight() -> None:
    """By hand: of two positive weights, only the one that the update makes smaller decays."""
    w, g = {"w": mx.array([[10.0, 10.0]])}, {"w": mx.array([[3.0, -3.0]])}
    new, _, _ = adamw(w, g, zeros(w), zeros(w), mx.array(0.01), mx.array(1.0), TrainConfig(weight_decay=0.5), depend)
    assert np.array(new["w"])[0] == pytest.approx([10 - 0.01 - 0.01 * 0.5 * 10, 10 + 0.01], rel=1e-6)


def zeros(params: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name: mx.zeros(p.shape) for name, p in params.items()}
