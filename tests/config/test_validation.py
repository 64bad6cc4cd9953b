"""Conflicting settings: which line is reported, with which message."""

from pathlib import Path

import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.loading import load_config
from anarchobot.config.schema import Config
from anarchobot.config.validation import conflicts

CONFLICTS = {
    "model:\n  d_model: 100\n  n_heads: 12\n": (
        "c.yaml:2: model.d_model: d_model (100) must be divisible by n_heads (12), or set head_dim"
    ),
    "model:\n  n_layers: 2\n  n_heads: 7\n": (
        "c.yaml:3: model.n_heads: d_model (768) must be divisible by n_heads (7), or set head_dim"
    ),
    "model:\n  d_model: 36\n": (
        "c.yaml:2: model.d_model: the head width (3) must be even: rotary embeddings rotate pairs"
    ),
    "model:\n  d_model: 36\n  head_dim: 5\n": (
        "c.yaml:3: model.head_dim: the head width (5) must be even: rotary embeddings rotate pairs"
    ),
    "model:\n  n_kv_heads: 5\n": (
        "c.yaml:2: model.n_kv_heads: n_heads (12) must be divisible by n_kv_heads (5)"
    ),
    "model:\n  n_kv_heads: 24\n": (
        "c.yaml:2: model.n_kv_heads: n_heads (12) must be divisible by n_kv_heads (24)"
    ),
    "model:\n  bos_id: 9\n  vocab_size: 9\n": "c.yaml:2: model.bos_id: bos_id (9) must be below model.vocab_size (9)",
    "model:\n  rope_scaling: {factor: 8}\n": (
        "c.yaml:2: model.rope_scaling.factor: has no effect without type: set it"
    ),
    "model:\n  rope_scaling:\n    type: linear\n    factor: 2\n    beta_fast: 8\n": (
        "c.yaml:5: model.rope_scaling.beta_fast: has no effect with type: linear: remove it"
    ),
    "model:\n  rope_scaling:\n    type: llama3\n": (
        "c.yaml:3: model.rope_scaling.type: llama3 requires original_max_seq_len"
    ),
    "model:\n  rope_scaling: {type: longrope, original_max_seq_len: 8, long_factor: []}\n": (
        "c.yaml:2: model.rope_scaling.type: longrope requires long_factor"
    ),
    "model:\n  head_dim: 4\n  rope_scaling:\n    type: longrope\n    original_max_seq_len: 8\n"
    "    short_factor: [1, 2]\n    long_factor: [1, 2, 3]\n": (
        "c.yaml:7: model.rope_scaling.long_factor: long_factor must have one number per rotated pair (2), but has 3"
    ),
    "model:\n  rope_scaling:\n    type: llama3\n    original_max_seq_len: 8\n    low_freq_factor: 4\n": (
        "c.yaml:5: model.rope_scaling.low_freq_factor: high_freq_factor (4) must be above low_freq_factor (4)"
    ),
    "model:\n  rope_theta: 1\n  rope_scaling: {type: yarn, original_max_seq_len: 8}\n": (
        "c.yaml:2: model.rope_theta: yarn requires rope_theta (1) above 1"
    ),
    "model:\n  rotary_fraction: 0.08\n": (
        "c.yaml:2: model.rotary_fraction: the rotated part of a head (5 of 64) must be even and above 0: rotary "
        "embeddings rotate pairs"
    ),
    "model:\n  n_layers: 2\n  layer_types: [full_attention]\n": (
        "c.yaml:2: model.n_layers: layer_types must have one entry per block (2), but has 1"
    ),
    "model:\n  n_layers: 1\n  layer_types: [sliding_attention]\n": (
        "c.yaml:3: model.layer_types: sliding_attention requires model.sliding_window"
    ),
    "model:\n  rope_local_theta: 5\n": (
        "c.yaml:2: model.rope_local_theta: has no effect: no block has a sliding window"
    ),
    "model:\n  sliding_window: 5\n  n_layers: 1\n  layer_types: [full_attention]\n": (
        "c.yaml:2: model.sliding_window: has no effect: no block has a sliding window"
    ),
    "model:\n  hf_config: '{}'\n": "c.yaml:2: model.hf_config: has no effect with architecture: llama: remove it",
    "data:\n  seq_len: 5000\n": (
        "c.yaml:2: data.seq_len: data.seq_len (5000) must be at most model.max_seq_len (4096)"
    ),
    "model:\n  max_seq_len: 512\n": (
        "c.yaml:2: model.max_seq_len: data.seq_len (2048) must be at most model.max_seq_len (512)"
    ),
    "data:\n  score_field: q\n": "c.yaml:2: data.score_field: requires data.score_min",
    "data:\n  score_min: 0.0\n": "c.yaml:2: data.score_min: requires data.score_field",
    "train:\n  total_steps: 5\n  epochs: 1\n": (
        "c.yaml:2: train.total_steps: the run length is set more than once: keep one of train.total_steps, "
        "train.epochs"
    ),
    "train:\n  token_budget: 5\n  epochs: 1\n  total_steps: 50000\n": (
        "c.yaml:2: train.token_budget: the run length is set more than once: keep one of train.token_budget, "
        "train.epochs, train.total_steps"
    ),
    "train:\n  lr: 1e-5\n": "c.yaml:2: train.lr: min_lr (3e-05) must be at most lr (1e-05)",
    "train:\n  min_lr: 1\n  lr: 0.5\n": "c.yaml:2: train.min_lr: min_lr (1) must be at most lr (0.5)",
    "train:\n  lr_decay_steps: 1000\n": (
        "c.yaml:2: train.lr_decay_steps: lr_decay_steps (1000) must be above warmup_steps (1000)"
    ),
    # Of two conflicts, the first in the file is reported, whatever the order of the schema.
    "train:\n  lr: 1e-5\nmodel:\n  n_heads: 7\n": "c.yaml:2: train.lr: min_lr (3e-05) must be at most lr (1e-05)",
    "lora: {alpha: 3, dora: true}\n": (
        "c.yaml:1: lora.alpha: has no effect without lora.r: set it (such as lora.r=8), or remove the lora section"
    ),
    "lora:\n  r: 8\n  target_modules: [q_proj, fc1]\n": (
        "c.yaml:3: lora.target_modules: 'fc1': the MLP is gated; use gate_proj, up_proj or down_proj"
    ),
    "lora:\n  r: 8\n  target_modules: [q_porj]\n": (
        "c.yaml:3: lora.target_modules: unknown matrix 'q_porj'; did you mean 'q_proj'?"
    ),
    "lora:\n  r: 8\n  target_modules: [embed_tokens]\n": (
        "c.yaml:3: lora.target_modules: unknown matrix 'embed_tokens'; expected q_proj, k_proj, v_proj, o_proj, "
        "gate_proj, up_proj, down_proj"
    ),
    "lora:\n  r: 8\n  target_modules: [q_proj, q_proj]\n": "c.yaml:3: lora.target_modules: duplicate name",
    "lora: {r: 8, num_layers: 13}\n": (
        "c.yaml:1: lora.num_layers: num_layers (13) must be at most model.n_layers (12)"
    ),
    "model: {d_model: 96, n_heads: 6}\nlora: {r: 8, quantize: 4}\n": (
        "c.yaml:1: model.d_model: quantization requires d_model (96) to be a multiple of 64: remove "
        "lora.quantize"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), CONFLICTS.items(), ids=[m[:45] for m in CONFLICTS.values()])
