"""The schema compared with a fixed list of keys and defaults, and its JSON Schema."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from anarchobot.config.loading import describe_type, leaf_keys
from anarchobot.config.schema import Config, RopeScaling, TrainConfig
from anarchobot.config.strict_yaml import parse

SHIPPED = sorted((Path(__file__).parents[2] / "configs").rglob("[!a]*.yaml"))  # adapt_*.yaml: test_adapt_schema.py

# Copied by hand: other people rely on these keys and defaults. A change must be made here as well.
STABLE: dict[str, dict[str, Any]] = {
    "model": {
        "vocab_size": 32000, "n_layers": 12, "d_model": 768, "n_heads": 12, "mlp_multiple": 4.0, "dropout": 0.1,
        "max_seq_len": 4096, "rope_theta": 10000.0, "ffn_activation": "silu", "norm_eps": 1e-5, "tie_embeddings": True,
        "n_kv_heads": None, "head_dim": None, "qk_norm": False, "attention_bias": False, "logit_softcap": None,
    },
    "data": {
        "dataset": None, "config": None, "split": "train", "text_field": "text", "seq_len": 2048,
        "shuffle_buffer": 1000, "num_workers": 2, "cache_dir": None, "streaming": True, "shard_dir": "shards",
        "val_fraction": 0.01, "score_field": None, "score_min": None,
    },
    "train": {
        "total_steps": 50000, "epochs": None, "token_budget": None, "micro_batch_size": 1, "grad_accum_steps": 4,
        "lr": 3e-4, "min_lr": 3e-5, "warmup_steps": 1000, "lr_decay_steps": None, "schedule": "cosine",
        "weight_decay": 0.02, "max_grad_norm": 1.0, "optimizer": "muon_adamw", "momentum": 0.95, "log_interval": 25,
        "eval_interval": 500, "eval_batches": 50, "sample_interval": None, "ckpt_interval": 2000, "ckpt_keep": 3,
        "log_path": None, "save_dir": "runs/default", "precision": None, "compile": None,
        "gradient_checkpointing": False, "tokenizer_path": None, "checkpoint_path": None, "seed": 0, "device": "auto",
        "backend": "mlx",
    },
    "knowledge_base": {"path": None, "retrieval_k": 3, "feedback_alpha": 0.1},
}  # fmt: skip

CHOICES = {
    "train.log_to": 'a list of "tensorboard" | "wandb" | "trackio" | "mlflow"',
    "train.technique": '"auto" | "blocked" | "fused" | "sdpa" | "autodiff"',
    "model.architecture": '"llama" | "mlx_lm"',
    "model.rope_scaling.type": '"linear" | "llama3" | "yarn" | "longrope", or null',
    "model.layer_types": 'a list of "full_attention" | "sliding_attention", or null',
    "model.ffn_activation": '"silu" | "gelu"',
    "data.fallback": '"builtin", or null',
    "data.documents": '"file" | "paragraphs" | "lines"',
    "data.pack": '"stream" | "documents"',
    "tokenizer.engine": '"auto" | "fast" | "reference"',
    "tokenizer.on_mismatch": '"stop" | "fallback"',
    "train.micro_batch_size": 'an integer >= 1, or "auto"',
    "train.schedule": '"cosine" | "wsd" | "linear" | "constant"',
    "train.optimizer": '"muon_adamw" | "adamw"',
    "train.muon_scale": '"adamw" | "keller"',
    "train.precision": '"float16" | "bfloat16" | "float32", or null',
    "train.device": '"auto" | "gpu" | "cpu"',
    "train.backend": '"mlx" | "torch"',
    "train.trainable": '"all" | "embeddings"',
    "tokenizer.model_type": '"bpe" | "unigram"',
    "tokenizer.format": '"sentencepiece" | "gpt2"',
    "lora.target_modules": '"auto", or a list of strings',
    "lora.adapter_format": '"mlx" | "peft"',
    "chat.format": '"auto" | "messages" | "sharegpt" | "oasst" | "alpaca" | "prompt_completion" | "text"',
    "chat.train_on": '"assistant" | "all"',
    "chat.too_long": '"cut" | "drop"',
    "distillation.loss": '"forward_kl" | "reverse_kl"',
    "preference.loss": '"sigmoid" | "sigmoid_norm" | "ipo" | "simpo" | "cpo" | "orpo" | "kto"',
    "grpo.rewards": 'a list of "exact_match" | "number" | "regex" | "json_schema" | "function", or null',
    "grpo.loss_type": '"grpo" | "bnpo" | "dr_grpo" | "dapo"',
    "grpo.scale_rewards": '"group" | "batch" | "none"',
    "generation.method": '"greedy" | "top_k" | "nucleus" | "min_p" | "random" | "combined"',
}


@pytest.mark.parametrize(
    ("section", "key", "default"),
    [(section, key, default) for section, keys in STABLE.items() for key, default in keys.items()],
)
def test_stable_defaults(section: str, key: str, default: Any) -> None:
    value = getattr(getattr(Config(), section), key)
    assert value == default
    assert type(value) is type(default)


def test_keys_of_the_stable_sections() -> None:
    stable = {f"{section}.{key}" for section, keys in STABLE.items() for key in keys}
    own = {key for key in leaf_keys() if key.partition(".")[0] in STABLE}
    added_data_keys = {
        "fallback", "weights", "documents", "clean", "min_chars", "max_chars", "dedup", "near_dedup", "shard_weights",
        "pack", "document_mask",
    }  # fmt: skip
    added_train_keys = {
        "decay_fraction", "adamw_lr", "normuon", "muon_split_heads", "muon_scale", "cautious_weight_decay", "ema_decay",
        "attention_block", "loss_chunk", "technique", "cpu_threads", "ckpt_minutes", "supervise", "init_from",
        "patience", "trainable", "first_sequence", "memory_budget_gb", "share_muon", "log_to", "teacher",
    }  # fmt: skip
    added_model_keys = {
        "architecture", "embedding_scale", "bos_id", "rope_local_theta", "rotary_fraction",
        "sliding_window", "layer_types", "attention_scale", "attention_softcap", "post_norms", "hf_config",
        "quantization",
        *(f"rope_scaling.{key}" for key in RopeScaling.model_fields),
    }  # fmt: skip
    assert own - stable == (
        {f"data.{key}" for key in added_data_keys}
        | {f"train.{key}" for key in added_train_keys}
        | {f"model.{key}" for key in added_model_keys}
        | {"knowledge_base.embedding_model"}
    )
    assert stable - own == set()


def test_choices() -> None:
    assert {key: describe_type(info) for key, info in leaf_keys().items() if '"' in describe_type(info)} == CHOICES


@pytest.mark.parametrize("key", leaf_keys())
def test_every_setting_is_described(key: str) -> None:
    description = leaf_keys()[key].description
    assert description
    assert description == description.strip().rstrip(".")
    assert len(description) < 120


def test_derived_sizes() -> None:
    model = Config.model_validate({"model": {"d_model": 96, "n_heads": 6, "mlp_multiple": 2.67}}).model
    assert (model.head_size, model.kv_heads, model.mlp_size) == (16, 6, 256)
    model = Config.model_validate({"model": {"head_dim": 64, "n_kv_heads": 3}}).model
    assert (model.head_size, model.kv_heads) == (64, 3)


def test_a_config_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().train.lr = 1.0


def test_a_serialized_config_has_one_run_length() -> None:
    """With two, loading the config.yaml of the run would fail with a conflict."""
    assert "total_steps" in TrainConfig().model_dump()
    assert "total_steps" not in TrainConfig(epochs=2.0).model_dump()
    assert "total_steps" not in TrainConfig(token_budget=1000).model_dump()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_match_the_json_schema(path: Path) -> None:
    """Editors and the loader must agree."""
    jsonschema.validate(parse(path.read_bytes(), path.name).values, Config.model_json_schema())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"n_layer": 3}}, "'n_layer' was unexpected"),
        ({"modle": {}}, "'modle' was unexpected"),
        ({"model": {"n_layers": "3"}}, "'3' is not of type 'integer'"),
        ({"model": {"n_layers": 0}}, "less than the minimum"),
        ({"train": {"schedule": "cos"}}, "'cos' is not one of"),
        ({"model": {"dropout": 1.0}}, "greater than or equal to the maximum of 1"),
    ],
)
def test_the_json_schema_rejects_invalid_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=message):
        jsonschema.validate(values, Config.model_json_schema())


def test_shipped_configs_are_found() -> None:
    """With an empty glob the parametrized tests would pass."""
    assert "quickstart.yaml" in [path.name for path in SHIPPED]


def test_the_json_schema_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(Config.model_json_schema())
