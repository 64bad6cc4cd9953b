"""Muon and AdamW against a singular value decomposition, float64 formulas and PyTorch's AdamW."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from anarchobot.config.schema import TrainConfig
from anarchobot.optim import param_groups
from tests.optim.test_muon import HEAD, SHAPES, by_heads
from tests.optim.test_polar_express import iterate, svd_matrix

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from anarchobot.torch_backend import optim  # noqa: E402
from anarchobot.torch_backend.device import reduced_float32  # noqa: E402


@pytest.mark.parametrize("shape", [(32, 32), (24, 96), (96, 24), (1, 16), (16, 1)])
def test_orthogonalize_is_close_to_the_polar_factor(shape: tuple[int, int]) -> None:
    g, nearest = svd_matrix(*shape)
    zero = np.zeros(shape)
    got, other, still = optim.orthogonalize(torch.tensor(np.stack([g, 1000 * g, zero]), dtype=torch.float32))
    u = got.double().numpy()
    values = np.linalg.svd(u, compute_uv=False)
    assert values.min() > 0.85 and values.max() < 1.15  # published bounds for five steps
    assert np.vdot(u, nearest) / (np.linalg.norm(u) * np.linalg.norm(nearest)) > 0.99
    np.testing.assert_allclose(u, iterate(g), atol=5e-5)
    np.testing.assert_allclose(other.numpy(), iterate(1000 * g), atol=5e-5)
    assert not still.any()


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-6])
def test_ill_conditioned_matrices_match_float64(smallest: float) -> None:
    g, _ = svd_matrix(48, 128, smallest=smallest)
    got = optim.orthogonalize(torch.tensor(g[None], dtype=torch.float32))[0].double().numpy()
    exact = iterate(g)
    assert np.linalg.norm(got - exact) < 0.005 * np.linalg.norm(exact)


class Tf32(TorchDispatchMode):
    """Rounds the operands of every product to 10 bits of mantissa."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            first = 1 if "add" in name else 0
            rounded = [
                ((x.contiguous().view(torch.int32) + (1 << 12)) >> 13 << 13).view(torch.float32) for x in args[first:]
            ]
            args = (*args[:first], *rounded)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tf32() -> Iterator[None]:
    reduced_float32.cache_clear()
    with Tf32():
        yield
    reduced_float32.cache_clear()


@pytest.mark.parametrize("smallest", [1e-3, 1e-5, 1e-8], ids=str)
@pytest.mark.parametrize("shape", [(64, 768), (192, 192), (512, 128)], ids=str)
def test_products_rounded_to_tf32_give_the_same_singular_values(
    tf32: None, shape: tuple[int, int], smallest: float
) -> None:
    g, _ = svd_matrix(*shape, smallest=smallest)
    got, exact = optim.orthogonalize(torch.tensor(g[None], dtype=torch.float32))[0].double().numpy(), iterate(g)
    assert np.linalg.svd(got, compute_uv=False)[0] < 1.15
    assert np.vdot(got, exact) > 0.95 * np.linalg.norm(got) * np.linalg.norm(exact)


def test_exact_products_are_not_taken_for_rounded_ones() -> None:
    assert not reduced_float32(torch.device("cpu"))


@pytest.mark.parametrize("most", [2**23, 600], ids=["together", "one by one"])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("normuon", [True, False])
@pytest.mark.parametrize("cautious", [True, False])
def test_three_steps_of_muon_equal_the_formula_in_float64(
    cautious: bool, normuon: bool, split: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All kinds of matrices at once, with Nesterov momentum that changes between steps and decoupled decay."""
    monkeypatch.setattr(param_groups, "MAX_BATCH_ELEMENTS", most)
    train = TrainConfig(
        normuon=normuon, muon_split_heads=split, cautious_weight_decay=cautious, weight_decay=0.3, lr=0.1
    )
    rng = np.random.default_rng(0)
    truth = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    momenta = {name: np.zeros_like(p) for name, p in truth.items()}
    squares = {name: np.zeros(len(p)) for name, p in truth.items()}
    params = {name: torch.tensor(p, dtype=torch.float32) for name, p in truth.items()}
    buffers = {name: torch.zeros_like(p) for name, p in params.items()}
    seconds = {name: torch.zeros(len(p)) for name, p in params.items()} if normuon else {}
    for lr, mu in ((0.1, 0.85), (0.05, 0.9), (0.01, 0.95)):
        grads = {name: rng.standard_normal(p.shape) for name, p in truth.items()}
        for name, g in grads.items():
            w = truth[name]
            momenta[name] = mu * momenta[name] + (1 - mu) * g
            ahead = mu * momenta[name] + (1 - mu) * g
            u = by_heads(name, ahead) if split else iterate(ahead)
            if normuon:
                squares[name] = 0.95 * squares[name] + 0.05 * (u**2).mean(axis=1)
                even = u / np.sqrt(squares[name])[:, None]
                u = even * np.linalg.norm(u) / np.linalg.norm(even)
            u = u * 0.2 * np.sqrt(max(w.shape))
            truth[name] = w - lr * (u + (0.3 * w * (u * w > 0) if cautious else 0.3 * w))
        tensors = {name: torch.tensor(g, dtype=torch.float32) for name, g in grads.items()}
        optim.muon(params, tensors, buffers, seconds, lr, mu, train, HEAD)
    for name, p in truth.items():
        np.testing.assert_allclose(params[name].numpy(), p, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(buffers[name].numpy(), momenta[name], atol=1e-6)
        if normuon:
            np.testing.assert_allclose(seconds[name].numpy(), squares[name], rtol=1e-3)


def test_five_steps_of_adamw_match_pytorch() -> None:
    """Matrices decay, vectors do not."""
    train = TrainConfig(weight_decay=0.1, cautious_weight_decay=False)
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(shape, generator=generator) for name, shape in (("w", (6, 5)), ("norm", (5,)))}
    theirs = {name: p.double().requires_grad_() for name, p in params.items()}
    groups = [{"params": [theirs["w"]], "weight_decay": 0.1}, {"params": [theirs["norm"]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-8)
    first, second = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for count in range(1, 6):
        grads = {name: torch.randn(p.shape, generator=generator) for name, p in params.items()}
        for name, g in grads.items():
            theirs[name].grad = g.double()
        optimizer.step()
        optim.adamw(params, grads, first, second, 0.02, count, train)
    for name, p in params.items():
        torch.testing.assert_close(p.double(), theirs[name].detach(), atol=1e-6, rtol=1e-6)
