"""The loss of KTO (Ethayarajh et al., 2024): a function of the log-probability of one answer, labeled desirable or not.

Shapes: P answers.
"""

from typing import NamedTuple

import mlx.core as mx

from anarchobot.config.schema import PreferenceConfig


class LabeledAnswers(NamedTuple):
    """float32 [P]: `log_probs` of whole answers, their log-probabilities under the `reference` model, and whether they
    are `desirable` (1 or 0). `kl` [P] or a scalar: an estimate of the KL divergence from the reference model, at least
    0."""

    log_probs: mx.array
    reference: mx.array
    desirable: mx.array
    kl: mx.array


class KTOResult(NamedTuple):
    """float32 [P]: the losses, the gradients of their sum with respect to the log-probabilities, the rewards beta
    (log_probs - reference), and the values: how far the reward is on the right side of beta kl."""

    losses: mx.array
    grads: mx.array
    rewards: mx.array
    values: mx.array


def kto(answers: LabeledAnswers, settings: PreferenceConfig) -> KTOResult:
    """With v = beta (log_probs - reference - kl), negative for undesirable answers, the loss is weight (1 - s(v)).

    `kl` has no gradient. The weights are desirable_weight and undesirable_weight.
    """
    log_ratios = answers.log_probs - answers.reference
    sign = 2 * answers.desirable - 1
    weights = mx.where(answers.desirable > 0, settings.desirable_weight, settings.undesirable_weight)
    values = settings.beta * sign * (log_ratios - answers.kl)
    losses = weights * mx.sigmoid(-values)
    grads = -settings.beta * sign * losses * mx.sigmoid(values)
    return KTOResult(losses, grads, settings.beta * log_ratios, values)
