"""The divergence from a teacher, and its gradient, against PyTorch's kl_div and autograd in float64."""

from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import DistillationConfig
from anarchobot.model.distillation import TeacherTargets, divergence, top_log_probs
from anarchobot.numerics.elementary import softmax

C, V = 7, 50


def both(seed: int = 0, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a student and of a teacher."""
    rng = np.random.default_rng(seed)
    student, teacher = (scale * rng.normal(size=(C, V)) for _ in range(2))
    return student.astype(np.float32), teacher.astype(np.float32)


def computed(student: np.ndarray, teacher: np.ndarray, **settings: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The losses [C], the gradient [C, V] and the teacher's ids [C, k]."""
    config = DistillationConfig(**settings)
    ids, log_probs = top_log_probs(mx.array(teacher), config)
    z = mx.array(student)
    losses, gradient = whole(z, TeacherTargets(ids, log_probs, config))
    return np.array(losses)[:, 0], np.array(gradient), np.array(ids)


def whole(z: mx.array, teacher: TeacherTargets) -> tuple[mx.array, mx.array]:
    """The losses and the gradient [C, V] in one piece."""
    kl = divergence(z, softmax(z), teacher)
    return kl.losses, mx.put_along_axis(kl.exps * kl.others, teacher.ids.astype(mx.uint32), kl.top, axis=1)


def expected(
    student: np.ndarray, teacher: np.ndarray, ids: np.ndarray, loss: str, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """In float64, with the probabilities of all tokens that are not in `ids` added up."""
    torch = pytest.importorskip("torch")
    z = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    chosen = torch.zeros(C, V, dtype=torch.bool).scatter_(1, torch.tensor(ids.astype(np.int64)), True)

    def outcomes(logits: Any) -> Any:
        p = torch.softmax(logits / temperature, dim=1)
        parts = [p.gather(1, torch.tensor(ids.astype(np.int64)))]
        if ids.shape[1] < V:
            parts.append((p * ~chosen).sum(1, keepdim=True))
        return torch.cat(parts, dim=1).log()

    log_p, log_q = outcomes(z), outcomes(torch.tensor(teacher, dtype=torch.float64))
    if loss == "reverse_kl":
        log_p, log_q = log_q, log_p
    losses = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    losses.sum().backward()
    return losses.detach().numpy(), z.grad.numpy()


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("top_k", [1, 5, V - 1, V])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_gradient_match_pytorch(loss: str, top_k: int, temperature: float) -> None:
    student, teacher = both()
    losses, gradient, ids = computed(student, teacher, loss=loss, top_k=top_k, temperature=temperature)
    assert all(set(row) == set(np.argsort(-z)[:top_k]) for row, z in zip(ids, teacher, strict=True))
    wanted, wanted_gradient = expected(student, teacher, ids, loss, temperature)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, wanted_gradient, atol=1e-4 * np.abs(wanted_gradient).max())


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
def test_all_tokens_give_the_exact_divergence(loss: str) -> None:
    """With k = V, in float64 and without buckets."""
    student, teacher = both(1)

    def log_softmax(z: np.ndarray) -> np.ndarray:
        z = z.astype(np.float64) - z.max(axis=1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    log_p, log_q = log_softmax(student), log_softmax(teacher)
    if loss == "reverse_kl":
        log_p, log_q = log_q, log_p
    losses, _, _ = computed(student, teacher, loss=loss, top_k=V)
    np.testing.assert_allclose(losses, (np.exp(log_q) * (log_q - log_p)).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
def test_fewer_tokens_give_a_lower_bound_and_the_teacher_itself_zero(loss: str) -> None:
    student, teacher = both(2)
    bounds = [computed(student, teacher, loss=loss, top_k=k)[0] for k in (1, 3, 10, 30, V)]
    assert all((a <= b + 1e-5).all() for a, b in pairwise(bounds)) and (bounds[0] >= 0).all()
    losses, gradient, _ = computed(teacher, teacher, loss=loss, top_k=3)
    np.testing.assert_allclose(losses, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_the_students_proportions_among_the_other_tokens_are_kept() -> None:
    """The gradient raises or lowers them all in proportion to their probabilities."""
    student, teacher = both(3)
    _, gradient, ids = computed(student, teacher, top_k=4)
    p = np.exp(student - student.max(axis=1, keepdims=True))
    for row in range(C):
        others = np.setdiff1d(np.arange(V), ids[row])
        ratios = gradient[row, others] / p[row, others]
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-4)
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-6)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("top_k", [2, V])
def test_certain_models_give_finite_losses_and_gradients(loss: str, top_k: int) -> None:
    """Probabilities that are 0 in float32, of the student, the teacher and both."""
    student, teacher = both(4, scale=200.0)
    for a, b in ((student, teacher), (student, student), (both(4)[0], teacher), (student, both(4)[1])):
        losses, gradient, _ = computed(a, b, loss=loss, top_k=top_k)
        assert np.isfinite(losses).all() and np.isfinite(gradient).all() and (losses > -1e-4).all()


def test_rounding_to_float16_keeps_probabilities_that_add_up_to_one() -> None:
    student, teacher = both(5)
    config = DistillationConfig(top_k=8)
    ids, log_probs = top_log_probs(mx.array(teacher), config)
    rounded = TeacherTargets(ids.astype(mx.uint16), log_probs.astype(mx.float16), config)
    z = mx.array(student)
    exact, gradient = whole(z, TeacherTargets(ids, log_probs, config))
    close, close_gradient = whole(z, rounded)
    np.testing.assert_allclose(np.array(close), np.array(exact), rtol=3e-3)
    np.testing.assert_allclose(np.array(close_gradient), np.array(gradient), atol=1e-3)
    np.testing.assert_allclose(np.array(close_gradient).sum(axis=1), 0, atol=1e-6)
