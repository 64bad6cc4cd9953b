"""Every key of the schema has an effect: a test here, or a reference to a test elsewhere.

The first test fails if a key has no test, so a setting that nothing reads cannot go unnoticed.
"""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.config.loading import leaf_keys, load_config
from anarchobot.config.schema import ModelConfig
from anarchobot.data.pretokenize import Pretokenizer
from anarchobot.data.shards import read_manifest
from anarchobot.data.sources.documents import Document
from anarchobot.model.llama.forward import hidden_states
from anarchobot.model.loss import logits
from anarchobot.model.parameters import init_parameters, parameter_shapes
from anarchobot.runs import checkpoint
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tokenizers.tokenizer import load_tokenizer
from tests.tiny import LEFT_OUT, loaded, make_shards

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
}

# Keys that change the output for the same parameters.
COMPUTED: dict[str, Any] = {
    "n_heads": 2, "ffn_activation": "gelu", "rope_theta": 100.0, "norm_eps": 0.5, "logit_softcap": 0.1,
    "embedding_scale": 7.0, "value_residual": True,
}  # fmt: skip

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
    "data.dedup": "tests/data/test_pretokenize.py::test_dedup_can_be_disabled",
    "data.near_dedup": "tests/data/test_pretokenize.py::test_near_dedup_does_not_depend_on_batches",
    "data.shard_weights": "tests/data/test_batches.py::test_mixture_follows_its_weights",
    "data.val_fraction": "tests/data/test_pretokenize.py::test_validation_split_is_stable",
    "data.shuffle_buffer": "tests/data/sources/test_hub.py::test_shuffle_buffer",
    "data.streaming": "tests/data/sources/test_hub.py::test_without_streaming_the_order_is_kept",
    "data.cache_dir": "tests/data/sources/test_hub.py::test_without_streaming_the_order_is_kept",
    "data.fallback": "tests/data/sources/test_documents.py::test_fallback_must_be_enabled",
    "data.shard_dir": "tests/test_docs.py::test_documented_commands_run",
    "tokenizer.model_type": "tests/tokenizers/test_training.py::test_vocabulary_has_the_requested_size",
    "train.share_muon": "tests/tasks/test_launch.py::test_sharded_muon_equals_single_process",
    "train.memory_budget_gb": "tests/system/test_micro_batch.py::test_largest_fitting_micro_batch_keeps_the_step",
    "tokenizer.engine": "tests/tokenizers/test_fast_tokenizer.py::test_reference_engine",
    "tokenizer.on_mismatch": "tests/tokenizers/test_fast_tokenizer.py::test_late_mismatch_is_sampled",
    "tokenizer.max_train_mb": "tests/tokenizers/test_training.py::test_limit_bytes_is_exact",
    "model.max_seq_len": "tests/inference/test_generation.py::test_ends_at_max_new_tokens",
    "model.zero_init_proj": "tests/model/test_parameters.py::test_zero_init_proj_zeroes_the_residual_projections",
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
    "train.compile": "tests/training/test_mlx_engine.py::test_checkpointing_and_compilation_give_the_same_weights",
    "train.device": "tests/training/test_mlx_engine.py::test_missing_gpu_is_an_error",
    "train.backend": "tests/tasks/test_pretrain.py::test_mismatches_are_refused_before_anything_is_written",
    "train.save_dir": "tests/tasks/test_pretrain.py::test_run_folder_and_summary",
    "train.checkpoint_path": "tests/tasks/test_pretrain.py::test_resumed_run_equals_uninterrupted_run_bit_for_bit",
    "train.tokenizer_path": "tests/tasks/test_pretrain.py::test_mismatches_are_refused_before_anything_is_written",
    "lora.r": "tests/model/test_lora.py::test_adapted_matrices_and_parameter_count",
    "lora.alpha": "tests/model/test_lora.py::test_forward_and_gradients_match_peft",
    "lora.dropout": "tests/training/test_engine_lora.py::test_lora_dropout_affects_training_but_not_validation",
    "lora.target_modules": "tests/model/test_lora.py::test_adapted_matrices_and_parameter_count",
    "lora.num_layers": "tests/model/test_lora.py::test_frozen_weights_cost_no_backward_work",
    "lora.dora": "tests/model/test_lora.py::test_forward_and_gradients_match_peft",
    "lora.rslora": "tests/model/test_lora.py::test_forward_and_gradients_match_peft",
    "lora.adapter_format": "tests/tasks/test_sft.py::test_only_adapters_are_trained_and_saved",
    "lora.quantize": "tests/training/test_engine_lora.py::test_adapters_use_much_less_memory_than_full_training",
    "chat.format": "tests/data/conversations/test_formats.py::test_format_can_be_set",
    "chat.language": "tests/data/conversations/test_oasst.py::test_threads",
    "chat.template": "tests/tokenizers/test_chat_template.py::test_tokenizers_trained_here_use_chatml",
    "chat.train_on": "tests/tokenizers/test_chat_encoder.py::test_mask_computed_by_hand",
    "chat.pack": "tests/tasks/test_sft.py::test_packing_does_not_change_the_loss",
    "chat.too_long": "tests/data/conversations/test_tokenized.py::test_long_conversations_are_cut_or_dropped",
    "chat.rouge_samples": "tests/tasks/test_sft.py::test_model_learns_to_answer",
    "preference.loss": "tests/tasks/test_dpo.py::test_model_learns_preferences",
    "preference.beta": "tests/training/test_preference_engine.py::test_loss_and_gradients_match_pytorch",
    "preference.label_smoothing": "tests/training/test_preference_engine.py::test_loss_and_gradients_match_pytorch",
    "train.patience": "tests/tasks/test_sft.py::test_patience_ends_a_run_without_improvement",
    "generation.method": "tests/inference/test_sampling.py::test_draws_follow_the_exact_probabilities",
    "generation.temperature": "tests/inference/test_sampling.py::test_draws_follow_the_exact_probabilities",
    "generation.top_k": "tests/inference/test_sampling.py::test_draws_follow_the_exact_probabilities",
    "generation.top_p": "tests/inference/test_sampling.py::test_draws_follow_the_exact_probabilities",
    "generation.min_p": "tests/inference/test_sampling.py::test_draws_follow_the_exact_probabilities",
    "generation.stop": "tests/inference/test_generation.py::test_ends_before_the_first_stop_string",
    "generation.repetition_penalty": "tests/inference/test_generation.py::test_repetition_penalty",
    "generation.max_new_tokens": "tests/inference/test_generation.py::test_ends_at_max_new_tokens",
    "generation.seed": "tests/inference/test_generation.py::test_the_seed_decides",
    "knowledge_base.path": "tests/cli/test_knowledge.py::test_all_subcommands",
    "knowledge_base.retrieval_k": "tests/knowledge/test_knowledge_base.py::test_search_returns_at_most_k",
    "knowledge_base.feedback_alpha": "tests/knowledge/test_knowledge_base.py::test_alpha_scales_the_effect_of_a_vote",
    "generation.prompt": "tests/inference/test_generation.py::test_greedy_equals_recomputing_the_whole_sequence",
}


