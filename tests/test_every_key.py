"""Every key of the schema has an effect: a test here, or a reference to a test elsewhere.

The first test fails if a key has no test, so a setting that nothing reads cannot go unnoticed. `make faults` ignores
each key in turn, and its test must fail then.
"""

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.config.loading import leaf_keys, load_config
from anarchobot.config.schema import Config, GenerationConfig, LoraConfig, ModelConfig
from anarchobot.data.pretokenize import Pretokenizer
from anarchobot.data.shards import read_manifest
from anarchobot.data.sources.documents import Document
from anarchobot.inference.sampling import sample
from anarchobot.model.llama.forward import hidden_states
from anarchobot.model.llama.rope import attention_factor, inverse_frequencies
from anarchobot.model.lora import adapter_scale
from anarchobot.model.loss import logits
from anarchobot.model.parameters import init_parameters, parameter_shapes
from anarchobot.runs import checkpoint
from anarchobot.runs.trackers import TRACKERS
from anarchobot.tasks import engines, pretokenize
from anarchobot.tasks.dpo import dpo
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tasks.sft import sft
from anarchobot.tokenizers.fast_tokenizer import VerifiedTokenizer
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.training.mlx_engine import MLXEngine
from tests.data.conversations.test_oasst import post, tree
from tests.runs.test_trackers import Fake
from tests.tasks.tuning import base as base
from tests.tasks.tuning import events, tuning
from tests.tiny import LEFT_OUT, loaded, make_shards
from tests.tokenizers.test_fast_tokenizer import Broken

ROOT = Path(__file__).parents[1]

SHAPE = {"vocab_size": 40, "n_layers": 2, "d_model": 16, "n_heads": 4, "dropout": 0.0}

# Keys that change parameter shapes: a value, then a parameter and its expected shape.
SHAPED: dict[str, tuple[Any, str, tuple[int, ...] | None]] = {
    "vocab_size": (50, "model.embed_tokens.weight", (50, 16)),
    "n_layers": (3, "model.layers.2.mlp.up_proj.weight", (64, 16)),
    "d_model": (24, "model.norm.weight", (24,)),
    "n_kv_heads": (2, "model.layers.0.self_attn.k_proj.weight", (8, 16)),
    "head_dim": (6, "model.layers.0.self_attn.q_proj.weight", (24, 16)),
    "mlp_multiple": (2.5, "model.layers.0.mlp.gate_proj.weight", (40, 16)),
    "tie_embeddings": (False, "lm_head.weight", (40, 16)),
    "qk_norm": (True, "model.layers.0.self_attn.q_norm.weight", (4,)),
    "attention_bias": (True, "model.layers.0.self_attn.k_proj.bias", (16,)),
    "post_norms": (True, "model.layers.0.mlp_output_layernorm.weight", (16,)),
}

# Keys that change the output for the same parameters, and other settings that they require.
COMPUTED: dict[str, Any] = {
    "n_heads": 2, "ffn_activation": "gelu", "rope_theta": 100.0, "norm_eps": 0.5, "logit_softcap": 0.1,
    "embedding_scale": 7.0, "rotary_fraction": 0.5, "sliding_window": 2,
    "rope_local_theta": 2.0, "layer_types": ["full_attention", "sliding_attention"], "attention_scale": 0.01,
    "attention_softcap": 0.1,
}  # fmt: skip
COMPUTED_WITH: dict[str, Any] = {"rope_local_theta": {"sliding_window": 2}, "layer_types": {"sliding_window": 2}}

# Keys of model.rope_scaling that change the frequencies or the factor: a value, and other settings that they require.
LONGROPE: dict[str, Any] = {
    "type": "longrope", "original_max_seq_len": 8, "short_factor": [1.0] * 16, "long_factor": [3.0] * 16,
}  # fmt: skip
YARN: dict[str, Any] = {"type": "yarn", "original_max_seq_len": 300, "factor": 4.0}
LLAMA3: dict[str, Any] = {"type": "llama3", "original_max_seq_len": 300, "factor": 4.0}
ROTATED: dict[str, tuple[Any, dict[str, Any]]] = {
    "type": ("linear", {"factor": 2.0}),
    "factor": (2.0, {"type": "linear"}),
    "original_max_seq_len": (9, LONGROPE),
    "low_freq_factor": (0.5, LLAMA3),
    "high_freq_factor": (9.0, LLAMA3),
    "beta_fast": (8.0, YARN),
    "beta_slow": (0.01, YARN),
    "truncate": (False, YARN),
    "attention_factor": (0.5, YARN),
    "short_factor": ([2.0] * 16, LONGROPE),
    "long_factor": ([4.0] * 16, LONGROPE),
}

