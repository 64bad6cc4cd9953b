"""The memory of grpo beside that of the training step: the reference model, and sampling completions. No MLX here."""

import math
from collections.abc import Mapping

from anarchobot.config.schema import Config
from anarchobot.model.parameters import parameter_shapes

MAX_ROWS = 64  # completions that are sampled together
_LOGITS = 6  # arrays of the size of the logits in a step of sampling: filtered, with noise, sorted, and their inputs


def reference_bytes(config: Config, trained: Mapping[str, tuple[int, ...]], itemsize: int) -> int:
    """The initial values of the parameters `trained`, which the reference model keeps; 0 without one."""
    if config.grpo.rewards is None or config.grpo.beta == 0:
        return 0
    return (itemsize if config.lora.r is None else 4) * sum(map(math.prod, trained.values()))


def sampling_bytes(config: Config, itemsize: int) -> int:
    """At the peak of sampling: a copy of weights that are not in the dtype of the step, the keys and values of all
    rows, one of whose layers is copied when a row joins or ends, and the logits."""
    model, train = config.model, config.train
    rows = min(MAX_ROWS, train.micro_batch_size * train.grad_accum_steps)
    weights = sum(map(math.prod, parameter_shapes(model).values()))
    copied = itemsize * weights if config.lora.r is None and itemsize < 4 else 0
    keys_and_values = 2 * itemsize * rows * config.data.seq_len * model.kv_heads * model.head_size
    return copied + (model.n_layers + 1) * keys_and_values + 4 * _LOGITS * rows * model.vocab_size
