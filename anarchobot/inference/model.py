"""A model that is ready for use."""

import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from anarchobot.config.schema import Config, ModelConfig
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.model.gradient_accumulator import Params
from anarchobot.numerics.elementary import on_cpu
from anarchobot.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Model:
    """Parameters, their shape and the tokenizer they were trained with: all that generation needs. It computes in the
    dtype that its parameters have."""

    params: Params
    shape: ModelConfig
    tokenizer: Tokenizer

    @property
    def begin(self) -> int:
        """The token that a text begins with: an end of document, as in the shards, or model.bos_id."""
        return self.tokenizer.eod_id if self.shape.bos_id is None else self.shape.bos_id


def load_model(path: str | Path) -> tuple[Model, Config]:
    """The model at `path` and the config it was trained with: a run folder, a step folder or a file in it, or a
    Hugging Face (or MLX) model's folder. Warnings go to stderr.

    float32 on a CPU; on a GPU train.precision, or bfloat16. Raises UserError when there is no model, it is damaged or
    adapters alone, or its tokenizer is gone.
    """
    base = load_pretrained(str(path))
    for text in base.warnings:
        print(f"warning: {text}", file=sys.stderr)
    dtype = mx.float32 if on_cpu() else getattr(mx, base.config.train.precision or "bfloat16")
    params = {name: mx.array(array).astype(dtype) for name, array in base.weights.items()}
    mx.eval(params)
    return Model(params, base.model, base.tokenizer), base.config