# Keys whose effect shows in a run of six steps: settings, and a condition on the default and the changed run.
TRAINED: dict[str, tuple[dict[str, Any], Any]] = {
    "data.seq_len": ({"data__seq_len": 16}, lambda a, b: b["tokens"] == a["tokens"] / 2),
    "data.pack": ({"data__pack": "documents"}, lambda a, b: a["loss"] != b["loss"]),
    "train.total_steps": ({"train__total_steps": 4}, lambda a, b: b["steps"] == 4),
    "train.token_budget": (
        {"train__total_steps": LEFT_OUT, "train__token_budget": 500},
        lambda a, b: b["steps"] == math.ceil(500 / 128),
    ),
    "train.epochs": (
        {"train__total_steps": LEFT_OUT, "train__epochs": 0.01},
        lambda a, b: b["steps"] == math.ceil(0.01 * b["windows"] / 4),
    ),
    "train.micro_batch_size": ({"train__micro_batch_size": 3}, lambda a, b: b["tokens"] == a["tokens"] * 1.5),
    "train.grad_accum_steps": ({"train__grad_accum_steps": 3}, lambda a, b: b["tokens"] == a["tokens"] * 1.5),
    "train.optimizer": ({"train__optimizer": "adamw"}, lambda a, b: a["moments"] > b["moments"] == {"adamw"}),
    "train.lr": ({"train__lr": 0.02}, lambda a, b: max(b["lrs"]) == 2 * max(a["lrs"])),
    "train.min_lr": ({"train__min_lr": 0.0}, lambda a, b: (a["lrs"][-1], b["lrs"][-1]) == (0.001, 0.0)),
    "train.warmup_steps": ({"train__warmup_steps": 4}, lambda a, b: (a["lrs"][0], b["lrs"][0]) == (0.005, 0.0025)),
    "train.schedule": ({"train__schedule": "constant"}, lambda a, b: b["lrs"][-1] == 0.01 > a["lrs"][-1]),
    "train.lr_decay_steps": ({"train__lr_decay_steps": 4}, lambda a, b: b["lrs"][3:] == [0.001] * 3),
    "train.decay_fraction": (
        {"train__schedule": "wsd", "train__decay_fraction": 1 / 6},
        lambda a, b: b["lrs"][1:5] == [0.01] * 4 and b["lrs"][5] == 0.001,
    ),
    "train.momentum": ({"train__momentum": 0.5}, lambda a, b: a["weights"] != b["weights"]),
    "train.adamw_lr": ({"train__adamw_lr": 0.02}, lambda a, b: a["weights"] != b["weights"]),
    "train.normuon": ({"train__normuon": False}, lambda a, b: a["weights"] != b["weights"]),
    "train.muon_split_heads": ({"train__muon_split_heads": False}, lambda a, b: a["weights"] != b["weights"]),
    "train.muon_scale": ({"train__muon_scale": "keller"}, lambda a, b: b["size"] < a["size"]),
    "train.cautious_weight_decay": (
        {"train__cautious_weight_decay": False}, lambda a, b: a["weights"] != b["weights"],
    ),
    "train.ema_decay": ({"train__ema_decay": 0.9}, lambda a, b: a["val"] != b["val"] and a["loss"] == b["loss"]),
    "train.weight_decay": ({"train__weight_decay": 1.0}, lambda a, b: b["size"] < a["size"]),
    "train.max_grad_norm": ({"train__max_grad_norm": 0.01}, lambda a, b: a["weights"] != b["weights"]),
    "train.precision": ({"train__precision": "bfloat16"}, lambda a, b: 0 < abs(a["loss"] - b["loss"]) < 0.1),
    "train.seed": ({"train__seed": 1}, lambda a, b: a["loss"] != b["loss"]),
    "train.trainable": ({"train__trainable": "embeddings"}, lambda a, b: a["moments"] > b["moments"] == {"adamw"}),
    "train.first_sequence": ({"train__first_sequence": 4}, lambda a, b: a["loss"] != b["loss"]),
    "train.log_interval": ({"train__log_interval": 2}, lambda a, b: b["events"]["train"] == [2, 4, 6]),
    "train.eval_interval": ({"train__eval_interval": 2}, lambda a, b: b["events"]["eval"] == [0, 2, 4, 6]),
    "train.eval_batches": ({"train__eval_batches": 1}, lambda a, b: a["val"] != b["val"]),
    "train.sample_interval": (
        {"train__sample_interval": 3, "generation__max_new_tokens": 1},
        lambda a, b: ("sample" not in a["events"]) and b["events"].get("sample") == [3, 6],
    ),
    "train.ckpt_interval": ({"train__ckpt_interval": 2, "train__eval_interval": 9}, lambda a, b: 2 in b["saved"]),
    "train.ckpt_keep": (
        {"train__ckpt_interval": 1, "train__eval_interval": 9, "train__ckpt_keep": 2},
        lambda a, b: b["kept"] == [5, 6],
    ),
    "model.dropout": ({"model__dropout": 0.0}, lambda a, b: a["loss"] != b["loss"]),
}  # fmt: skip

