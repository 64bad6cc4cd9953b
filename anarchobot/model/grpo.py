"""Group-relative policy optimization (GRPO; Shao et al., 2024): the loss of sampled completions and their rewards.

Dr. GRPO: Liu et al., 2025. DAPO: Yu et al., 2025. Shapes: A micro-batches of B completions, L tokens; P prompts with G
completions each.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import GRPOConfig

_STD_EPSILON = 1e-4  # as in TRL


class CompletionTokens(NamedTuple):
    """float32 [B, L]: `log_probs` of a completion's tokens, those under the weights that sampled it (`old`) and under
    the `reference` model; `advantages` [B, 1]."""

    log_probs: mx.array
    old: mx.array
    reference: mx.array
    advantages: mx.array


class GRPOResult(NamedTuple):
    """[B, L]: the losses of the tokens and their gradients with respect to the log-probabilities, an estimate of the KL
    divergence from the reference model, and whether clipping removed the gradient of the advantage."""

    losses: mx.array
    grads: mx.array
    kl: mx.array
    clipped: mx.array


def grpo(tokens: CompletionTokens, settings: GRPOConfig) -> GRPOResult:
    """With the ratio r = p / p_old and the advantage A, the loss is

        -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta KL

    where KL = p_ref / p - log(p_ref / p) - 1 (k3; Schulman, 2020), times r with `use_bias_correction_kl`.
    """
    ratio = mx.exp(tokens.log_probs - tokens.old)
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    clipped_ratio = mx.clip(ratio, 1 - settings.epsilon, 1 + high)
    gains, clipped_gains = ratio * tokens.advantages, clipped_ratio * tokens.advantages
    clipped = clipped_gains < gains
    losses = -mx.minimum(gains, clipped_gains)
    grads = mx.where(clipped, 0.0, -gains)
    if settings.beta == 0:
        return GRPOResult(losses, grads, mx.zeros_like(losses), clipped)
    to_reference = tokens.reference - tokens.log_probs
    kl, kl_grads = mx.exp(to_reference) - to_reference - 1, 1 - mx.exp(to_reference)
    penalty, penalty_grads = kl, kl_grads
    if settings.use_bias_correction_kl:
        penalty, penalty_grads = ratio * kl, ratio * (kl + kl_grads)
    return GRPOResult(losses + settings.beta * penalty, grads + settings.beta * penalty_grads, kl, clipped)


def group_advantages(rewards: npt.NDArray[np.float64], settings: GRPOConfig) -> npt.NDArray[np.float32]:
    """The rewards [P, G] minus the mean of their group, divided as `scale_rewards` says."""
    advantages: npt.NDArray[np.float64] = rewards - rewards.mean(axis=1, keepdims=True)
    if settings.scale_rewards != "none":
        std = rewards.std(axis=1, ddof=1, keepdims=True) if settings.scale_rewards == "group" else rewards.std(ddof=1)
        advantages = advantages / (std + _STD_EPSILON)
    return advantages.astype(np.float32)


def token_weights(lengths: npt.NDArray[np.int64], settings: GRPOConfig) -> npt.NDArray[np.float32]:
    """The weight of each completion's tokens, [A, B], from its number of tokens in the loss, which may be 0.

    The loss of a step is the mean over completions of the weighted sums of their tokens' losses.
    """
    if settings.loss_type == "grpo":
        weights = 1 / np.maximum(lengths, 1)
    elif settings.loss_type == "bnpo":
        weights = np.broadcast_to(lengths.shape[1] / np.maximum(lengths.sum(axis=1, keepdims=True), 1), lengths.shape)
    elif settings.loss_type == "dr_grpo":
        weights = np.full(lengths.shape, 1 / settings.max_completion_length)
    else:
        weights = np.full(lengths.shape, lengths.size / max(1, int(lengths.sum())))
    return np.where(lengths > 0, weights, 0).astype(np.float32)
