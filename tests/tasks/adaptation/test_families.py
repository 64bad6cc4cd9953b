"""adapt-vocab on models that mlx-lm computes."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.errors import UserError
from anarchobot.config.loading import load
from anarchobot.config.schema import ModelConfig
from anarchobot.data.sources import builtin
from anarchobot.exchange.exporting import export
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.inference.model import load_model
from anarchobot.model.architecture import forward_pass
from anarchobot.model.loss import logits
from anarchobot.runs import checkpoint
from anarchobot.tasks.adaptation.checks import check
from anarchobot.tasks.adaptation.initialization import adapted_config
from anarchobot.tasks.adaptation.pipeline import adapt_vocab
from anarchobot.tokenizers.canonical_tokens import canonical_tokens
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer
from anarchobot.vocab.token_alignment import shared_ids
from tests.model.mlx_lm.families import CONFIGS, write_model
from tests.tasks.adaptation.world import make_world, write_config

ROWS = 408  # in the models, whose tokenizer has 400 tokens


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("world"))
    train_tokenizer(list(builtin.topics())[-4:], world / "target", 380)
    return world


def our_logits(path: Path, ids: np.ndarray) -> np.ndarray:
    """[L, V] for one sequence."""
    model, _ = load_model(path)
    hidden = forward_pass(model.config).hidden_states(model.params, mx.array(ids[None]), model.config, dtype=mx.float32)
    return np.array(logits(hidden, model.params, model.config)).reshape(len(ids), -1)


def weights(folder: Path) -> dict[str, np.ndarray]:
    found = checkpoint.find(folder, files=(checkpoint.MODEL_FILE,))
    with np.load(found.folder / "model.npz", allow_pickle=False) as arrays:
        return dict(arrays)


SLOW = ("state space", "hybrid")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.faults] if name in SLOW else []) for name in CONFIGS]
)
def test_a_family_that_mlx_lm_computes(name: str, world: Path, tmp_path: Path) -> None:
    """Before training, shared tokens have the logits that they had; stage 1 trains embedding and head alone."""
    model, root = tmp_path / "model", tmp_path / "r"
    export(world / "model", "mlx", model)
    write_model(model, {**CONFIGS[name], "vocab_size": ROWS})
    config: dict[str, Any] = {
        "models": {"source_model": str(model), "target_tokenizer": str(world / "target.model")},
        "alignment": {"method": "pieces"},
        "evaluation": {"enabled": False, "qa": None},
        "vocab_adaptation": {"stage1_steps": 2, "stage2_steps": 2, "stage2_use_lora": name == "experts"},
    }
    report = adapt_vocab(load(write_config(world, root, **config), [], AdaptConfig), quiet=True)
    assert report["finished"]
    source, target = (canonical_tokens(load_tokenizer(path)) for path in (model, root / "result"))
    old_ids = shared_ids(source, target)
    new_ids = np.flatnonzero(old_ids >= 0)
    old_ids = old_ids[new_ids]
    assert 250 < len(new_ids) < 380
    before = our_logits(model, old_ids[:50])
    after = our_logits(root / "initial", new_ids[:50])
    assert after.shape == (50, 380)
    np.testing.assert_allclose(after[:, new_ids], before[:, old_ids], atol=1e-4)
    initial, first, result = (weights(root / stage) for stage in ("initial", "stage1", "result"))
    by_token = {key for key, array in initial.items() if 380 in array.shape}
    assert len(by_token) in (1, 2)
    assert {key for key, array in initial.items() if not np.array_equal(array, first[key])} == by_token
    assert any(not np.array_equal(first[key], array) for key, array in result.items() if key not in by_token)
    assert our_logits(root / "result", new_ids[:50]).shape == (50, 380)


@pytest.mark.parametrize(("bos_id", "adapted"), [(None, None), (-1, -1), (7, 1)])
def test_bos_is_that_of_the_target_tokenizer(bos_id: int | None, adapted: int | None, world: Path) -> None:
    """-1 is none, which stays none; other ids change with the tokenizer (1 is SentencePiece's <s>)."""
    base = load_pretrained(str(world / "model"))
    model = base.model.model_copy(update={"bos_id": bos_id})
    base = replace(base, config=base.config.model_copy(update={"model": model}))
    assert adapted_config(base, load_tokenizer(world / "target.model")).bos_id == adapted


EMBEDDINGS_PER_LAYER = {
    "model_type": "gemma4_text", "vocab_size": 96, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 4,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_kv_shared_layers": 0, "head_dim": 8,
    "global_head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
OTHER_KEY = {
    "model_type": "phixtral", "num_vocab": 96, "model_dim": 32, "num_heads": 4, "num_layers": 2, "rotary_dim": 4
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EMBEDDINGS_PER_LAYER, "gemma4_text: each block has embeddings of tokens too: its vocabulary can't be changed"),
        (OTHER_KEY, "phixtral: its vocabulary can't be changed: vocab_size in config.json does not set it"),
    ],
    ids=["embeddings per layer", "other key"],
)
def test_a_vocabulary_that_cannot_be_changed(config: dict[str, Any], message: str, world: Path, tmp_path: Path) -> None:
    model = load_pretrained(str(world / "model"))
    refused = ModelConfig(architecture="mlx_lm", hf_config=json.dumps(config), vocab_size=model.tokenizer.vocab_size)
    base = replace(model, config=model.config.model_copy(update={"model": refused}))
    loaded = load(write_config(world, tmp_path / "r"), [], AdaptConfig)
    with pytest.raises(UserError, match=rf"r\.yaml:\d+: models\.source_model: .*model.*: {re.escape(message)}"):
        check(loaded, base)
