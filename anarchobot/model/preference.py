"""What is learnt from pairs of answers to one prompt, a chosen and a rejected one: losses of their log-probabilities.

Shapes: P pairs; the last axis of [P, 2] is chosen, rejected.
"""

from typing import Literal, NamedTuple

import mlx.core as mx

Kind = Literal["sigmoid", "ipo", "orpo"]
_SUREST = -1e-9  # log-probability of a token: the odds of what is surer are no greater


class Preferences(NamedTuple):
    """`log_probs` [P, 2] of whole answers, end of turn included, and their `lengths` in tokens [P, 2]; `reference`
    [P, 2]: the log-probabilities before the tuning began."""

    log_probs: mx.array
    lengths: mx.array
    reference: mx.array


def preference_losses(pairs: Preferences, kind: Kind, beta: float, label_smoothing: float = 0.0) -> mx.array:
    """A loss for each pair [P], float32. With h = (chosen - reference) - (rejected - reference):

    - sigmoid (DPO; Rafailov et al., 2023): -(1 - e) log s(beta h) - e log s(-beta h), e = `label_smoothing`
    - ipo (Azar et al., 2023): (h - 1 / (2 beta))^2, log-probabilities by token
    - orpo (Hong et al., 2024), without a reference, log-probabilities by token: -chosen - beta log s(o(chosen) -
      o(rejected)), where o(x) = x - log(1 - exp(x)) are log odds
    """
    if kind == "orpo":
        mean = pairs.log_probs / pairs.lengths
        sure = mx.minimum(mean, _SUREST)  # at 0 odds and slopes would be without end
        odds = sure - mx.log(-mx.expm1(sure))  # not log1p(-exp): near 0, where expm1 is exact, exp rounds to 1
        return -mean[:, 0] - beta * _log_sigmoid(odds[:, 0] - odds[:, 1])
    gained = pairs.log_probs - pairs.reference
    if kind == "ipo":
        gained = gained / pairs.lengths
        return mx.square(gained[:, 0] - gained[:, 1] - 1 / (2 * beta))
    h = beta * (gained[:, 0] - gained[:, 1])
    return -(1 - label_smoothing) * _log_sigmoid(h) - label_smoothing * _log_sigmoid(-h)


def rewards(pairs: Preferences, kind: Kind, beta: float) -> mx.array:
    """[P, 2]: beta times what an answer gained in log-probability; without a reference (orpo), its own by token."""
    if kind == "orpo":
        return beta * pairs.log_probs / pairs.lengths
    return beta * (pairs.log_probs - pairs.reference)


def losses_and_slopes(
    pairs: Preferences, kind: Kind, beta: float, label_smoothing: float = 0.0
) -> tuple[mx.array, mx.array]:
    """The losses [P], and the gradient [P, 2] of their sum by the log-probabilities."""

    def total(log_probs: mx.array) -> mx.array:
        return preference_losses(pairs._replace(log_probs=log_probs), kind, beta, label_smoothing).sum()

    return preference_losses(pairs, kind, beta, label_smoothing), mx.grad(total)(pairs.log_probs)


def _log_sigmoid(x: mx.array) -> mx.array:
    """Its slope too is exact, also far from 0, where that of MLX's logaddexp is rounded away; at 0 it is 1/2."""
    size = mx.where(x < 0, -x, x)
    return mx.where(x < 0, x, 0) - mx.log1p(mx.exp(-size))