# Keys of sft and dpo whose effect shows in the losses of one step.
TUNED: dict[str, dict[str, Any]] = {
    "chat.format": {"chat__format": "prompt_completion"},
    "chat.template": {"chat__template": "plain"},
    "chat.train_on": {"chat__train_on": "all"},
    "chat.pack": {"chat__pack": False},
    "chat.too_long": {"chat__too_long": "drop"},
    "preference.loss": {"preference__loss": "ipo"},
}  # fmt: skip

# Keys of sampling: settings, and the ids that are drawn from the probabilities 0.4, 0.3, 0.2, 0.1.
SAMPLED: dict[str, tuple[dict[str, Any], set[int]]] = {
    "generation.method": ({"method": "greedy"}, {0}),
    "generation.temperature": ({"method": "random", "temperature": 0.01}, {0}),
    "generation.top_k": ({"method": "top_k", "top_k": 3}, {0, 1, 2}),
    "generation.top_p": ({"temperature": 1.0, "top_p": 0.65}, {0, 1}),
    "generation.min_p": ({"method": "min_p", "temperature": 1.0, "min_p": 0.6}, {0, 1}),
}

# Keys of the adapters' scale, which is 16 / 16 by default.
SCALED: dict[str, tuple[dict[str, Any], float]] = {
    "lora.alpha": ({"alpha": 8.0}, 8 / 16),
    "lora.rslora": ({"rslora": True}, 16 / math.sqrt(16)),
}

