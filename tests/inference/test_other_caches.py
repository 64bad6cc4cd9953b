"""Continuous batching of models that mlx-lm computes, whose caches are of other types."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.inference.batching import Batch
from anarchobot.model.mlx_lm import architecture
from anarchobot.model.mlx_lm.folder import FolderWeights
from anarchobot.model.mlx_lm.frozen import frozen_weights
from tests.model.mlx_lm.families import CONFIGS, VOCAB, mlx_lm_module, write_model

SETTINGS = GenerationConfig(method="greedy", max_new_tokens=6)
PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8], [9], [40, 41, 42, 43]]


def greedy(folder: Path, prompt: list[int]) -> list[int]:
    """By mlx-lm's module, without a cache."""
    module, ids = mlx_lm_module(folder), list(prompt)
    for _ in range(SETTINGS.max_new_tokens):
        ids.append(int(mx.argmax(module(mx.array([ids]))[0, -1])))
    return ids[len(prompt) :]


def batched(batch: Batch) -> list[list[int]]:
    """The tokens of PROMPTS, which join one after the other while earlier ones are generated, and leave early."""
    waiting, texts = list(PROMPTS), {}
    while waiting or batch:
        if waiting:
            texts[batch.insert(waiting.pop(0), SETTINGS, ())] = []
        for output in batch.step():
            assert output.token is not None
            texts[output.request].append(output.token)
    return list(texts.values())


@pytest.mark.parametrize("can_batch", [True, False], ids=["batched", "one at a time"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_the_module(
    tmp_path: Path, name: str, can_batch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path, CONFIGS[name])
    model = ModelConfig(architecture="mlx_lm", **architecture.from_hf(CONFIGS[name], "config.json"))
    weights = FolderWeights(folder)
    params = frozen_weights(weights, weights.note(model), mx.float32)
    if not can_batch:
        monkeypatch.setattr("anarchobot.model.mlx_lm.forward.can_batch", lambda params, model: False)
    batch = Batch(params, model)
    assert batch._max_rows == (16 if can_batch else 1)
    assert batched(batch) == [greedy(folder, prompt) for prompt in PROMPTS]


def test_rows_without_a_token_are_not_sampled(tmp_path: Path) -> None:
    """The module has more rows than the tokenizer has tokens."""
    folder = write_model(tmp_path, CONFIGS["experts"])
    config = json.loads((folder / "config.json").read_text())
    model = ModelConfig(architecture="mlx_lm", **architecture.from_hf(config, "config.json"))
    params = frozen_weights(FolderWeights(folder), model, mx.float32)
    few = model.model_copy(update={"vocab_size": VOCAB // 4})
    batch = Batch(params, few)
    settings = GenerationConfig(method="random", temperature=5.0, max_new_tokens=60)
    batch.insert([1, 2, 3], settings, ())
    tokens = [output.token for _ in range(80) for output in batch.step()]
    assert len(tokens) == 60 and max(token for token in tokens if token is not None) < VOCAB // 4
    assert np.unique(np.array(tokens)).size > 10
