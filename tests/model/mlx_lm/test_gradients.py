"""Models that mlx-lm computes: logits, losses, gradients and adapters beside mlx-lm's own modules and LoRA layers."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten

from anarchobot.config.schema import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from anarchobot.data.windows import Batch
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.lora import adapted_matrices
from anarchobot.model.loss import logits
from anarchobot.model.mlx_lm import architecture, forward
from anarchobot.model.mlx_lm.folder import FolderWeights
from anarchobot.model.mlx_lm.frozen import frozen_weights
from anarchobot.model.mlx_lm.gradients import loss_and_gradients
from anarchobot.model.mlx_lm.module import network
from anarchobot.model.step_options import MicroBatch, StepOptions
from anarchobot.training.mlx_engine import MLXEngine
from tests.model.mlx_lm.families import CONFIGS, VOCAB, mlx_lm_module, write_model

LENGTH = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("families")
    return {name: write_model(parent / name, config) for name, config in CONFIGS.items()}


def load(folder: Path) -> tuple[ModelConfig, FolderWeights]:
    values, weights = json.loads((folder / "config.json").read_text()), FolderWeights(folder)
    model = ModelConfig(architecture="mlx_lm", **architecture.from_hf(values, "config.json"))
    return weights.note(model), weights


def random_rows(rows: int = 2, length: int = LENGTH, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids [rows, length + 1] and targets with padding of different lengths."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (rows, length + 1)).astype(np.int32)
    targets = ids[:, 1:].copy()
    for row in targets:
        row[int(rng.integers(4, length - 4)) :] = -1
    return ids, targets


def mean_loss(module: Any, ids: mx.array, targets: mx.array) -> mx.array:
    losses = nn.losses.cross_entropy(module(ids).astype(mx.float32), mx.maximum(targets, 0))  # type: ignore[attr-defined]
    return (losses * (targets >= 0)).sum() / (targets >= 0).sum()


def close(ours: Any, theirs: Any, name: str) -> None:
    ours, theirs = np.array(ours), np.array(theirs)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1e-3, np.abs(theirs).max()), rtol=2e-4, err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_module(folders: dict[str, Path], name: str) -> None:
    """In chunks, hidden states and head apart."""
    model, weights = load(folders[name])
    params = frozen_weights(weights, model, mx.float32)
    ids = mx.array(random_rows()[0])
    hidden = forward.hidden_states(params, ids, model, dtype=mx.float32)
    theirs = mlx_lm_module(folders[name])(ids)
    close(logits(hidden, params, model), theirs, name)
    close(forward.head_logits(hidden[0, 3:5], params, model), theirs[0, 3:5], name)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_all_weights_are_those_of_the_module(folders: dict[str, Path], name: str, recompute: bool) -> None:
    model, weights = load(folders[name])
    params = frozen_weights(weights, model, mx.float32)
    ids, targets = (mx.array(array) for array in random_rows())
    batch = MicroBatch(ids[:, :-1], targets, mx.array(1 / int((targets >= 0).sum())))
    loss, ours = loss_and_gradients(params, batch, model, options=StepOptions(recompute=recompute, loss_chunk=5))
    module = mlx_lm_module(folders[name])
    module.train()
    value, gradients = nn.value_and_grad(module, lambda x, t: mean_loss(module, x, t))(ids[:, :-1], targets)
    theirs: dict[str, Any] = dict(tree_flatten(gradients))
    close(loss, value, "loss")
    assert set(ours) == set(theirs)
    for parameter, gradient in theirs.items():
        close(ours[parameter], gradient, parameter)


def test_after_a_call_the_module_refers_to_no_weights(folders: dict[str, Path]) -> None:
    """An update could not reuse their memory."""
    model, weights = load(folders["experts"])
    params = frozen_weights(weights, model, mx.float32)
    net = network(model, params)
    before = {name: id(net.owners[path][key]) for name in params for path, _, key in [name.rpartition(".")]}
    ids, targets = (mx.array(array) for array in random_rows())
    loss_and_gradients(params, MicroBatch(ids[:, :-1], targets, mx.array(1.0)), model)
    after = {name: id(net.owners[path][key]) for name in params for path, _, key in [name.rpartition(".")]}
    assert before == after


# ---- Adapters ----


def engine_for(folder: Path, lora: LoraConfig, **train: Any) -> MLXEngine:
    model, weights = load(folder)
    settings = TrainConfig(
        micro_batch_size=2, grad_accum_steps=1, device="cpu", weight_decay=0.0, max_grad_norm=None, optimizer="adamw",
        **train,
    )  # fmt: skip
    return MLXEngine(Config(model=model, train=settings, lora=lora, data=DataConfig(seq_len=LENGTH)), weights)  # type: ignore[arg-type]


def mlx_lm_losses(folder: Path, lora: LoraConfig, start: Params, steps: int) -> list[float]:
    """The losses of mlx-lm's LoRA layers and MLX's AdamW, from the same adapters."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    module, (model, _) = mlx_lm_module(folder), load(folder)
    module.freeze()
    keys = {name.split(".", 3)[3] for name in adapted_matrices(model, lora)}
    rank: dict[str, Any] = {"rank": lora.r, "scale": lora.alpha / (lora.r or 1), "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(module, len(module.layers), rank, use_dora=lora.dora)
    module.load_weights(list(start.items()), strict=False)
    trained: dict[str, Any] = dict(tree_flatten(module.trainable_parameters()))
    assert set(trained) == set(start)
    optimizer = mlx.optimizers.AdamW(0.01, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.0, bias_correction=True)  # type: ignore[attr-defined]
    module.train()
    value_and_grad = nn.value_and_grad(module, lambda x, t: mean_loss(module, x, t))
    losses = []
    for step in range(steps):
        ids, targets = (mx.array(array) for array in random_rows(seed=step))
        loss, gradients = value_and_grad(ids[:, :-1], targets)
        optimizer.update(module, gradients)
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("experts", {}),
        ("experts", {"dora": True, "target_modules": ["q_proj", "o_proj"]}),
        ("experts, 4 bits", {}),
        ("head inside", {"target_modules": ["query_key_value", "dense"]}),
        ("state space", {}),
        ("hybrid", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", [False, True])
def test_ten_steps_equal_those_of_mlx_lm(
    folders: dict[str, Path], tmp_path: Path, name: str, settings: dict[str, Any], recompute: bool
) -> None:
    folder = folders[name.removesuffix(", 4 bits")]
    if name.endswith("4 bits"):
        folder = quantized(folder, tmp_path / "packed")
    lora = LoraConfig(r=4, **settings)
    engine = engine_for(folder, lora, gradient_checkpointing=recompute)
    start = dict(engine.params)
    losses = []
    for step in range(10):
        ids, targets = random_rows(seed=step)
        losses.append(engine.train_step(Batch(ids[None, :, :-1], targets[None]), step + 1, 0.01, 0.9).loss)
    assert losses == pytest.approx(mlx_lm_losses(folder, lora, start, 10), abs=1e-4)


def quantized(folder: Path, output: Path, dtype: mx.Dtype = mx.float32) -> Path:
    """As mlx_lm.convert writes it, routers in 8 bits."""
    from mlx_lm.utils import quantize_model, save_config, save_model

    module, config = mlx_lm_module(folder), json.loads((folder / "config.json").read_text())
    module.set_dtype(dtype)
    module, config = quantize_model(module, config, 32, 4, quant_predicate=lambda path, layer: eight_bits(path))
    output.mkdir()
    save_model(output, module)
    save_config(config, output / "config.json")
    return output


def eight_bits(path: str) -> bool | dict[str, int]:
    return {"bits": 8, "group_size": 32} if path.endswith("mlp.gate") else "down_proj" not in path  # 24 columns


def test_dropout_is_a_function_of_its_key_also_when_recomputed(folders: dict[str, Path]) -> None:
    gradients = []
    for recompute, key in ((False, 0), (True, 0), (False, 1)):
        engine = engine_for(folders["experts"], LoraConfig(r=4, dropout=0.5))
        params = {name: p + 0.1 for name, p in engine.params.items()}
        ids, targets = (mx.array(array) for array in random_rows())
        batch = MicroBatch(ids[:, :-1], targets, mx.array(1.0), None, mx.random.key(key), 0.5)
        options = StepOptions(recompute=recompute)
        model = load(folders["experts"])[0]
        gradients.append(loss_and_gradients(params, batch, model, frozen=engine.frozen, options=options)[1])
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, name)
    assert any(not np.allclose(gradient, gradients[2][name]) for name, gradient in gradients[0].items())


def test_padding_at_the_end_is_not_computed(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 16 tokens, of which the last 8 or more are padding, are cut to 8, with the same result."""
    ids, targets = random_rows()
    lengths: list[int] = []
    results = []
    for cut in (True, False):
        engine = engine_for(folders["experts"], LoraConfig(r=4))
        if not cut:
            monkeypatch.setattr("anarchobot.training.mlx_engine.LENGTHS", 1)
        micro_step = engine._micro_step

        def record(*args: Any, micro_step: Any = micro_step) -> Any:
            lengths.append(args[2].shape[1])
            return micro_step(*args)

        engine._micro_step = record
        losses = [engine.train_step(Batch(ids[None, :, :-1], targets[None]), i, 0.01, 0.9).loss for i in (1, 2)]
        results.append((losses, engine.eval_step(Batch(ids[None, :, :-1], targets[None]))))
    assert lengths == [8, 8, 16, 16]
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-4)