ELSEWHERE = {
    "data.dataset": "tests/data/sources/test_documents.py::test_dataset_can_be_a_list_of_files",
    "data.config": "tests/data/sources/test_hub.py::test_split_and_configuration",
    "data.split": "tests/data/sources/test_hub.py::test_split_and_configuration",
    "data.text_field": "tests/data/sources/test_hub.py::test_rows_become_documents_by_field_and_score",
    "data.score_field": "tests/data/sources/test_rows.py::test_documents_below_the_score_are_filtered",
    "data.score_min": "tests/data/sources/test_rows.py::test_documents_below_the_score_are_filtered",
    "data.weights": "tests/data/sources/test_documents.py::test_mixture_follows_its_weights",
    "data.documents": "tests/data/sources/test_text_files.py::test_paragraphs_are_separated_by_blank_lines",
    "data.clean": "tests/data/sources/test_documents.py::test_text_files_are_cleaned_and_filtered",
    "data.min_chars": "tests/data/sources/test_documents.py::test_each_filter_reason_is_counted",
    "data.max_chars": "tests/data/sources/test_documents.py::test_each_filter_reason_is_counted",
    "data.dedup": "tests/cli/test_data.py::test_settings_reach_the_shards",
    "data.near_dedup": "tests/cli/test_data.py::test_settings_reach_the_shards",
    "data.shuffle_buffer": "tests/data/sources/test_hub.py::test_shuffle_buffer",
    "data.streaming": "tests/data/sources/test_hub.py::test_without_streaming_the_order_is_kept_and_cache_dir_used",
    "data.cache_dir": "tests/data/sources/test_hub.py::test_without_streaming_the_order_is_kept_and_cache_dir_used",
    "data.fallback": "tests/data/sources/test_documents.py::test_fallback_must_be_enabled",
    "data.shard_dir": "tests/tasks/test_pretrain.py::test_several_shard_folders_with_and_without_weights",
    "train.memory_budget_gb": "tests/system/test_micro_batch.py::test_largest_fitting_micro_batch_keeps_the_step",
    "tokenizer.engine": "tests/cli/test_data.py::test_the_tokenizer_engine_is_selectable",
    "model.max_seq_len": (
        "tests/inference/test_generation.py::test_ends_at_max_new_tokens_max_seq_len_and_end_of_document"
    ),
    "model.quantization": "tests/exchange/test_quantized.py::test_logits_are_those_of_mlx_lm_and_nothing_is_unpacked",
    "model.bos_id": "tests/exchange/test_importing.py::test_stories260k_gives_its_logits_and_published_text",
    "train.init_from": "tests/exchange/test_importing.py::test_training_starts_from_the_imported_weights",
    "train.ckpt_minutes": "tests/training/test_loop.py::test_checkpoint_interval_in_minutes",
    "train.supervise": "tests/tasks/test_supervise.py::test_long_runs_are_supervised_by_default",
    "guard.spike_sigma": "tests/training/test_guard.py::test_planted_spikes_are_detected_and_no_others",
    "guard.spike_window": "tests/training/test_guard.py::test_limit_is_mean_plus_six_standard_deviations",
    "guard.rollback_after": "tests/training/test_loop.py::test_run_continues_after_the_bad_data",
    "train.gradient_checkpointing": "tests/training/test_mlx_engine.py::test_gradient_checkpointing_uses_less_memory",
    "train.attention_block": "tests/training/test_mlx_engine.py::test_chunk_and_block_sizes_take_effect",
    "train.technique": "tests/system/test_technique.py::test_a_technique_in_the_configuration_is_used",
    "train.loss_chunk": "tests/training/test_mlx_engine.py::test_chunk_and_block_sizes_take_effect",
    "train.cpu_threads": "tests/training/test_mlx_engine.py::test_threads_split_the_rows_and_give_the_same_result",
    "train.compile": "tests/training/test_traces.py::test_the_number_of_traces_is_that_of_two_steps",
    "train.device": "tests/training/test_mlx_engine.py::test_missing_gpu_is_an_error",
    "train.checkpoint_path": "tests/tasks/test_pretrain.py::test_resumed_run_equals_uninterrupted_run_bit_for_bit",
    "train.tokenizer_path": "tests/tasks/test_pretrain.py::test_mismatches_are_refused_before_anything_is_written",
    "lora.r": "tests/model/test_lora.py::test_adapted_matrices_and_parameter_count",
    "lora.dropout": "tests/training/test_engine_lora.py::test_lora_dropout_affects_training_but_not_validation",
    "lora.target_modules": "tests/model/test_lora.py::test_adapted_matrices_and_parameter_count",
    "lora.num_layers": "tests/model/test_lora.py::test_frozen_weights_cost_no_backward_work",
    "lora.dora": "tests/training/test_engine_lora.py::test_only_adapters_have_state_and_are_saved",
    "lora.adapter_format": "tests/tasks/test_sft.py::test_only_adapters_are_trained_and_saved",
    "lora.quantize": "tests/training/test_engine_lora.py::test_adapters_use_much_less_memory_than_full_training",
    "chat.rouge_samples": "tests/tasks/test_sft.py::test_model_learns_to_answer",
    "preference.beta": "tests/training/test_preference_engine.py::test_loss_and_gradients_match_pytorch",
    "preference.simpo_gamma": "tests/training/test_preference_engine.py::test_loss_and_gradients_match_pytorch",
    "preference.cpo_alpha": "tests/training/test_preference_engine.py::test_loss_and_gradients_match_pytorch",
    "preference.desirable_weight": "tests/training/test_kto_engine.py::test_loss_and_gradients_match_pytorch",
    "preference.undesirable_weight": "tests/training/test_kto_engine.py::test_loss_and_gradients_match_pytorch",
    "preference.label_smoothing": "tests/training/test_preference_engine.py::test_loss_and_gradients_match_pytorch",
    "grpo.rewards": "tests/training/test_rewards.py::test_several_rewards_are_summed_by_weight",
    "grpo.reward_weights": "tests/training/test_rewards.py::test_several_rewards_are_summed_by_weight",
    "grpo.regex": "tests/training/test_rewards.py::test_regex_is_searched_or_compares_its_group_with_the_answer",
    "grpo.json_schema": "tests/training/test_rewards.py::test_json_schema",
    "grpo.function": "tests/training/test_rewards.py::test_function_gets_prompts_completions_and_answers",
    "grpo.num_generations": "tests/inference/test_rollouts.py::test_batches_of_groups",
    "grpo.max_completion_length": "tests/inference/test_rollouts.py::test_batches_of_groups",
    "grpo.num_iterations": "tests/inference/test_rollouts.py::test_completions_are_used_num_iterations_times",
    "grpo.beta": "tests/training/test_grpo_engine.py::test_loss_and_gradients_match_pytorch",
    "grpo.use_bias_correction_kl": "tests/model/test_grpo.py::test_loss_and_gradients_match_the_formulas",
    "grpo.epsilon": "tests/model/test_grpo.py::test_loss_and_gradients_match_the_formulas",
    "grpo.epsilon_high": "tests/training/test_grpo_engine.py::test_loss_and_gradients_match_pytorch",
    "grpo.loss_type": "tests/model/test_grpo.py::test_loss_and_gradients_match_the_formulas",
    "grpo.scale_rewards": "tests/model/test_grpo.py::test_advantages",
    "grpo.mask_truncated_completions": "tests/training/test_grpo_engine.py::test_loss_and_gradients_match_pytorch",
    "train.teacher": "tests/tasks/test_distillation.py::test_the_model_comes_close_to_its_teacher",
    "distillation.loss": "tests/training/test_distillation_engine.py::test_loss_and_gradients_match_pytorch",
    "distillation.weight": "tests/training/test_distillation_engine.py::test_loss_and_gradients_match_pytorch",
    "distillation.temperature": "tests/training/test_distillation_engine.py::test_loss_and_gradients_match_pytorch",
    "distillation.top_k": "tests/training/test_distillation_engine.py::test_loss_and_gradients_match_pytorch",
    "distillation.cache_dir": (
        "tests/tasks/test_distillation.py::test_predictions_are_computed_once_and_shared_by_seeds"
    ),
    "train.patience": "tests/tasks/test_sft.py::test_patience_ends_a_run_without_improvement",
    "generation.stop": "tests/inference/test_generation.py::test_ends_before_the_first_stop_string",
    "generation.repetition_penalty": "tests/inference/test_generation.py::test_repetition_penalty",
    "generation.presence_penalty": "tests/inference/test_generation.py::test_presence_and_frequency_penalties",
    "generation.frequency_penalty": "tests/inference/test_generation.py::test_presence_and_frequency_penalties",
    "generation.max_new_tokens": (
        "tests/inference/test_generation.py::test_ends_at_max_new_tokens_max_seq_len_and_end_of_document"
    ),
    "generation.seed": "tests/inference/test_generation.py::test_the_seed_decides_and_mlx_random_state_is_untouched",
    "knowledge_base.path": "tests/cli/test_knowledge.py::test_all_subcommands",
    "knowledge_base.retrieval_k": "tests/knowledge/test_knowledge_base.py::test_search_returns_at_most_k",
    "knowledge_base.embedding_model": "tests/cli/test_knowledge.py::test_search_by_meaning",
    "knowledge_base.feedback_alpha": "tests/knowledge/test_knowledge_base.py::test_alpha_scales_the_effect_of_a_vote",
    "generation.prompt": "tests/inference/test_generation.py::test_greedy_equals_recomputing_the_whole_sequence",
}


