"""Preference losses: functions of the log-probabilities of a chosen and a rejected answer to one prompt.

Shapes: P pairs; the last axis of [P, 2] is chosen, rejected.
"""

from typing import NamedTuple

import mlx.core as mx

from anarchobot.config.schema import PreferenceConfig

PER_TOKEN = ("sigmoid_norm", "ipo", "simpo", "orpo")  # losses of the mean over an answer's tokens, not of the sum
_MAX_LOG_PROB = -1e-9  # per token: keeps the log odds finite if p = 1


class Preferences(NamedTuple):
    """`log_probs` [P, 2] of whole answers, including the end of turn; their `lengths` [P, 2] in tokens; `reference`
    [P, 2]: their log-probabilities under the reference model, the model before tuning."""

    log_probs: mx.array
    lengths: mx.array
    reference: mx.array


def preference_losses(pairs: Preferences, settings: PreferenceConfig) -> mx.array:
    """A loss for each pair [P], float32. With rewards r (see `rewards`), h = r(chosen) - r(rejected) and e =
    `label_smoothing`, the logistic loss is -(1 - e) log s(h) - e log s(-h):

    - sigmoid (DPO; Rafailov et al., 2023) and sigmoid_norm (length-normalized DPO; Lambert et al., 2024): the logistic
      loss
    - simpo (Meng et al., 2024): the logistic loss of h - `simpo_gamma`
    - cpo (Xu et al., 2024): the logistic loss - `cpo_alpha` log p(chosen) per token. The likelihood is the mean over
      pairs; TRL's is the mean over the tokens of a batch.
    - ipo (Azar et al., 2023): (h / beta - 1 / (2 beta))^2
    - orpo (Hong et al., 2024): -log p(chosen) per token - beta log s(o(chosen) - o(rejected)), where o(x) =
      x - log(1 - exp(x)) are the log odds of x, a log-probability per token. TRL's likelihood of the chosen answer
      includes the prompt.
    """
    chosen_per_token = pairs.log_probs[:, 0] / pairs.lengths[:, 0]
    if settings.loss == "orpo":
        bounded = mx.minimum(pairs.log_probs / pairs.lengths, _MAX_LOG_PROB)  # at 0, odds and gradient are infinite
        odds = bounded - mx.log(-mx.expm1(bounded))  # not log1p(-exp): near 0, where expm1 is exact, exp rounds to 1
        return -chosen_per_token - settings.beta * _log_sigmoid(odds[:, 0] - odds[:, 1])
    scores = rewards(pairs, settings)
    h = scores[:, 0] - scores[:, 1]
    if settings.loss == "ipo":
        return mx.square(h / settings.beta - 1 / (2 * settings.beta))
    if settings.loss == "simpo":
        h = h - settings.simpo_gamma
    smoothing = settings.label_smoothing
    losses = -(1 - smoothing) * _log_sigmoid(h) - smoothing * _log_sigmoid(-h)
    return losses - settings.cpo_alpha * chosen_per_token if settings.loss == "cpo" else losses


def rewards(pairs: Preferences, settings: PreferenceConfig) -> mx.array:
    """[P, 2]: beta times the log-ratio to the reference model or, for losses without one, the log-probability; of the
    losses in PER_TOKEN, per token."""
    scores = pairs.log_probs - pairs.reference if settings.needs_reference else pairs.log_probs
    return settings.beta * (scores / pairs.lengths if settings.loss in PER_TOKEN else scores)


def losses_and_grads(pairs: Preferences, settings: PreferenceConfig) -> tuple[mx.array, mx.array]:
    """Returns the losses [P], and the gradient [P, 2] of their sum with respect to the log-probabilities."""

    def total(log_probs: mx.array) -> mx.array:
        return preference_losses(pairs._replace(log_probs=log_probs), settings).sum()

    return preference_losses(pairs, settings), mx.grad(total)(pairs.log_probs)


def _log_sigmoid(x: mx.array) -> mx.array:
    """Has an exact gradient far from 0, where the gradient of MLX's logaddexp rounds to zero; at 0 it is 1/2."""
    size = mx.where(x < 0, -x, x)
    return mx.where(x < 0, x, 0) - mx.log1p(mx.exp(-size))
