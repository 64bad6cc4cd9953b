"""config.json: transformers reads ours, and we read transformers'."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from anarchobot.config.errors import UserError
from anarchobot.config.schema import ModelConfig
from anarchobot.exchange.exporting import hf_config
from anarchobot.exchange.importing import model_config_from_hf
from anarchobot.model.llama import architecture as llama

SHAPES: list[dict[str, Any]] = [
    {},
    {"qk_norm": True, "tie_embeddings": False, "head_dim": 128},
    {
        "n_kv_heads": 4,
        "rope_theta": 5e5,
        "norm_eps": 1e-6,
        "mlp_multiple": 11008 / 4096,
        "d_model": 4096,
        "n_heads": 32,
    },
    {"ffn_activation": "gelu", "max_seq_len": 77, "vocab_size": 11},
]
LLAMA = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transformers_reads_our_config(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = ModelConfig(**shape, dropout=0.0)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model, 5, [7], "bfloat16")))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == ("Qwen3Config" if model.qk_norm else "LlamaConfig")
    assert config.rope_parameters["rope_theta"] == model.rope_theta
    assert config.rope_parameters["rope_type"] == "default"
    assert (config.bos_token_id, config.eos_token_id, str(config.dtype).removeprefix("torch.")) == (5, 7, "bfloat16")
    assert config.intermediate_size == model.mlp_size and config.head_dim == model.head_size
    # The config that transformers 5 saves, with rope_parameters, gives the same shape.
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "rope_parameters" in saved
    again = model_config_from_hf(saved, "config.json")
    assert {**again.model_dump(), "mlp_multiple": 0, "head_dim": again.head_size, "n_kv_heads": again.kv_heads} == {
        **model.model_dump(), "mlp_multiple": 0, "head_dim": model.head_size, "n_kv_heads": model.kv_heads
    }  # fmt: skip
    assert again.mlp_size == model.mlp_size


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_the_four_model_types(kind: str) -> None:
    window = {"sliding_window": None} if kind == "Mistral" else {}
    sizes = {key: value for key, value in LLAMA.items() if key != "model_type"}
    config = getattr(transformers, f"{kind}Config")(**sizes, num_key_value_heads=2, head_dim=16, **window)
    model = model_config_from_hf(config.to_dict(), "config.json")
    assert (model.d_model, model.n_layers, model.kv_heads, model.head_size) == (64, 2, 2, 16)
    assert model.qk_norm == (kind == "Qwen3") and model.rope_theta == 10000 and not model.tie_embeddings


def test_rope_theta_of_old_and_new_files() -> None:
    assert model_config_from_hf({**LLAMA, "rope_theta": 1e6, "rope_scaling": None}, "c").rope_theta == 1e6
    assert model_config_from_hf(LLAMA, "c").rope_theta == 10000
    assert (
        model_config_from_hf({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "c").rope_theta
        == 5e5
    )


def test_rope_parameters_per_layer_type() -> None:
    """transformers 5 writes them for models with several layer types."""
    rope, other = {"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 1e4}
    for sliding in (rope, other):  # no layer of this model has a window
        per_layer_type = {"full_attention": rope, "sliding_attention": sliding}
        model = model_config_from_hf({**LLAMA, "rope_parameters": per_layer_type}, "c")
        assert (model.rope_theta, model.rope_local_theta) == (5e5, None)
    assert model_config_from_hf({**LLAMA, "rope_parameters": {"full_attention": rope}}, "c").rope_theta == 5e5
    windows = {
        **GEMMA_3,
        "sliding_window_pattern": 2,
        "rope_parameters": {"full_attention": rope, "sliding_attention": other},
    }
    model = model_config_from_hf(windows, "c")
    assert (model.rope_theta, model.rope_local_theta) == (5e5, 1e4)


ORIGINAL = {"original_max_position_embeddings": 64}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
YARN = {"rope_type": "yarn", "factor": 8.0, **ORIGINAL}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"type": "linear", "factor": 4}, {"type": "linear", "factor": 4.0}),
        (
            LLAMA_3,
            {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_seq_len": 64},
        ),
        (YARN, {"type": "yarn", "factor": 8, "original_max_seq_len": 64}),
        ({"rope_type": "yarn", "factor": 8}, {"type": "yarn", "factor": 8, "original_max_seq_len": 512}),
        ({**YARN, "beta_fast": 16, "truncate": False}, {"type": "yarn", "beta_fast": 16, "truncate": False}),
        ({**YARN, "attention_factor": 1.5}, {"type": "yarn", "attention_factor": 1.5}),
        # DeepSeek's mscales: (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)
        ({**YARN, "mscale": 2.0, "mscale_all_dim": 1.0}, {"attention_factor": pytest.approx(1.4158883 / 1.2079442)}),
        ({"rope_type": "dynamic", "factor": 2.0}, {"type": None}),  # has no effect up to max_position_embeddings
        ({"rope_type": "default"}, {"type": None}),
        (
            {**LONGROPE, **ORIGINAL},
            {"type": "longrope", "factor": 8, "short_factor": [1.0] * 8, "attention_factor": None},
        ),
    ],
    ids=str,
)
def test_rope_scaling(rope: dict[str, Any], expected: dict[str, Any]) -> None:
    """In the older form, and in that of transformers 5."""
    for values in ({"rope_scaling": rope}, {"rope_parameters": {**rope, "rope_theta": 1e4}}):
        scaling = model_config_from_hf({**LLAMA, **values}, "c").rope_scaling.model_dump()
        assert {key: scaling[key] for key in expected} == expected


def test_phi3_has_the_original_length_beside_rope_scaling() -> None:
    """The factor is the ratio of the lengths. Early files call the type su or yarn."""
    phi = {**LLAMA, "model_type": "phi3", "partial_rotary_factor": 0.75}
    for name in ("longrope", "su", "yarn"):
        rope = {"type": name, "short_factor": [1.0] * 6, "long_factor": [3.0] * 6}
        model = model_config_from_hf({**phi, "rope_scaling": rope, "original_max_position_embeddings": 128}, "c")
        scaling = model.rope_scaling
        assert (scaling.type, scaling.factor, scaling.original_max_seq_len) == ("longrope", 4.0, 128)
        assert (model.rotary_fraction, model.rotary_size) == (0.75, 12)


S, F = "sliding_attention", "full_attention"
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 256}
QWEN_2 = {**LLAMA, "model_type": "qwen2", "sliding_window": 256, "use_sliding_window": True, "num_hidden_layers": 4}
GEMMA_2 = {**LLAMA, "model_type": "gemma2", "num_key_value_heads": 2, "num_hidden_layers": 4, "sliding_window": 256}
GEMMA_3 = {**GEMMA_2, "model_type": "gemma3_text"}


@pytest.mark.parametrize(
    ("values", "window", "types"),
    [
        (MISTRAL, 256, None),
        ({**MISTRAL, "sliding_window": None}, None, None),
        ({**MISTRAL, "sliding_window": 512}, None, None),  # as long as the context
        ({**LLAMA, "model_type": "mistral", "max_position_embeddings": 5000}, 4096, None),  # the default
        ({**MISTRAL, "layer_types": [F, S]}, 256, [F, S]),
        ({**MISTRAL, "model_type": "ministral", "layer_types": [F, F]}, None, None),
        ({**LLAMA, "sliding_window": 256}, None, None),  # Llama has windows only with layer_types (mlx-lm)
        ({**LLAMA, "sliding_window": 256, "layer_types": [S, F]}, 256, [S, F]),
        ({**LLAMA, "model_type": "phi3", "sliding_window": 256}, 256, None),
        ({**QWEN_2, "max_window_layers": 3}, 256, [F, F, F, S]),
        ({**QWEN_2, "max_window_layers": 0}, 256, None),
        (QWEN_2, None, None),
        ({**QWEN_2, "layer_types": [S, F, S, F]}, 256, [S, F, S, F]),
        ({**QWEN_2, "layer_types": [S, F, S, F], "use_sliding_window": False}, None, None),
        (GEMMA_2, 256, [S, F, S, F]),
        ({**GEMMA_3, "sliding_window_pattern": 3}, 256, [S, S, F, S]),
        ({**GEMMA_3, "layer_types": [F, S, S, S]}, 256, [F, S, S, S]),
        # The windows of Gemma 3 also have another rope_theta, so they are kept whatever their length.
        ({**GEMMA_3, "sliding_window_pattern": 3, "sliding_window": 512}, 512, [S, S, F, S]),
        (GEMMA_3, 256, None),  # fewer layers than the pattern's 6
    ],
    ids=str,
)
def test_sliding_windows(values: dict[str, Any], window: int | None, types: list[str] | None) -> None:
    model = model_config_from_hf(values, "c")
    assert (model.sliding_window, model.layer_types) == (window, types)


def test_missing_keys_have_the_defaults_of_transformers() -> None:
    """Gemma 3 4B's config.json leaves out the heads and the vocabulary."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    theirs = transformers.Gemma3TextConfig(**{key: value for key, value in text.items() if key != "model_type"})
    model = model_config_from_hf({"model_type": "gemma3", "text_config": text, "vision_config": {}}, "c")
    assert model == model_config_from_hf(theirs.to_dict(), "c") == model_config_from_hf(text, "c")
    assert (model.n_heads, model.kv_heads, model.head_size) == (8, 4, 256) and model.vocab_size == 262208
    assert model.layer_types == theirs.layer_types and model.sliding_window == theirs.sliding_window
    assert (model.rope_theta, model.rope_local_theta) == (1e6, 1e4)
    assert model.embedding_scale == 2560**0.5 and model.tie_embeddings and model.ffn_activation == "gelu"
    minimal = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
    theirs = transformers.Gemma2Config(**minimal)
    gemma2 = model_config_from_hf({**minimal, "model_type": "gemma2", "vocab_size": 256000}, "c")
    assert gemma2 == model_config_from_hf(theirs.to_dict(), "c")
    assert (gemma2.attention_softcap, gemma2.logit_softcap, gemma2.attention_scale) == (50, 30, None)


