"""sft and dpo on models that mlx-lm computes."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.exchange.exporting import export
from anarchobot.exchange.fusing import fuse
from anarchobot.inference.model import load_model
from anarchobot.model.architecture import forward_pass
from anarchobot.model.loss import logits
from anarchobot.runs import checkpoint
from anarchobot.tasks.dpo import dpo
from anarchobot.tasks.sft import sft
from tests.model.mlx_lm.families import CONFIGS, mlx_lm_module, write_model
from tests.tasks.test_pretrain import assert_same_state
from tests.tasks.tuning import base as base
from tests.tasks.tuning import chats as chats
from tests.tasks.tuning import events, tuning
from tests.tasks.tuning import preferences as preferences
from tests.tiny import VOCAB

IDS = np.random.default_rng(0).integers(0, VOCAB, (1, 20)).astype(np.int32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, Path]:
    """Folders with the tokenizer of `base` and random weights."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("experts", "state space"):
        export(base, "mlx", folder / name)
        write_model(folder / name, {**CONFIGS[name], "vocab_size": VOCAB})
    return {name: folder / name for name in ("experts", "state space")}


def our_logits(path: Path) -> np.ndarray:
    model, _ = load_model(path)
    hidden = forward_pass(model.config).hidden_states(model.params, mx.array(IDS), model.config, dtype=mx.float32)
    return np.array(logits(hidden, model.params, model.config))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("experts", {"lora__r": 4, "lora__dropout": 0.1}), ("state space", {"train__gradient_checkpointing": True})],
    ids=["LoRA on experts", "all weights of a state-space model"],
)
def test_resumed_run_equals_uninterrupted_run(
    tmp_path: Path, models: dict[str, Path], chats: Path, name: str, settings: dict[str, Any]
) -> None:
    settings = {**settings, "train__total_steps": 6}
    sft(tuning(tmp_path, "whole", models[name], chats, **settings), show="nothing")
    sft(tuning(tmp_path, "broken", models[name], chats, **settings | {"train__total_steps": 3}), show="nothing")
    sft(tuning(tmp_path, "broken", models[name], chats, **settings, train__checkpoint_path="auto"), show="nothing")
    assert_same_state(tmp_path / "whole", tmp_path / "broken")
    first, *_, last = (line["val_loss"] for line in events(tmp_path / "whole", "eval"))
    assert last < first
    assert not checkpoint.find(tmp_path / "whole").config.chat.pack


def test_adapters_are_those_of_mlx_lm(tmp_path: Path, models: dict[str, Path], chats: Path) -> None:
    """Used beside the base, fused and exported, and read by mlx-lm, they give the same logits."""
    from mlx_lm.tuner.utils import load_adapters

    sft(tuning(tmp_path, "run", models["experts"], chats, lora__r=4, train__total_steps=3), show="nothing")
    fuse(models["experts"], tmp_path / "run", tmp_path / "fused")
    export(tmp_path / "fused", "mlx", tmp_path / "mlx")
    module = load_adapters(mlx_lm_module(models["experts"]), str(tmp_path / "run" / "adapters"))
    module.eval()
    theirs = np.array(module(mx.array(IDS)))
    assert np.abs(theirs - our_logits(models["experts"])).max() > 0.01
    for path in (tmp_path / "run", tmp_path / "fused", tmp_path / "mlx"):
        np.testing.assert_allclose(our_logits(path), theirs, atol=1e-4)


def test_dpo_on_weights_that_are_quantized_for_training(
    tmp_path: Path, models: dict[str, Path], preferences: Path, base: Path
) -> None:
    wide = tmp_path / "wide"  # enough columns for a group
    export(base, "mlx", wide)
    write_model(wide, {**CONFIGS["experts"], "vocab_size": VOCAB, "hidden_size": 64, "moe_intermediate_size": 64})
    settings = {"lora__r": 4, "lora__quantize": 4, "train__total_steps": 2}
    assert dpo(tuning(tmp_path, "run", wide, preferences, **settings), show="nothing")["finished"]
    fuse(wide, tmp_path / "run", tmp_path / "fused")
    np.testing.assert_allclose(our_logits(tmp_path / "run"), our_logits(tmp_path / "fused"), atol=1e-4)
    difference = np.abs(our_logits(wide) - our_logits(tmp_path / "fused")).max()
    assert difference > 0.01  # the base was quantized


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora__target_modules": ["k_proj", "query"]}, "the model has no matrix 'query': expected q_proj, k_proj"),
        ({"lora__dora": True}, r"lora\.dora: model\.layers\.0\.mlp\.switch_mlp\.\w+ is a stack of experts"),
        ({"lora__adapter_format": "peft"}, r"lora\.adapter_format: peft"),
        ({"train__precision": "bfloat16"}, r"train\.precision: bfloat16: on a CPU, MLX multiplies by experts only in"),
        ({"train__technique": "blocked"}, r"train\.technique: has no effect on models that mlx-lm computes"),
    ],
    ids=str,
)
def test_refused_settings(
    tmp_path: Path, models: dict[str, Path], chats: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sft(tuning(tmp_path, "run", models["experts"], chats, lora__r=4, **settings), show="nothing")