def test_every_key_has_a_test() -> None:
    here = {name.removeprefix("test_key_").replace("__", ".") for name in globals() if name.startswith("test_key_")}
    shown = {f"model.{key}" for key in (*SHAPED, *COMPUTED)} | set(TRAINED) | set(ELSEWHERE) | here
    assert shown == set(leaf_keys())
    for key, place in ELSEWHERE.items():
        file, test = place.split("::")
        assert f"def {test}" in (ROOT / file).read_text(), f"{key}: {place} not found"


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

    assert np.abs(outputs() - outputs(**{key: COMPUTED[key]})).max() > 1e-3


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


def test_key_model__architecture(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model:\n  architecture: llama\n")
    assert load_config(path).config.model.architecture == "llama"
    path.write_text("model:\n  architecture: bert\n")
    with pytest.raises(UserError, match=r':2: model.architecture: expected .*"llama".*, got "bert"$'):
        load_config(path)


def test_key_train__log_path(tmp_path: Path, tiny_shards: Path) -> None:
    pretrain(
        loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__log_path=str(tmp_path / "logs")),
        show="nothing",
    )
    assert {p.name for p in (tmp_path / "logs").iterdir()} == {
        "metrics.jsonl", "tensorboard", "final_training_summary.json", "environment.json"
    }  # fmt: skip
    assert not (tmp_path / "run" / "logs").exists()


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


def test_key_tokenizer__format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text((ROOT / "README.md").read_text())
    args = ["tokenizer", "train", "--input", str(tmp_path / "a.txt"), "--vocab-size", "500"]
    assert main([*args, "--output", str(tmp_path / "s")]) == 0
    assert main([*args, "--output", str(tmp_path / "g"), "--format", "gpt2"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "s.model", "s.vocab", "g-vocab.json", "g-merges.txt"}