def places() -> dict[str, str]:
    """The test of each key."""
    here = [name.removeprefix("test_key_") for name in globals() if name.startswith("test_key_")]
    found = {name.replace("__", "."): f"test_key_{name}" for name in here}
    found |= {f"model.{key}": f"test_shape_keys[{key}]" for key in SHAPED}
    found |= {f"model.{key}": f"test_keys_that_change_the_output[{key}]" for key in COMPUTED}
    found |= {f"model.rope_scaling.{key}": f"test_keys_of_scaled_rope[{key}]" for key in ROTATED}
    found |= {key: f"test_keys_that_change_a_run[{key}]" for key in TRAINED}
    found |= {key: f"test_keys_that_change_tuning[{key}]" for key in TUNED}
    found |= {key: f"test_keys_of_sampling[{key}]" for key in SAMPLED}
    found |= {key: f"test_keys_of_the_scale_of_adapters[{key}]" for key in SCALED}
    return {key: f"tests/test_every_key.py::{test}" for key, test in found.items()} | ELSEWHERE


def test_every_key_has_a_test() -> None:
    assert set(places()) == set(leaf_keys())
    for key, place in ELSEWHERE.items():
        file, test = place.split("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert test in tests, f"{key}: {place} not found"


@pytest.mark.faults
@pytest.mark.parametrize("key", leaf_keys())
def test_the_test_of_a_key_fails_when_the_key_is_ignored(key: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "tests.ignored_key", "-p", "no:cacheprovider", places()[key]]
    environment = os.environ | {"IGNORED_KEY": key}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0 and " passed" not in done.stdout:
        pytest.skip("the test needs a package that is not installed")
    assert done.returncode == 1, done.stdout + done.stderr


@pytest.mark.parametrize("key", SHAPED)
def test_shape_keys(key: str) -> None:
    value, parameter, shape = SHAPED[key]
    assert parameter_shapes(ModelConfig(**SHAPE)).get(parameter) != shape  # type: ignore[arg-type]
    assert parameter_shapes(ModelConfig(**{**SHAPE, key: value}))[parameter] == shape  # type: ignore[arg-type]


@pytest.mark.parametrize("key", COMPUTED)
def test_keys_that_change_the_output(key: str) -> None:
    params = {n: mx.array(10 * p) for n, p in init_parameters(ModelConfig(**SHAPE), 0).items()}  # type: ignore[arg-type]

    def outputs(**change: Any) -> np.ndarray:
        model = ModelConfig(**{**SHAPE, **change})
        return np.array(logits(hidden_states(params, mx.arange(8)[None], model), params, model))

    other = COMPUTED_WITH.get(key, {})
    assert np.abs(outputs(**other) - outputs(**other, **{key: COMPUTED[key]})).max() > 1e-3


@pytest.mark.parametrize("key", ROTATED)
def test_keys_of_scaled_rope(key: str) -> None:
    def rotations(**scaling: Any) -> list[float]:
        model = ModelConfig(head_dim=32, rope_scaling=scaling)  # type: ignore[arg-type]
        frequencies = [inverse_frequencies(model, None, length) for length in (8, 9)]
        return [attention_factor(model, None), *np.concatenate(frequencies)]

    value, other = ROTATED[key]
    ratios = np.divide(rotations(**other), rotations(**{**other, key: value}))
    assert np.abs(np.log(ratios)).max() > 0.01


@pytest.fixture(scope="module")
def observe(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Any:
    """Trains for six steps with some settings and returns everything observable from outside."""

    def run(**settings: Any) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("run")
        config = loaded(folder / "c.yaml", tiny_shards, folder / "out", **settings)
        summary = pretrain(config, show="nothing")
        lines = [json.loads(x) for x in (folder / "out" / "logs" / "metrics.jsonl").read_text().splitlines()]
        events: dict[str, list[int]] = {}
        for line in lines:
            events.setdefault(line["event"], []).append(line["step"])
        found = checkpoint.find(folder / "out")
        arrays = checkpoint.load_arrays(found, config.config.model, optimizer=True)
        params = {n: a for n, a in arrays.items() if n.startswith("params/")}
        return {
            "steps": summary["steps"],
            "tokens": summary["tokens"],
            "loss": summary["final_loss"],
            "windows": (read_manifest(tiny_shards).tokens("train") - 1) // config.config.data.seq_len,
            "events": events,
            "saved": events.get("save", []),
            "kept": sorted(checkpoint.saved_steps(folder / "out")),
            "lrs": [round(line["lr"], 9) for line in lines if line["event"] == "train"],
            "val": [line["val_loss"] for line in lines if line["event"] == "eval"],
            "moments": {n.split("/")[1].split(".")[0] for n in arrays if n.startswith("optimizer/")},
            "weights": {n: a.tobytes() for n, a in params.items()},
            "size": sum(float(np.square(a).sum()) for a in params.values()),
        }

    return run


@pytest.fixture(scope="module")
def default_run(observe: Any) -> dict[str, Any]:
    return observe()


@pytest.mark.parametrize("key", TRAINED)
def test_keys_that_change_a_run(key: str, observe: Any, default_run: dict[str, Any]) -> None:
    settings, condition = TRAINED[key]
    assert not condition(default_run, default_run), "the test could not fail"
    assert condition(default_run, observe(**settings))


@pytest.fixture(scope="module")
def tuned_losses(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Any:
    """Trains for one step and returns its loss and the validation losses before and after it. Every row holds two
    conversations; every other one has a second answer, which is too long."""
    folder = tmp_path_factory.mktemp("tuning")

    def row(i: int) -> dict[str, Any]:
        contents = [f"Say {i}", f"Yes, {i}", *(["More", f"Then {i}, " * 20] if i % 2 else [])]
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
        return {"messages": messages, "prompt": f"Not {i}", "completion": f"No, not {i}"}

    def pair(i: int) -> dict[str, str]:
        return {"prompt": f"Say {i}", "chosen": f"Yes, {i}", "rejected": "No."}

    for name, make in (("sft", row), ("dpo", pair)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(make(i)) + "\n" for i in range(40)))

    def run(name: str, number: int, **settings: Any) -> list[float]:
        config = tuning(
            folder, f"{name}{number}", base, folder / f"{name}.jsonl", train__total_steps=1, train__eval_interval=1,
            **settings,
        )  # fmt: skip
        {"sft": sft, "dpo": dpo}[name](config, show="nothing")
        found = folder / f"{name}{number}"
        return [*(e["val_loss"] for e in events(found, "eval")), *(e["loss"] for e in events(found, "train"))]

    defaults = {name: run(name, 0) for name in ("sft", "dpo")}
    return run, defaults


@pytest.mark.parametrize("key", TUNED)
def test_keys_that_change_tuning(key: str, tuned_losses: Any) -> None:
    run, defaults = tuned_losses
    name = "dpo" if key.startswith("preference.") else "sft"
    losses = run(name, 1 + list(TUNED).index(key), **TUNED[key])
    assert len(losses) == len(defaults[name]) == 3
    assert losses != pytest.approx(defaults[name], abs=1e-4)


def test_key_chat__language(tmp_path: Path, base: Path) -> None:
    """Of one German and three English trees, the German one is left."""
    trees = [tree(post(f"p{i}", post(f"a{i}"), lang="de" if i == 2 else "en")) for i in range(4)]
    (tmp_path / "trees.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trees))
    settings = {"data__val_fraction": 0.0, "train__total_steps": LEFT_OUT, "train__epochs": 1.0, "chat__pack": False}
    config = tuning(
        tmp_path, "run", base, tmp_path / "trees.jsonl", chat__language="de", train__micro_batch_size=1,
        train__grad_accum_steps=1, **settings,
    )  # fmt: skip
    assert sft(config, show="nothing")["steps"] == 1


@pytest.mark.parametrize("key", SAMPLED)
def test_keys_of_sampling(key: str) -> None:
    settings, drawn = SAMPLED[key]
    n, probabilities = 1000, [0.4, 0.3, 0.2, 0.1]
    z = mx.array(np.tile(np.log(probabilities), (n, 1)), mx.float32)
    assert set(sample(z, [GenerationConfig(**settings)] * n, range(n)).tolist()) == drawn  # type: ignore[arg-type]


@pytest.mark.parametrize("key", SCALED)
def test_keys_of_the_scale_of_adapters(key: str) -> None:
    settings, scale = SCALED[key]
    assert adapter_scale(LoraConfig(r=16)) == 1
    assert adapter_scale(LoraConfig(r=16, **settings)) == scale


def test_key_model__architecture(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model:\n  architecture: mlx_lm\n")
    assert load_config(path).config.model.architecture == "mlx_lm"
    path.write_text("model:\n  architecture: bert\n")
    with pytest.raises(UserError, match=r':2: model.architecture: expected .*"llama".*, got "bert"$'):
        load_config(path)


def test_key_model__hf_config() -> None:
    def embedding(width: int) -> tuple[int, ...]:
        values = {"model_type": "gpt2", "n_ctx": 8, "n_embd": width, "n_head": 2, "n_layer": 1, "n_positions": 8}
        text = json.dumps({**values, "layer_norm_epsilon": 1e-5, "vocab_size": 40})
        return parameter_shapes(ModelConfig(architecture="mlx_lm", hf_config=text))["model.wte.weight"]

    assert (embedding(8), embedding(16)) == ((40, 8), (40, 16))


def test_key_train__save_dir(tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pretrain(loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "here", train__total_steps=1), show="nothing")
    assert {path.name for path in tmp_path.iterdir()} == {"c.yaml", "here"}
    assert checkpoint.saved_steps(tmp_path / "here") == [1]


def test_key_train__log_path(tmp_path: Path, tiny_shards: Path) -> None:
    pretrain(
        loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__log_path=str(tmp_path / "logs")),
        show="nothing",
    )
    assert {p.name for p in (tmp_path / "logs").iterdir()} == {
        "metrics.jsonl", "tensorboard", "final_training_summary.json", "environment.json"
    }  # fmt: skip
    assert not (tmp_path / "run" / "logs").exists()


def test_key_train__log_to(tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setitem(TRACKERS, "mlflow", fake)
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__total_steps=1, train__log_to="mlflow")
    pretrain(config, show="nothing")
    assert fake.calls[0] == ("run", config.config.model.d_model, None)
    assert [call[0] for call in fake.calls[1:]] == [0, 1, 1, "finished"]  # validation, training, validation
    assert {p.name for p in (tmp_path / "run" / "logs").iterdir()} == {
        "metrics.jsonl", "trackers.json", "final_training_summary.json", "environment.json"
    }  # fmt: skip


def test_key_train__backend(tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_torch(*args: Any) -> Any:
        raise UserError("PyTorch was chosen")

    monkeypatch.setattr(engines, "_open_torch", open_torch)
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__backend="torch")
    with pytest.raises(UserError, match="PyTorch was chosen"):
        pretrain(config, show="nothing")


def test_key_train__share_muon() -> None:
    """By default, measurements decide."""
    ranks: Any = SimpleNamespace(rank=0, size=2)

    def enabled(**train: Any) -> bool | None:
        config = Config.model_validate({"model": SHAPE, "train": {"device": "cpu", **train}})
        return MLXEngine(config, ranks=ranks)._sharded_muon.enabled

    assert (enabled(), enabled(share_muon=True), enabled(share_muon=False)) == (None, True, False)


def test_key_data__shard_weights(tmp_path: Path, tiny_shards: Path) -> None:
    """Of two equal folders, weights change the order of the windows."""
    settings = {"data__shard_dir": [str(tiny_shards)] * 2, "train__total_steps": 1}
    losses = [
        pretrain(loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / str(i), **settings, **more), show="nothing")
        for i, more in enumerate([{}, {"data__shard_weights": [1.0, 3.0]}])
    ]
    assert losses[0]["final_loss"] != losses[1]["final_loss"]


def test_key_data__document_mask(tmp_path: Path, tiny_shards: Path) -> None:
    """With documents shorter than a sequence, the mask hides most tokens and changes the loss of the same batch."""
    lines = [f"{i} little document, {i * i} words or so long" for i in range(200)]
    tokenizer = load_tokenizer(tiny_shards)
    Pretokenizer(tokenizer, tmp_path / "shards", val_fraction=0.1).run(map(Document, lines))
    losses = [
        pretrain(
            loaded(
                tmp_path / "c.yaml", tmp_path / "shards", tmp_path / str(mask), data__document_mask=mask,
                train__total_steps=1,
            ),
            show="nothing",
        )["final_loss"]
        for mask in (False, True)
    ]  # fmt: skip
    assert abs(losses[0] - losses[1]) > 1e-4


def test_key_data__num_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of tokenizer threads. test_pretokenize checks that the shards do not depend on it."""
    from anarchobot.data import document_batches

    pools: list[int] = []

    class Pool(document_batches.ThreadPoolExecutor):
        def __init__(self, workers: int) -> None:
            pools.append(workers)
            super().__init__(workers)

    monkeypatch.setattr(document_batches, "ThreadPoolExecutor", Pool)
    make_shards(tmp_path / "shards")
    (tmp_path / "a.txt").write_text("some text\n" * 9)
    args = ["--input", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "shards" / "made.model")]
    assert main(["pretokenize", *args, "--output", str(tmp_path / "out"), "data.num_workers=5"]) == 0
    assert pools[-1] == 5


def pretokenized(tmp_path: Path, *settings: str) -> int:
    """The exit code; the shards of 200 documents are in tmp_path/out, the tokenizer's in tmp_path/shards."""
    if not (tmp_path / "shards").exists():
        make_shards(tmp_path / "shards")
    (tmp_path / "a.txt").write_text("\n".join(f"{i} little document" for i in range(200)))
    command = ["pretokenize", "--input", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "shards/made.model")]
    return main([*command, "--output", str(tmp_path / "out"), "--restart", "data.documents=lines", *settings])


def test_key_data__val_fraction(tmp_path: Path) -> None:
    assert pretokenized(tmp_path, "data.val_fraction=0.5") == 0
    assert 70 < sum(s.documents for s in read_manifest(tmp_path / "out").shards if s.split == "val") < 130


def test_key_tokenizer__on_mismatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def select(tokenizer: Any, engine: str, on_mismatch: Any, log: Any, text_bytes: Any) -> VerifiedTokenizer:
        wrong = Broken(tokenizer, lambda number, text, ids: ids + 1)
        return VerifiedTokenizer(tokenizer, wrong, on_mismatch=on_mismatch, log=log)

    monkeypatch.setattr(pretokenize, "select_engine", select)
    assert pretokenized(tmp_path) == 2
    assert pretokenized(tmp_path, "tokenizer.on_mismatch=fallback") == 0


def test_key_tokenizer__max_train_mb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text((ROOT / "README.md").read_text())
    command = ["tokenizer", "train", "--input", str(tmp_path / "a.txt"), "--vocab-size", "400", "--json"]
    assert main([*command, "--output", str(tmp_path / "s"), "tokenizer.max_train_mb=0.005"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 5000


def test_key_tokenizer__model_type(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text((ROOT / "README.md").read_text())
    command = ["tokenizer", "train", "--input", str(tmp_path / "a.txt"), "--vocab-size", "400"]
    assert main([*command, "--output", str(tmp_path / "s"), "--model-type", "unigram"]) == 0
    scores = [line.rpartition("\t")[2] for line in (tmp_path / "s.vocab").read_text().splitlines()]
    assert any("." in score for score in scores)  # log-probabilities; those of BPE are ranks


def test_key_tokenizer__format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text((ROOT / "README.md").read_text())
    args = ["tokenizer", "train", "--input", str(tmp_path / "a.txt"), "--vocab-size", "500"]
    assert main([*args, "--output", str(tmp_path / "s")]) == 0
    assert main([*args, "--output", str(tmp_path / "g"), "--format", "gpt2"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "s.model", "s.vocab", "g-vocab.json", "g-merges.txt"}
