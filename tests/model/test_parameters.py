"""Names, counts and initial values of the parameters."""

import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from anarchobot.config.loading import load_config
from anarchobot.config.schema import ModelConfig
from anarchobot.model.parameters import init_parameters, parameter_count, parameter_shapes

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("[!a]*.yaml"))  # adapt_*.yaml have no model section


def test_parameter_count_of_the_default_model() -> None:
    """12 blocks of four 768 x 768 and three 768 x 3,072 matrices and two norms; the embedding; the final norm."""
    assert parameter_count(ModelConfig()) == 12 * (4 * 768**2 + 3 * 768 * 3072 + 2 * 768) + 32000 * 768 + 768


def test_parameter_count_reflects_every_shape_setting() -> None:
    model = ModelConfig(
        vocab_size=100, n_layers=1, d_model=12, n_heads=6, n_kv_heads=2, head_dim=4, mlp_multiple=2.5, qk_norm=True,
        tie_embeddings=False,
    )  # fmt: skip
    attention = 24 * 12 + 8 * 12 + 8 * 12 + 12 * 24 + 4 + 4
    assert parameter_count(model) == 2 * 100 * 12 + attention + 3 * 12 * 30 + 2 * 12 + 12


def test_bias_count_and_initial_values() -> None:
    """Qwen2.5-0.5B has 494,032,768 parameters, of which 24 x (896 + 2 x 128) are biases. Biases start at zero."""
    model = ModelConfig(
        vocab_size=151936, n_layers=24, d_model=896, n_heads=14, n_kv_heads=2, mlp_multiple=4864 / 896,
        attention_bias=True,
    )  # fmt: skip
    assert parameter_count(model) == 494_032_768
    small = ModelConfig(vocab_size=10, n_layers=1, d_model=12, n_heads=6, n_kv_heads=2, attention_bias=True)
    biases = {name: p for name, p in init_parameters(small, 0).items() if name.endswith(".bias")}
    prefix = "model.layers.0.self_attn"
    assert {name: p.shape for name, p in biases.items()} == {
        f"{prefix}.q_proj.bias": (12,), f"{prefix}.k_proj.bias": (4,), f"{prefix}.v_proj.bias": (4,)
    }  # fmt: skip
    assert not any(p.any() for p in biases.values())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_state_their_parameter_count(path: Path) -> None:
    count = parameter_count(load_config(path).config.model)
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"{count:,} parameters" in head
    assert yaml.safe_load(path.read_text())["train"]["save_dir"] == f"runs/{path.stem}"


def test_initial_values_have_the_right_deviation_and_depend_only_on_seed_and_name() -> None:
    model = ModelConfig(vocab_size=512, n_layers=3, d_model=128, n_heads=4)
    first = init_parameters(model, 0)
    assert {n: p.shape for n, p in first.items()} == parameter_shapes(model)
    for name, p in first.items():
        assert p.dtype == np.float32
        if p.ndim == 1:
            assert (p == 1).all()
        else:
            wanted = 0.02 / math.sqrt(6) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert p.std() == pytest.approx(wanted, rel=0.02)
            assert abs(p.mean()) < 5 * wanted / math.sqrt(p.size)
    deeper = init_parameters(ModelConfig(vocab_size=512, n_layers=4, d_model=128, n_heads=4), 0)
    name = "model.layers.2.mlp.up_proj.weight"
    np.testing.assert_array_equal(first[name], deeper[name])
    assert np.abs(first[name] - first["model.layers.1.mlp.up_proj.weight"]).max() > 0.01
    assert np.abs(first[name] - init_parameters(model, 1)[name]).max() > 0.01
