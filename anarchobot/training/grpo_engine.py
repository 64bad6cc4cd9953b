"""The MLX step on sampled completions (model/grpo.py). Shapes: A micro-batches of B completions, b per worker; L
tokens of a prompt with its completion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import Config
from anarchobot.data.windows import Batch
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.grpo import CompletionTokens, grpo, token_weights
from anarchobot.model.mlx_lm.frozen import cast_weights
from anarchobot.model.step_options import Objective
from anarchobot.training.engine import StepResult
from anarchobot.training.mlx_engine import MicroBatchSlice, used_length
from anarchobot.training.objective_engine import ObjectiveEngine

_SAVED = "optimizer/completions/"  # checkpoint prefix of the completions that are not used up


@dataclass(frozen=True)
class CompletionBatch(Batch):
    """`inputs` and `targets` are int32 [n, L] or [A, B, L]; the targets are the tokens of the completions, with the one
    that ends them. `old_log_probs` and `ref_log_probs` are float32 of the same shape.

    All others are float32 with one number per completion, except for `values`, which has one per reward: their weighted
    sum is `rewards`. `group_std` is the standard deviation of the rewards of a prompt's completions; `truncated` is 1
    for completions without an end.
    """

    old_log_probs: npt.NDArray[np.float32] = field(kw_only=True)
    ref_log_probs: npt.NDArray[np.float32] = field(kw_only=True)
    advantages: npt.NDArray[np.float32] = field(kw_only=True)
    rewards: npt.NDArray[np.float32] = field(kw_only=True)
    values: npt.NDArray[np.float32] = field(kw_only=True)
    group_std: npt.NDArray[np.float32] = field(kw_only=True)
    truncated: npt.NDArray[np.float32] = field(kw_only=True)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of the completions."""
        counts: npt.NDArray[np.int64] = np.count_nonzero(self.targets >= 0, axis=-1)
        return counts

    def flat(self) -> Self:
        """[A, B, ...] as [n, ...]."""
        return self.map(lambda x: x.reshape(-1, *x.shape[2:]))

    def first(self, count: int) -> Self:
        """The first completions of [n, ...]."""
        return self.map(lambda x: x[:count])

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """Means over completions, also of each reward if there are several; `names` are theirs."""
        by_name = zip(names, self.values.reshape(-1, len(names)).T, strict=True)
        return {
            "reward": float(self.rewards.mean()),
            **({f"reward_{name}": float(values.mean()) for name, values in by_name} if len(names) > 1 else {}),
            "reward_std": float(self.rewards.std()),
            "frac_reward_zero_std": float((self.group_std < 1e-6).mean()),
            "completion_length": float(self.lengths.mean()),
            "truncated": float(self.truncated.mean()),
        }


