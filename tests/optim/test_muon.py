"""Muon's step against the formulas in float64."""

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import TrainConfig
from anarchobot.numerics.eval_order import depend, eval_now
from anarchobot.optim.muon import muon, muon_directions
from anarchobot.optim.param_groups import muon_scale
from anarchobot.optim.polar_express import orthogonalize
from tests.optim.test_polar_express import iterate, svd_matrix

HEAD = 4
SHAPES = {
    "self_attn.q_proj": (16, 24), "self_attn.k_proj": (8, 24), "self_attn.o_proj": (24, 16),
    "mlp.up_proj": (40, 24), "mlp.gate_proj": (40, 24), "mlp.down_proj": (24, 40),
}  # fmt: skip


def by_heads(name: str, g: np.ndarray) -> np.ndarray:
    """Orthogonalizes each head's rows (q, k) or columns (o) separately."""
    if "self_attn" not in name:
        return iterate(g)
    if "o_proj" in name:
        return np.concatenate([iterate(g[:, i : i + HEAD]) for i in range(0, g.shape[1], HEAD)], axis=1)
    return np.concatenate([iterate(g[i : i + HEAD]) for i in range(0, g.shape[0], HEAD)], axis=0)


@pytest.mark.parametrize("wait", [depend, eval_now], ids=["depend", "eval_now"])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("normuon", [True, False])
@pytest.mark.parametrize("cautious", [True, False])
def test_three_steps_equal_the_formula_in_float64(cautious: bool, normuon: bool, split: bool, wait: object) -> None:
    """All kinds of matrices at once, with Nesterov momentum that changes between steps and decoupled decay."""
    train = TrainConfig(
        normuon=normuon, muon_split_heads=split, cautious_weight_decay=cautious, weight_decay=0.3, lr=0.1
    )
    rng = np.random.default_rng(0)
    truth = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    buffers = {name: np.zeros_like(p) for name, p in truth.items()}
    seconds = {name: np.zeros(len(p)) for name, p in truth.items()}
    params = {name: mx.array(p, mx.float32) for name, p in truth.items()}
    state = {name: mx.zeros(p.shape) for name, p in params.items()}
    rows = {name: mx.zeros(p.shape[:1]) for name, p in params.items()} if normuon else {}
    for lr, mu in ((0.1, 0.85), (0.05, 0.9), (0.01, 0.95)):
        grads = {name: rng.standard_normal(p.shape) for name, p in truth.items()}
        for name, g in grads.items():
            w = truth[name]
            buffers[name] = mu * buffers[name] + (1 - mu) * g
            ahead = mu * buffers[name] + (1 - mu) * g
            u = by_heads(name, ahead) if split else iterate(ahead)
            if normuon:
                seconds[name] = 0.95 * seconds[name] + 0.05 * (u**2).mean(axis=1)
                even = u / np.sqrt(seconds[name])[:, None]
                u = even * np.linalg.norm(u) / np.linalg.norm(even)
            u = u * 0.2 * np.sqrt(max(w.shape))
            decay = 0.3 * w * (u * w > 0) if cautious else 0.3 * w
            truth[name] = w - lr * (u + decay)
        as_mlx = {name: mx.array(g, mx.float32) for name, g in grads.items()}
        params, state, rows = muon(
            params,
            as_mlx,
            state,
            rows,
            mx.array(lr),
            mx.array(mu),
            train,
            HEAD,
            wait,  # type: ignore[arg-type]
        )
    assert set(params) == set(truth)
    for name, p in truth.items():
        np.testing.assert_allclose(np.array(params[name]), p, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(np.array(state[name]), buffers[name], atol=1e-6)
        if normuon:
            np.testing.assert_allclose(np.array(rows[name]), seconds[name], rtol=1e-3)


def one_step(w: mx.array, g: mx.array, **settings: object) -> mx.array:
    train = TrainConfig(**settings)  # type: ignore[arg-type]
    zero, rows = mx.zeros(w.shape), {"w": mx.zeros(w.shape[:1])}
    new, _, _ = muon({"w": w}, {"w": g}, {"w": zero}, rows, mx.array(0.1), mx.array(0.9), train, HEAD, depend)
    return new["w"]


def test_weight_decay_is_decoupled() -> None:
    """MLX's Muon adds the decay to the gradient, where orthogonalization scales it up to a full-sized step."""
    w = mx.array(svd_matrix(16, 32)[0], mx.float32)
    new = one_step(w, mx.zeros(w.shape), weight_decay=0.5, cautious_weight_decay=False)
    np.testing.assert_allclose(np.array(new), 0.95 * np.array(w), rtol=1e-5)


def test_grouping_matrices_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"layers.{i}.mlp.up_proj": rng.standard_normal((12, 20)).astype(np.float32) for i in range(5)}

    def step() -> dict[str, mx.array]:
        p, g = ({n: mx.array(a) for n, a in arrays.items()} for _ in range(2))
        buffers, rows = {n: mx.zeros(a.shape) for n, a in arrays.items()}, {n: mx.zeros((12,)) for n in arrays}
        return muon(p, g, buffers, rows, mx.array(0.1), mx.array(0.9), TrainConfig(), HEAD, depend)[0]

    together = step()
    monkeypatch.setattr("anarchobot.optim.param_groups.MAX_BATCH_ELEMENTS", 2 * 12 * 20)
    for name, w in step().items():
        np.testing.assert_allclose(np.array(w), np.array(together[name]), atol=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_precomputed_directions_give_the_same_update(split: bool) -> None:
    """Directions computed for subsets of the matrices, as ranks do."""
    rng = np.random.default_rng(0)
    shapes = {"layers.0.self_attn.o_proj": (16, 2 * HEAD), "layers.1.self_attn.o_proj": (16, 2 * HEAD), "up": (24, 16)}
    train = TrainConfig(muon_split_heads=split)

    def arrays(scale: float) -> dict[str, mx.array]:
        return {n: mx.array((scale * rng.standard_normal(s)).astype(np.float32)) for n, s in shapes.items()}

    w, g, m = arrays(1), arrays(1), arrays(0.1)
    seconds, mu = {n: mx.ones(s[:1]) for n, s in shapes.items()}, mx.array(0.9)
    whole = muon(dict(w), dict(g), dict(m), dict(seconds), mx.array(0.1), mu, train, HEAD, depend)
    directions: dict[str, mx.array] = {}
    for names in (["layers.1.self_attn.o_proj"], ["layers.0.self_attn.o_proj", "up"]):
        own, buffers = ({name: a[name] for name in names} for a in (g, m))
        directions |= muon_directions(own, buffers, 1.0, mu, train, HEAD, depend)
    again = muon(dict(w), dict(g), dict(m), dict(seconds), mx.array(0.1), mu, train, HEAD, depend, directions)
    for a, b in zip(whole, again, strict=True):
        for name in a:
            np.testing.assert_allclose(np.array(a[name]), np.array(b[name]), atol=1e-6, err_msg=name)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_update_scale_of_adamw_and_keller(shape: tuple[int, int]) -> None:
    g = np.random.default_rng(0).standard_normal(shape)
    u = np.array(orthogonalize(mx.array(g, mx.float32)[None])[0])
    assert np.sqrt(((u * muon_scale(shape)) ** 2).mean()) == pytest.approx(0.2, rel=0.1)
    assert muon_scale(shape, "keller") == {(64, 64): 1.0, (64, 256): 1.0, (256, 64): 2.0}[shape]
