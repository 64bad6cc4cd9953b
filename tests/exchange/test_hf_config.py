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
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model, 5, 7, "bfloat16")))
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


def test_rope_parameters_per_layer_type_must_agree() -> None:
    """transformers 5 writes them for models with several layer types."""
    rope = {"rope_type": "default", "rope_theta": 5e5}
    per_layer_type = {"full_attention": rope, "sliding_attention": dict(rope)}
    assert model_config_from_hf({**LLAMA, "rope_parameters": per_layer_type}, "c").rope_theta == 5e5
    assert model_config_from_hf({**LLAMA, "rope_parameters": {"full_attention": rope}}, "c").rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "gpt2"}, "unsupported model_type 'gpt2': expected one of llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "missing model_type: expected one of"),
        ({"model_type": "qwen3_moe"}, "unsupported model_type 'qwen3_moe'"),
        ({"num_local_experts": 8}, "num_local_experts: 8: mixtures of experts are not supported"),
        (
            {"model_type": "mistral", "sliding_window": 256},
            "sliding_window: 256: sliding windows are not",
        ),
        ({"model_type": "mistral", "max_position_embeddings": 5000}, "sliding_window: 4096"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128}, "sliding_window: 128"),
        (
            {"layer_types": ["full_attention", "linear_attention"]},
            "layer_types: linear_attention: only full",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 RoPE scaling is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear RoPE scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn RoPE scaling"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}},
            r"rope_parameters differs between layer types \(full_attention, sliding_attention\)",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "rope_theta": 1e4}},
            "differs between layer types",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 5e5}}},
            "yarn RoPE scaling",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: must be 1"),
        ({"hidden_act": "gelu"}, "unsupported hidden_act 'gelu': expected silu or gelu_pytorch_tanh"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        ({"hidden_size": None}, "hidden_size: expected a number above 0, got None"),
        ({"hidden_size": -64}, "hidden_size: expected a number above 0, got -64"),
        ({"num_hidden_layers": 1.5}, "model.n_layers: expected an integer >= 1, got 1.5"),
        ({"num_attention_heads": 7}, "d_model .64. must be divisible by n_heads .7."),
        ({"num_key_value_heads": 3}, "n_heads .4. must be divisible by n_kv_heads .3."),
        ({"tie_word_embeddings": "yes"}, "model.tie_embeddings: expected true or false"),
    ],
    ids=str,
)
def test_unsupported_features_are_rejected_by_name(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=f"^DIR/config.json: .*{problem}"):
        model_config_from_hf({**LLAMA, **change}, "DIR/config.json")


def test_a_window_as_long_as_the_context_is_accepted() -> None:
    assert model_config_from_hf({**LLAMA, "model_type": "mistral", "sliding_window": 512}, "c").max_seq_len == 512
    assert model_config_from_hf({**LLAMA, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8}, "c")
