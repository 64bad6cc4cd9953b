"""Preference losses: functions of the log-probabilities of a chosen and a rejected answer to one prompt.

Shapes: P pairs; the last axis of [P, 2] is chosen, rejected.
"""

from typing import Literal, NamedTuple

import mlx.core as mx

Kind = Literal["sigmoid", "ipo", "orpo"]
_MAX_LOG_PROB = -1e-9  # per token: keeps the log odds finite if p = 1


class Preferences(NamedTuple):
    """`log_probs` [P, 2] of whole answers, including the end of turn; their `lengths` [P, 2] in tokens; `reference`
    [P, 2]: their log-probabilities under the reference model, the model before tuning."""

    log_probs: mx.array
    lengths: mx.array
    reference: mx.array


def preference_losses(pairs: Preferences, kind: Kind, beta: float, label_smoothing: float = 0.0) -> mx.array:
    """A loss for each pair [P], float32. With h = (chosen - reference) - (rejected - reference):

    - sigmoid (DPO; Rafailov et al., 2023): -(1 - e) log s(beta h) - e log s(-beta h), e = `label_smoothing`
    - ipo (Azar et al., 2023): (h - 1 / (2 beta))^2, log-probabilities per token
    - orpo (Hong et al., 2024), without a reference, log-probabilities per token: -chosen - beta log s(o(chosen) -
      o(rejected)), where o(x) = x - log(1 - exp(x)) are log odds
    """
    if kind == "orpo":
        mean = pairs.log_probs / pairs.lengths
        bounded = mx.minimum(mean, _MAX_LOG_PROB)  # at 0, the odds and their gradient would be infinite
        odds = bounded - mx.log(-mx.expm1(bounded))  # not log1p(-exp): near 0, where expm1 is exact, exp rounds to 1
        return -mean[:, 0] - beta * _log_sigmoid(odds[:, 0] - odds[:, 1])
    log_ratios = pairs.log_probs - pairs.reference
    if kind == "ipo":
        log_ratios = log_ratios / pairs.lengths
        return mx.square(log_ratios[:, 0] - log_ratios[:, 1] - 1 / (2 * beta))
    h = beta * (log_ratios[:, 0] - log_ratios[:, 1])
    return -(1 - label_smoothing) * _log_sigmoid(h) - label_smoothing * _log_sigmoid(-h)


def rewards(pairs: Preferences, kind: Kind, beta: float) -> mx.array:
    """[P, 2]: beta times the log-ratio to the reference model or, for orpo, the log-probability per token."""
    if kind == "orpo":
        return beta * pairs.log_probs / pairs.lengths
    return beta * (pairs.log_probs - pairs.reference)


def losses_and_grads(
    pairs: Preferences, kind: Kind, beta: float, label_smoothing: float = 0.0
) -> tuple[mx.array, mx.array]:
    """Returns the losses [P], and the gradient [P, 2] of their sum with respect to the log-probabilities."""

    def total(log_probs: mx.array) -> mx.array:
        return preference_losses(pairs._replace(log_probs=log_probs), kind, beta, label_smoothing).sum()

    return preference_losses(pairs, kind, beta, label_smoothing), mx.grad(total)(pairs.log_probs)


def _log_sigmoid(x: mx.array) -> mx.array:
    """Has an exact gradient far from 0, where the gradient of MLX's logaddexp rounds to zero; at 0 it is 1/2."""
    size = mx.where(x < 0, -x, x)
    return mx.where(x < 0, x, 0) - mx.log1p(mx.exp(-size))
