"""Knowledge distillation (Hinton et al., 2015): the divergence of a model's distribution from its teacher's.

Of the teacher, only the probabilities of its k most likely tokens are known, and so that of all other tokens together.
The divergence is that of k + 1 outcomes. By the chain rule, the forward divergence of all V tokens is this plus the
teacher's probability of the others times the divergence among them (the split of Zhao et al., 2022), which is left out.
The student keeps its own proportions there. With k = V, nothing is left out. Renormalizing the k probabilities instead
would teach that no other token is possible (Anshumann et al., 2025).

Shapes: C positions, V vocabulary, k = distillation.top_k.
"""

from typing import NamedTuple

import mlx.core as mx

from anarchobot.config.schema import DistillationConfig
from anarchobot.numerics.elementary import Softmax, row_sums, softmax

_LEAST = 1e-30  # instead of 0 in logarithms and divisors; float16's loss scale does not take its reciprocal to infinity
_LOWEST = -65504.0  # of float16, in which log-probabilities are stored


class TeacherTargets(NamedTuple):
    """A teacher's distribution at each position: its most likely tokens `ids` [..., k], and the log-probabilities, in
    nats at distillation.temperature, of each of these and of all others together [..., k + 1]."""

    ids: mx.array
    log_probs: mx.array
    settings: DistillationConfig

    def flat(self) -> "TeacherTargets":
        """All leading axes as one."""
        return self._replace(
            ids=self.ids.reshape(-1, self.ids.shape[-1]), log_probs=self.log_probs.reshape(-1, self.log_probs.shape[-1])
        )

    def rows(self, start: int, stop: int) -> "TeacherTargets":
        return self._replace(ids=self.ids[start:stop], log_probs=self.log_probs[start:stop])


class Divergence(NamedTuple):
    """`losses` [C, 1], and the gradient of their sum with respect to the logits [C, V]: `top` [C, k] for the teacher's
    tokens, and `exps` [C, V] times `others` [C, 1] for all others."""

    losses: mx.array
    top: mx.array
    exps: mx.array
    others: mx.array


def top_log_probs(z: mx.array, settings: DistillationConfig) -> tuple[mx.array, mx.array]:
    """The most likely tokens [C, k] of float32 logits [C, V], in no particular order, and the log-probabilities
    [C, k + 1] of these and of all others together; finite in float16."""
    z = z * (1 / settings.temperature)
    ids = mx.argpartition(-z, settings.top_k - 1, axis=1)[:, : settings.top_k]
    return ids, mx.maximum(_log_probs(z, softmax(z), ids)[0], _LOWEST)


def divergence(z: mx.array, probs: Softmax, teacher: TeacherTargets) -> Divergence:
    """The Kullback-Leibler divergence between the teacher's distribution q and the student's p, both at
    distillation.temperature T, and its gradient. z [C, V] are the student's float32 logits, and `probs` their softmax.

    The forward divergence is sum q log(q / p), the reverse one sum p log(p / q). With r = log(p / q), their gradients
    with respect to the logits of the k + 1 outcomes, divided by T, are p - q and p (r - sum p r). That of all others
    together is divided among them in proportion to their probabilities.
    """
    settings = teacher.settings
    if settings.temperature != 1:
        z = z * (1 / settings.temperature)
        probs = softmax(z)
    ids = teacher.ids.astype(mx.uint32)
    log_p, others = _log_probs(z, probs, ids)
    log_q = teacher.log_probs.astype(mx.float32)
    log_q = log_q - mx.logsumexp(log_q, axis=1, keepdims=True)  # float16 has rounded them
    p, q, ratios = mx.exp(log_p), mx.exp(log_q), log_p - log_q
    if settings.loss == "forward_kl":
        losses = -mx.sum(q * ratios, axis=1, keepdims=True)
        gradient = p - q
    else:
        losses = mx.sum(p * ratios, axis=1, keepdims=True)
        gradient = p * (ratios - losses)
    gradient = gradient * (1 / settings.temperature)
    return Divergence(losses, gradient[:, :-1], probs.exps, gradient[:, -1:] / mx.maximum(others, _LEAST))


def _log_probs(z: mx.array, probs: Softmax, ids: mx.array) -> tuple[mx.array, mx.array]:
    """The log-probabilities [C, k + 1] of the tokens `ids` [C, k] and of all others together; and the sum of
    e^(z - max) over the others [C, 1], without the cancellation of a difference."""
    chosen = mx.take_along_axis(z, ids, axis=1)
    others = row_sums(mx.put_along_axis(probs.exps, ids, mx.zeros_like(chosen), axis=1))
    rest = mx.log(mx.maximum(others, _LEAST)) - mx.log(probs.sums)
    return mx.concatenate([chosen - probs.log_normalizer, rest], axis=1), others
