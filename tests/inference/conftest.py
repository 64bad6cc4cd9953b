"""A small random model."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.inference.generation import prompt_ids, stream_token_ids
from anarchobot.inference.model import Model
from anarchobot.model.parameters import init_parameters
from anarchobot.tokenizers.tokenizer import load_tokenizer
from tests.tiny import VOCAB

SHAPE = ModelConfig(vocab_size=VOCAB, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, max_seq_len=48)


@pytest.fixture(scope="session")
def model(tiny_shards: Path) -> Model:
    return Model(strong_parameters(SHAPE), SHAPE, load_tokenizer(tiny_shards))


def strong_parameters(shape: ModelConfig) -> dict[str, mx.array]:
    """Large random weights, so that greedy decoding has no near ties."""
    rng = np.random.default_rng(0)
    return {
        n: mx.array(p + rng.standard_normal(p.shape) * 0.3, mx.float32) for n, p in init_parameters(shape, 0).items()
    }


def generate_ids(model: Model, settings: GenerationConfig) -> list[int]:
    context = prompt_ids(model, settings.prompt)
    return list(stream_token_ids(model.params, model.config, context, settings, {model.tokenizer.eod_id}))
