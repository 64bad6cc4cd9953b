"""The chunked head and loss against PyTorch's own cross-entropy and autograd, in float64."""

import pytest

from anarchobot.config.schema import ModelConfig

torch = pytest.importorskip("torch")

from anarchobot.torch_backend.loss import loss_and_gradients, loss_sum  # noqa: E402

N, D, V = 23, 8, 31


@pytest.mark.parametrize("chunk", [5, 23, 256])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_loss_and_gradients_match_autograd_in_float64(softcap: float | None, chunk: int) -> None:
    """With ignored targets, and the weight's gradient added to an existing one."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((N, D), (V, D)))
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[3:9] = -100
    model = ModelConfig(vocab_size=V, d_model=D, n_heads=2, logit_softcap=softcap)

    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    z = h @ w.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    exact = torch.nn.functional.cross_entropy(z, targets, ignore_index=-100, reduction="sum")
    (0.3 * exact).backward()

    exact = float(exact.detach())
    gradient = torch.ones(V, D)
    total, dhidden = loss_and_gradients(hidden, weight, targets, model, 0.3, gradient, chunk)
    assert float(total) == pytest.approx(exact, rel=1e-6)
    assert float(loss_sum(hidden, weight, targets, model, chunk)) == pytest.approx(exact, rel=1e-6)
    torch.testing.assert_close(dhidden.double(), h.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient.double() - 1, w.grad, atol=2e-6, rtol=1e-5)


def test_loss_scale_preserves_small_float16_gradients() -> None:
    """Small probabilities underflow in float16 unless they are scaled first, here by 2^16."""
    model = ModelConfig(vocab_size=4096, d_model=8, n_heads=2)
    hidden = torch.full((1, 8), 0.25, dtype=torch.float16)
    weight = torch.zeros(4096, 8)
    weight[0] = 5.5  # a logit of 11: the other probabilities are at most 1 / 64,000
    targets = torch.tensor([0])
    scaled, plain = torch.zeros(4096, 8), torch.zeros(4096, 8)
    loss_and_gradients(hidden, weight, targets, model, 2.0**16, scaled, 256)
    loss_and_gradients(hidden, weight, targets, model, 1.0, plain, 256)
    exact = 0.25 / (torch.exp(torch.tensor(11.0, dtype=torch.float64)) + 4095)  # p h, for a token other than the target
    assert float(scaled[7, 0]) / 2**16 == pytest.approx(float(exact), rel=2e-3)
    assert abs(float(plain[7, 0]) / float(exact) - 1) > abs(float(scaled[7, 0]) / 2**16 / float(exact) - 1)