class GRPOEngine(ObjectiveEngine):
    """Trains on CompletionBatches. The reference model is the initial one.

    `completions` are those of the current step: (the position in the data of the first one, batch [n, ...]). If several
    steps use them (num_iterations), they are part of a checkpoint, so that a run resumes exactly between these steps.
    """

    completions: tuple[int, CompletionBatch] | None = None

    def __init__(self, config: Config, weights: Mapping[str, npt.NDArray[Any]] | None = None) -> None:
        super().__init__(config, weights)
        self._settings = config.grpo
        self._reference = {**self.frozen, **self._cast_matrices(self.params)} if config.grpo.beta else None

    def sampling_weights(self, weights: Params) -> Params:
        """The weights for generation: in the dtype of the training step, except for adapters."""
        if self._config.model.architecture == "mlx_lm":
            return cast_weights(weights, self._config.model, self.dtype)
        return {
            name: p.astype(self.dtype) if name.endswith((".weight", ".bias")) and p.dtype == mx.float32 else p
            for name, p in weights.items()
        }

    def with_log_probs(self, batch: CompletionBatch) -> CompletionBatch:
        """The batch [A, B, ...] with its log-probabilities under the current weights and the reference model, as far as
        the loss needs them. Raises MemoryError."""
        if self._settings.num_iterations > 1:
            batch = replace(batch, old_log_probs=self._log_probs(batch, {**self.frozen, **self.params}))
        if self._reference is not None:
            batch = replace(batch, ref_log_probs=self._log_probs(batch, self._reference))
        return batch

    def _log_probs(self, batch: CompletionBatch, weights: Params) -> npt.NDArray[np.float32]:
        """Log-probabilities of the targets [A, B, L]."""
        log_probs = np.zeros(batch.targets.shape, np.float32)

        def part(worker: int) -> None:
            own = self._part(np.arange(batch.inputs.shape[1]), worker)
            for i in range(len(batch.inputs) if len(own) else 0):
                used = used_length(batch.targets[i])
                inputs, targets = (mx.array(x[i, own, :used]) for x in (batch.inputs, batch.targets))
                log_probs[i, own, :used] = np.array(self._token_log_probs(weights, inputs, targets), np.float32)

        self._run_on_workers(part)
        return log_probs

    def train_step(self, batch: Batch, *args: Any, **kwargs: Any) -> StepResult:
        assert isinstance(batch, CompletionBatch)
        result = super().train_step(batch, *args, **kwargs)
        return replace(result, extra={**batch.metrics(self._settings.rewards or ()), **result.extra})

    def eval_step(self, batch: Batch) -> tuple[float, int]:
        """Returns the sum of the completions' negative rewards, and their number: the validation loss is the negative
        mean reward."""
        assert isinstance(batch, CompletionBatch)
        return -float(batch.rewards.sum(dtype=np.float64)), batch.rewards.size

    def _count(self, batch: Batch) -> int:
        assert isinstance(batch, CompletionBatch)
        return batch.advantages.size

    def _slice(self, batch: Batch, i: int, worker: int) -> MicroBatchSlice:
        """A worker's completions of micro-batch `i`: inputs and targets [b, L], and [4, b, L]: log-probabilities under
        the weights that sampled them and under the reference model, advantages and weights."""
        assert isinstance(batch, CompletionBatch)
        is_masked = (batch.truncated > 0) & self._settings.mask_truncated_completions
        weights = token_weights(np.where(is_masked, 0, batch.lengths), self._settings)
        used = used_length(batch.targets[i])
        inputs, targets, old, reference = (
            self._part(x[i], worker)[:, :used]
            for x in (batch.inputs, batch.targets, batch.old_log_probs, batch.ref_log_probs)
        )
        by_row = (self._part(x[i], worker)[:, None] for x in (batch.advantages, weights))
        extra = np.stack([old, reference, *(np.broadcast_to(x, old.shape) for x in by_row)])
        return mx.array(inputs), mx.array(targets), mx.array(extra)

    def _objective(self, targets: mx.array, extra: mx.array | None) -> Objective:
        assert extra is not None
        scored = targets >= 0
        old, reference, advantages, weights = (extra[i] for i in range(4))

        def objective(log_probs: mx.array) -> tuple[mx.array, mx.array]:
            # The first step after sampling has the weights that sampled: a ratio of exactly 1.
            before = log_probs if self._settings.num_iterations == 1 else old
            result = grpo(CompletionTokens(log_probs, before, reference, advantages), self._settings)
            metrics = [weights * result.losses, mx.ones_like(log_probs), -log_probs, result.clipped, result.kl]
            sums = mx.stack([mx.sum(mx.where(scored, x, 0.0)) for x in metrics])
            return sums, mx.where(scored, weights * result.grads, 0.0)

        return objective

    def _named_metrics(self, others: list[float]) -> dict[str, float]:
        """Means over tokens: an estimate of the entropy, the fraction that is clipped, and the KL divergence."""
        tokens, *sums = others
        entropy, clipped, kl = (x / max(tokens, 1e-9) for x in sums)
        return {"entropy": entropy, "clip_ratio": clipped} | ({"kl": kl} if self._settings.beta else {})

    # ---- Checkpoints ----

    def state(self) -> dict[str, npt.NDArray[Any]]:
        state = super().state()
        if self.completions is not None and self._settings.num_iterations > 1:
            first, batch = self.completions
            state[f"{_SAVED}first"] = np.array([first])
            state |= {f"{_SAVED}{name}": array for name, array in vars(batch).items() if array is not None}
        return state

    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None:
        saved = {name.removeprefix(_SAVED): array for name, array in state.items() if name.startswith(_SAVED)}
        super().load_state({name: array for name, array in state.items() if not name.startswith(_SAVED)})
        self.completions = (int(saved.pop("first")[0]), CompletionBatch(**saved)) if saved else None
