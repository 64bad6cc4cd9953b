"""The output head fused with cross-entropy, in chunks of tokens: the logits of a full batch never exist at once.

The logits of 8,192 tokens and a vocabulary of 32,000 are 1 GiB in float32, and so is their gradient. Here the logits of
a chunk yield its loss and its part of both gradients at once, and are freed (as in Cut Cross-Entropy, Wijmans et al.,
2024, without its filtering). MLX is lazy, so each chunk waits for the one before it. On a GPU, MLX's fused kernels
read the logits of a chunk once for the loss and once for their gradient.

Shapes: N tokens, D d_model, V vocabulary, C chunk.
"""

from collections.abc import Iterator

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model.architecture import CPU_LOSS_CHUNK, GPU_LOSS_CHUNK, forward_pass
from anarchobot.model.distillation import TeacherTargets, divergence
from anarchobot.model.gradient_accumulator import GradientAccumulator, Params, add_product
from anarchobot.model.linear import Matrix, matmul, matmul_t, matrix
from anarchobot.model.step_options import MicroBatch, StepOptions
from anarchobot.numerics.device import on_cpu
from anarchobot.numerics.elementary import Softmax, softmax, tanh
from anarchobot.numerics.eval_order import EvalOrder, depend


def logits(hidden: mx.array, params: Params, model: ModelConfig) -> mx.array:
    """float32 logits [..., V] of hidden states [..., D]: the product in their dtype, the rest in float32."""
    z = _products(hidden.reshape(-1, hidden.shape[-1]), params, model).astype(mx.float32)
    z = z.reshape(*hidden.shape[:-1], -1)
    return z if model.logit_softcap is None else model.logit_softcap * mx.tanh(z / model.logit_softcap)


def _head_matrix(params: Params, model: ModelConfig) -> Matrix | None:
    """The output head [V, D]; None if the architecture has another kind of head."""
    name = forward_pass(model).head_name(model)
    return None if name is None else matrix(params, name.removesuffix(".weight"))


def _products(hidden: mx.array, params: Params, model: ModelConfig) -> mx.array:
    """The logits [N, V] of hidden states [N, D] before model.logit_softcap, in their dtype."""
    weight = _head_matrix(params, model)
    return forward_pass(model).head_logits(hidden, params, model) if weight is None else matmul_t(hidden, weight)