def test_conflicts_in_a_file(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_config("c.yaml")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.epochs=1", "train.total_steps=5"],
            "command line: train.epochs: the run length is set more than once: keep one of train.epochs, "
            "train.total_steps",
        ),
        (["model.n_heads=5"], "command line: model.n_heads: d_model (96) must be divisible by n_heads (5), or set "
                              "head_dim"),
        (["train.warmup_steps=900"], "command line: train.warmup_steps: lr_decay_steps (800) must be above "
                                     "warmup_steps (900)"),
    ],
)  # fmt: skip
def test_an_override_is_blamed_before_the_file(overrides: list[str], message: str, tmp_path: Path) -> None:
    """The file is valid by itself, so its lines would be the wrong place to look."""
    file = tmp_path / "c.yaml"
    file.write_text("model:\n  d_model: 96\n  n_heads: 6\ntrain:\n  lr_decay_steps: 800\n  warmup_steps: 100\n")
    load_config(file)
    with pytest.raises(UserError) as error:
        load_config(file, overrides)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "text",
    [
        "model: {d_model: 100, n_heads: 12, head_dim: 8}",  # with head_dim, any width
        "model: {n_kv_heads: 1}",
        "model: {rotary_fraction: 0.75, rope_scaling: {type: yarn, original_max_seq_len: 2}, sliding_window: 1}",
        "model: {n_layers: 2, sliding_window: 9, layer_types: [sliding_attention, full_attention]}",
        "data: {seq_len: 4096}",
        "data: {score_field: q, score_min: 0}",
        "train: {min_lr: 1e-3, lr: 1e-3}",
        "train: {lr_decay_steps: 1001}",
        "train: {total_steps: 5, epochs: null, token_budget: null}",
        "lora: {r: 4, num_layers: 12, target_modules: [v_proj], quantize: 8}",
        "lora: {alpha: 16.0, target_modules: auto}",  # as in a serialized config
    ],
)
def test_compatible_settings_are_accepted(text: str, tmp_path: Path) -> None:
    """Includes the limits: `<` instead of `<=` would reject them."""
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert load_config(file).sources


def test_the_defaults_have_no_conflicts() -> None:
    """The loader relies on it: each conflict involves a key that was set."""
    assert list(conflicts(Config(), [])) == []