def test_the_attention_scale_of_gemma() -> None:
    assert model_config_from_hf({**GEMMA_2, "query_pre_attn_scalar": 144}, "c").attention_scale == pytest.approx(1 / 12)
    assert model_config_from_hf({**GEMMA_2, "query_pre_attn_scalar": 144, "head_dim": 144}, "c").attention_scale is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "gpt2"}, "unsupported model_type 'gpt2': expected one of llama, mistral, ministral, qwen2"),
        ({"model_type": None}, "missing model_type: expected one of"),
        ({"model_type": "qwen3_moe"}, "unsupported model_type 'qwen3_moe'"),
        ({"num_local_experts": 8}, "num_local_experts: 8: mixtures of experts are not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: True: only causal attention"),
        ({"mlp_bias": True}, "mlp_bias: True: biases of the MLP are not supported"),
        ({"rope_traditional": True}, "rope_traditional: True: rotary embeddings of neighboring values"),
        ({"model_type": "gemma3"}, "text_config: expected a JSON object"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types: linear_attention: only full"),
        (
            {"model_type": "mistral", "num_hidden_layers": 10**9, "sliding_window": 8},
            "num_hidden_layers: 1000000000: at most 10000 are supported",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: expected a number above 0"),
        ({"rope_scaling": {"type": "linear"}}, "factor: expected a number above 0, got None"),
        ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "mrope RoPE scaling is not supported"),
        ({"rope_scaling": [1]}, "rope_scaling: expected a JSON object"),
        (
            {"rope_scaling": {**LONGROPE, "long_factor": [1.0]}},
            "long_factor must have one number per rotated pair .8., but has 1",
        ),
        (
            {
                "layer_types": [S, F],
                "sliding_window": 8,
                "rope_parameters": {F: {"rope_theta": 1e4}, S: {"rope_type": "linear", "factor": 2.0}},
            },
            "scaled rotary embeddings of layers with a sliding window that differ",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "rope_theta": 1e4}},
            "rope_parameters: expected numbers, or one object for each layer type",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: must be 1"),
        ({"hidden_act": "gelu"}, "unsupported hidden_act 'gelu': expected silu or gelu_pytorch_tanh"),
        ({"quantization_config": {"bits": 4}}, "weights quantized by unknown are not supported"),
        ({"hidden_size": None}, "hidden_size: expected a number above 0, got None"),
        ({"hidden_size": -64}, "hidden_size: expected a number above 0, got -64"),
        ({"num_hidden_layers": 1.5}, "model.n_layers: expected an integer >= 1 and <= 10000, got 1.5"),
        ({"num_attention_heads": 7}, "d_model .64. must be divisible by n_heads .7."),
        ({"num_key_value_heads": 3}, "n_heads .4. must be divisible by n_kv_heads .3."),
        ({"tie_word_embeddings": "yes"}, "model.tie_embeddings: expected true or false"),
    ],
    ids=str,
)
def test_unsupported_features_are_rejected_by_name(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=f"^DIR/config.json: .*{problem}"):
        model_config_from_hf({**LLAMA, **change}, "DIR/config.json")


@pytest.mark.parametrize(
    ("model", "lengths"),  # for hf, mlx and gguf
    [
        ({}, (512, 512, 512)),
        ({"sliding_window": 64}, (512, 64, 64)),
        ({"sliding_window": 64, "layer_types": [S, F]}, (512, 512, 512)),
        ({"sliding_window": 64, "qk_norm": True}, (512, 64, 64)),
        ({"sliding_window": 1024}, (512, 512, 512)),
    ],
)
def test_the_exported_length_is_that_of_equal_results(model: dict[str, Any], lengths: tuple[int, ...]) -> None:
    config = ModelConfig.model_validate({"n_layers": 2, "max_seq_len": 512, **model})
    assert tuple(llama.exported_length(config, target) for target in ("hf", "mlx", "gguf")) == lengths
