"""A model loaded for inference."""

import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from anarchobot.config.schema import Config, ModelConfig
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.model.frozen import inference_weights
from anarchobot.model.gradient_accumulator import Params
from anarchobot.numerics.device import on_cpu
from anarchobot.tokenizers.tokenizer import Tokenizer
from anarchobot.training.device import wire_memory


@dataclass(frozen=True)
class Model:
    """Parameters, model configuration and tokenizer. Computes in the dtype of the parameters."""

    params: Params
    config: ModelConfig
    tokenizer: Tokenizer

    @property
    def bos_id(self) -> int:
        """The token that starts a text: model.bos_id, or the end-of-document token, as in the shards."""
        return self.tokenizer.eod_id if self.config.bos_id is None else self.config.bos_id


def load_model(path: str | Path) -> tuple[Model, Config]:
    """Loads a model and its training configuration from a run folder, a step folder or a file in it, or a Hugging Face
    or MLX model folder. Prints warnings to stderr.

    The dtype is float32 on a CPU; on a GPU it is train.precision, or bfloat16. Raises UserError if there is no model,
    it is damaged or has only adapters, or its tokenizer is missing.
    """
    pretrained = load_pretrained(str(path))
    for warning in pretrained.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    dtype = mx.float32 if on_cpu() else getattr(mx, pretrained.config.train.precision or "bfloat16")
    wire_memory()
    params = inference_weights(pretrained.weights, pretrained.model, dtype)
    return Model(params, pretrained.model, pretrained.tokenizer), pretrained.config
