"""A model loaded for inference."""

import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from anarchobot.config.schema import Config, ModelConfig
from anarchobot.exchange.pretrained import PretrainedModel, load_with_adapter
from anarchobot.model.frozen import adapter_constants, frozen_weights, inference_weights
from anarchobot.model.gradient_accumulator import Params
from anarchobot.numerics.device import on_cpu
from anarchobot.tokenizers.tokenizer import ChatTokenizer, text_start
from anarchobot.training.device import wire_memory


@dataclass(frozen=True)
class Model:
    """Parameters, model configuration and tokenizer. Computes in the dtype of the parameters."""

    params: Params
    config: ModelConfig
    tokenizer: ChatTokenizer

    @property
    def bos_id(self) -> int:
        """The token before a scored text: model.bos_id, or the end-of-document token, as in the shards."""
        return next(iter(text_start(self.tokenizer, self.config.bos_id)), self.tokenizer.eod_id)


def load_model(path: str | Path, base_model: str | None = None) -> tuple[Model, Config]:
    """Loads a model and its training configuration from a run folder, a step folder or a file in it, or a Hugging Face
    or MLX model folder; or adapters, which are applied to their base model (exchange/pretrained.py). Prints warnings to
    stderr.

    The dtype is float32 on a CPU; on a GPU it is train.precision, or bfloat16. Raises UserError if there is no model,
    it is damaged, or its tokenizer is missing.
    """
    pretrained = load_with_adapter(str(path), base_model)
    for warning in pretrained.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return to_device(pretrained), pretrained.config


def to_device(pretrained: PretrainedModel) -> Model:
    """The model with its parameters as MLX arrays, in the dtype of `load_model`."""
    dtype = mx.float32 if on_cpu() else getattr(mx, pretrained.config.train.precision or "bfloat16")
    wire_memory()
    return Model(_load_params(pretrained, dtype), pretrained.model, pretrained.tokenizer)


def _load_params(pretrained: PretrainedModel, dtype: mx.Dtype) -> Params:
    """The weights in `dtype` and, in float32, the adapters. If lora.quantize quantized the base in training, it is
    quantized here too."""
    weights, model, adapter = pretrained.weights, pretrained.model, pretrained.adapter
    if adapter is None:
        return inference_weights(weights, model, dtype)
    if adapter.quantization is None:
        params = inference_weights(weights, model, dtype)
    else:
        bits, trained_dtype = adapter.quantization
        params = frozen_weights(weights, model, getattr(mx, trained_dtype), bits)
        params = {name: p.astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p for name, p in params.items()}
    params |= adapter_constants(params, model, adapter.scales, adapter.dora)
    params |= {name: mx.array(array) for name, array in adapter.weights.items()}
    mx.eval(params)
    return params
