"""A small random model, and models of other families."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.exchange import safetensors_file
from anarchobot.exchange.exporting import hf_config
from anarchobot.inference.generation import prompt_ids, stream_token_ids
from anarchobot.inference.model import Model
from anarchobot.model.parameters import init_parameters, parameter_shapes
from anarchobot.tokenizers.tokenizer import load_tokenizer
from tests.tiny import VOCAB
from tests.tokenizers.families import make_family

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


def family_model(name: str, folder: Path, says: str, max_seq_len: int = 256) -> Path:
    """A family's folder with a model that says one token whatever it is asked."""
    make_family(name, folder)
    tokenizer = load_tokenizer(folder)
    model = ModelConfig(
        vocab_size=tokenizer.vocab_size, n_layers=1, d_model=8, n_heads=1, max_seq_len=max_seq_len, tie_embeddings=False
    )
    zeros = {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(model).items()}
    zeros["model.embed_tokens.weight"] += 1  # each position is a vector of ones, which the blocks don't change
    zeros["model.norm.weight"] += 1
    zeros["lm_head.weight"][tokenizer.backend.token_to_id(says)] = 1  # type: ignore[attr-defined]
    safetensors_file.write(folder / "model.safetensors", zeros, "float32", {"format": "pt"})
    ends = json.loads((folder / "config.json").read_text())
    shape = hf_config(model, None, [0], "float32")
    del shape["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(shape | ends))
    return folder
