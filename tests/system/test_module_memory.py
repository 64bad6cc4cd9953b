"""The estimate for a model that mlx-lm computes beside MLX's peak."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from anarchobot.data.windows import Batch
from anarchobot.model.mlx_lm import architecture
from anarchobot.model.mlx_lm.folder import FolderWeights
from anarchobot.system.memory import estimate
from anarchobot.training.mlx_engine import MLXEngine
from tests.model.mlx_lm.families import CONFIGS, write_model

SIZES = {
    "vocab_size": 4000, "hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 32,
}  # fmt: skip


@pytest.mark.usefixtures("without_garbage")
@pytest.mark.parametrize(("checkpointing", "most"), [(False, 1.2), (True, 1.75)])
def test_estimate_is_near_the_peak(tmp_path: Path, checkpointing: bool, most: float) -> None:
    """With gradient checkpointing it is an upper bound: MLX computes fewer blocks ahead in small models."""
    folder = write_model(tmp_path, {**CONFIGS["experts"], **SIZES})
    values = json.loads((folder / "config.json").read_text())
    model = ModelConfig(architecture="mlx_lm", **architecture.from_hf(values, "config.json"))
    train = TrainConfig(
        micro_batch_size=8, grad_accum_steps=1, device="cpu", gradient_checkpointing=checkpointing, optimizer="adamw"
    )
    config = Config(model=model, train=train, lora=LoraConfig(r=4), data=DataConfig(seq_len=128))
    others = mx.get_active_memory()
    engine = MLXEngine(config, FolderWeights(folder))  # type: ignore[arg-type]
    ids = np.random.default_rng(0).integers(0, 4000, (1, 8, 129)).astype(np.int32)
    batch = Batch(ids[..., :-1], ids[..., 1:])
    engine.train_step(batch, 1, 1e-3, 0.9)
    mx.reset_peak_memory()
    for step in (2, 3, 4):
        engine.train_step(batch, step, 1e-3, 0.9)
    peak = mx.get_peak_memory() - others
    assert 0.9 < estimate(config).peak / peak < most
