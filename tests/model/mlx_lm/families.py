"""Tiny models of families that only mlx-lm implements, with random weights."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

VOCAB = 96
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "tie_word_embeddings": False, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "experts": {**_COMMON, "model_type": "qwen3_moe"},
    "head inside": {  # the module before the head includes the head
        "model_type": "gpt_neox", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128, "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True,
    },
    "scaled logits": {  # and a tied head
        "model_type": "cohere", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "logit_scale": 0.25,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "layer_norm_eps": 1e-5,
        "rope_theta": 1e4, "max_position_embeddings": 128,
    },
    "state space": {
        "model_type": "mamba", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "state_size": 4,
        "num_hidden_layers": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4,
    },
    "hybrid": {  # gated linear attention and full attention, experts
        **_COMMON, "model_type": "qwen3_next", "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "full_attention_interval": 2,
        "shared_expert_intermediate_size": 24, "partial_rotary_factor": 0.5,
    },
}  # fmt: skip


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """Writes config.json and model.safetensors under the names of mlx-lm's module."""
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    module = model_class(args_class.from_dict(config))
    arrays = {}
    for i, (name, array) in enumerate(tree_flatten(module.parameters())):
        noise = mx.random.normal(array.shape, key=mx.random.key(i)) * (0.02 if array.ndim == 1 else 0.2)
        arrays[name] = noise + 1 if name.endswith("norm.weight") else noise
    module.update(tree_unflatten(list(arrays.items())))
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def mlx_lm_module(folder: Path) -> Any:
    """The module as mlx-lm loads it."""
    from mlx_lm.utils import load_model

    return load_model(folder)[0]