def head_loss(
    hidden: mx.array,
    weights: Params,
    batch: MicroBatch,
    model: ModelConfig,
    grads: GradientAccumulator,
    options: StepOptions,
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """Computes the loss and the gradient of the output head, which is added to `grads` if the head is trained.

    Returns the scaled loss of the batch (or the vector of its objective's metrics or, with a teacher, of the loss, the
    cross-entropy and the divergence), the gradient of `hidden` [N, D], and the arrays that later work must wait for.
    """
    wait, chunk, metrics = options.wait, options.loss_chunk, None
    targets, scale = batch.targets.reshape(-1), batch.scale
    teacher = None if batch.teacher is None else batch.teacher.flat()
    if batch.objective is not None:
        losses = token_losses(hidden, weights, targets, model, chunk)
        metrics, dlog_probs = batch.objective(-losses.reshape(batch.targets.shape))
        (hidden,) = wait([hidden], [dlog_probs])
        metrics, scale = scale * metrics, -scale * dlog_probs.reshape(-1)  # [N]
    name, weight = forward_pass(model).head_name(model), _head_matrix(weights, model)
    if name is None or weight is None:
        total, dhidden = _function_gradients(hidden, weights, targets, model, scale, grads, chunk, wait, teacher)
        return total if metrics is None else metrics, dhidden, [total, dhidden]
    trained = grads.is_trainable(name)
    total, dhidden, dweight = loss_and_gradients(
        hidden,
        weight,
        targets,
        model,
        scale,
        grads.sums.pop(name, None) if trained else None,  # no variable refers to it: its memory is reused
        chunk,
        wait,
        trained,
        teacher,
    )
    done = [total, dhidden]
    if dweight is not None:
        grads.sums[name] = dweight
        done.append(dweight)
    return total if metrics is None else metrics, dhidden, done


def loss_sum(
    hidden: mx.array, params: Params, targets: mx.array, model: ModelConfig, chunk: int | None = None
) -> mx.array:
    """Returns the summed cross-entropy in nats (float32 scalar), without gradients: for evaluation.

    `hidden` [N, D], `targets` [N] of int32; negative targets are ignored.
    """
    return mx.sum(token_losses(hidden, params, targets, model, chunk))


def token_losses(
    hidden: mx.array, params: Params, targets: mx.array, model: ModelConfig, chunk: int | None = None
) -> mx.array:
    """Returns the cross-entropy of each token [N], float32; 0 at negative targets. Arguments as for `loss_sum`."""
    losses: list[mx.array] = []
    for h, t, _, _ in _chunks(hidden, targets, mx.array(1.0), chunk):
        (h,) = depend([h], losses[-1:])
        z = _products(h, params, model)
        if _has_fused_loss(model):
            loss = mx.fast.cross_entropy(z, mx.maximum(t, 0))
            losses.append((loss * (t >= 0).astype(mx.float32))[:, None])
        else:
            losses.append(_chunk_loss(z, t, model)[0])
    return mx.concatenate(losses)[:, 0]


def loss_and_gradients(
    hidden: mx.array,
    weight: Matrix,
    targets: mx.array,
    model: ModelConfig,
    scale: mx.array,
    weight_gradient: mx.array | None = None,
    chunk: int | None = None,
    wait: EvalOrder = depend,
    train_weight: bool = True,
    teacher: TeacherTargets | None = None,
) -> tuple[mx.array, mx.array, mx.array | None]:
    """The sum of the losses times `scale` (a scalar, or one per token [N]), and its gradients: with respect to `hidden`
    [N, D] in hidden's dtype and, unless the head is frozen, to `weight` [V, D] in float32, added to `weight_gradient`.
    With a `teacher` of [N, k], the first is the vector that `head_loss` describes.

    For a token with softmax p and one-hot target y, dL/dz = p - y (times 1 - (z/cap)^2 under a softcap), so
    dL/dh = dL/dz W and dL/dW = dL/dz^T h. The scale is applied to dL/dz in float32, before anything is rounded to
    hidden's dtype: otherwise a small p would be lost in float16.
    """
    total = mx.array(0.0)
    hidden_gradients: list[mx.array] = []
    for h, t, s, q in _chunks(hidden, targets, scale, chunk, teacher):
        (h,) = wait([h], [total, *hidden_gradients[-1:], *([] if weight_gradient is None else [weight_gradient])])
        loss, dz = _chunk_backward(matmul_t(h, weight), t, q, model, s, wait)
        hidden_gradients.append(matmul(dz, weight))
        if train_weight:
            weight_gradient = add_product(weight_gradient, dz.T, h)
        total = total + loss
        del dz
    return total, mx.concatenate(hidden_gradients), weight_gradient


def _function_gradients(
    hidden: mx.array,
    weights: Params,
    targets: mx.array,
    model: ModelConfig,
    scale: mx.array,
    grads: GradientAccumulator,
    chunk: int,
    wait: EvalOrder,
    teacher: TeacherTargets | None,
) -> tuple[mx.array, mx.array]:
    """As `loss_and_gradients`, for a head that is a function: MLX differentiates it, given dL/dz. The gradients of its
    parameters are added to `grads`."""
    forward = forward_pass(model)
    trained = {name: weights[name] for name in forward.head_parameters(weights, model) if grads.is_trainable(name)}
    total = mx.array(0.0)
    hidden_gradients: list[mx.array] = []
    for h, t, s, q in _chunks(hidden, targets, scale, chunk, teacher):

        def surrogate(
            h: mx.array, trained: Params, t: mx.array = t, s: mx.array = s, q: TeacherTargets | None = q
        ) -> tuple[mx.array, mx.array]:
            """A scalar with the gradient of the loss: the logits times their gradient. Also returns the loss."""
            z = forward.head_logits(h, {**weights, **trained}, model)
            loss, dz = _chunk_backward(mx.stop_gradient(z), t, q, model, s, depend)
            return mx.sum(z * mx.stop_gradient(dz)), loss

        (h,) = wait([h], [total, *hidden_gradients[-1:]])
        (_, loss), (dh, dtrained) = mx.value_and_grad(surrogate, argnums=(0, 1))(h, trained)
        hidden_gradients.append(dh)
        for name, gradient in dtrained.items():
            hidden_gradients[-1:] = wait(hidden_gradients[-1:], grads.add(name, gradient))
        total = total + loss
    return total, mx.concatenate(hidden_gradients)


def _chunk_backward(
    z: mx.array, t: mx.array, teacher: TeacherTargets | None, model: ModelConfig, scale: mx.array, wait: EvalOrder
) -> tuple[mx.array, mx.array]:
    """The sum of the chunk's losses times `scale` (a scalar, or [C, 1]), and its gradient dL/dz [C, V] in z's dtype.
    With a teacher, the loss is (1 - weight) cross-entropy + weight T^2 divergence, at the temperature T: T^2 keeps the
    size of the gradient (Hinton et al., 2015)."""
    weights = scale * (t >= 0).astype(mx.float32)[:, None]  # [C, 1]; a negative target's row is zero
    if teacher is None and _has_fused_loss(model):
        target = mx.maximum(t, 0)
        (losses,), (dz,) = mx.vjp(lambda z: mx.fast.cross_entropy(z, target), [z], [weights[:, 0]])
        return mx.sum(weights[:, 0] * losses), dz
    dtype = z.dtype
    losses, z, probs = _chunk_loss(z, t, model)
    loss = mx.sum(scale * losses)
    exps, sums = wait([probs.exps, probs.sums], [loss])
    if teacher is None:
        dz = exps * (weights / sums)
    else:
        loss, dz, weights = _add_divergence(loss, z, probs._replace(exps=exps, sums=sums), teacher, weights)
    target = mx.maximum(t, 0)[:, None]
    dz = mx.put_along_axis(dz, target, mx.take_along_axis(dz, target, axis=1) - weights, axis=1)
    if model.logit_softcap is not None:
        dz = dz * (1 - mx.square(z * (1 / model.logit_softcap)))
    (dz,) = wait([dz.astype(dtype)], [dz])
    return loss, dz


def _add_divergence(
    cross_entropy: mx.array, z: mx.array, probs: Softmax, teacher: TeacherTargets, weights: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The loss vector of a chunk whose tokens have `weights` [C, 1], its gradient [C, V] without the targets' own part,
    and the weights of that part."""
    settings, kl = teacher.settings, divergence(z, probs, teacher)
    kl_share = settings.weight * settings.temperature**2
    total = mx.sum(weights * kl.losses)
    loss = mx.stack([(1 - settings.weight) * cross_entropy + kl_share * total, cross_entropy, total])
    weights, kl_weights = (1 - settings.weight) * weights, kl_share * weights
    factor, kl_factor = weights / probs.sums, kl_weights * kl.others
    ids = teacher.ids.astype(mx.uint32)
    top = factor * mx.take_along_axis(probs.exps, ids, axis=1) + kl_weights * kl.top
    same = settings.temperature == 1
    dz = probs.exps * (factor + kl_factor) if same else probs.exps * factor + kl.exps * kl_factor
    return loss, mx.put_along_axis(dz, ids, top, axis=1), weights


def _chunks(
    hidden: mx.array, targets: mx.array, scale: mx.array, chunk: int | None, teacher: TeacherTargets | None = None
) -> Iterator[tuple[mx.array, mx.array, mx.array, TeacherTargets | None]]:
    """Yields chunks of hidden states and targets, each with the scalar scale or the scale of its tokens [C, 1], and the
    teacher's part. `chunk` None: the device's default."""
    chunk = chunk or (CPU_LOSS_CHUNK if on_cpu() else GPU_LOSS_CHUNK)
    for i in range(0, hidden.shape[0], chunk):
        s = scale if scale.ndim == 0 else scale[i : i + chunk, None]
        yield hidden[i : i + chunk], targets[i : i + chunk], s, teacher and teacher.rows(i, i + chunk)


def _has_fused_loss(model: ModelConfig) -> bool:
    return not on_cpu() and model.logit_softcap is None


def _chunk_loss(z: mx.array, t: mx.array, model: ModelConfig) -> tuple[mx.array, mx.array, Softmax]:
    """The losses [C, 1], the capped logits z [C, V] and their softmax; all float32."""
    z = z.astype(mx.float32)
    if model.logit_softcap is not None:
        z = model.logit_softcap * tanh(z * (1 / model.logit_softcap))
    probs = softmax(z)
    picked = mx.take_along_axis(z, mx.maximum(t, 0)[:, None], axis=1)
    losses = probs.log_normalizer - picked  # [C, 1]
    return losses * (t >= 0).astype(mx.float32)[:, None], z, probs
