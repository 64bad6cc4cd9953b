"""Models of the Llama family built by transformers: read, exported again and read by transformers and mlx-lm, they give
the same logits."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load as mlx_load

from anarchobot.config.errors import UserError
from anarchobot.exchange.exporting import export
from anarchobot.exchange.importing import import_model, load_hf_folder, model_config_from_hf
from anarchobot.model.llama.forward import embed
from tests.exchange.random_run import make_run, our_logits, real_ids
from tests.exchange.test_importing import VOCAB, their_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 120, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
LENGTH, SHORT = 40, 12
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [2.0] * 6}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
# transformers' class, its settings, and the model_type that it is exported as.
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama3": ("Llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA_3}}, "llama"),
    "yarn": ("Qwen3", {"rope_scaling": YARN, "head_dim": 16}, "qwen3"),
    "yarn with mscale": ("Qwen2", {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.4}}, "qwen2"),
    "window": ("Mistral", {"sliding_window": 8}, "mistral"),
    "windows of some layers": ("Ministral", {"sliding_window": 8, "layer_types": MIXED, "head_dim": 16}, "mistral"),
    "windows of the last layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
        "qwen2",
    ),
    "Phi-3 with a window": ("Phi3", {"sliding_window": 8, "pad_token_id": 0}, "mistral"),
    "Phi-4": (
        "Phi3",
        {
            "partial_rotary_factor": 0.75, "rope_scaling": LONGROPE, "original_max_position_embeddings": 16,
            "sliding_window": 300, "tie_word_embeddings": True, "pad_token_id": 0,
        },
        "phi3",
    ),
    "Gemma": ("Gemma", {"head_dim": 32}, "gemma"),
    "Gemma 2": ("Gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20}, "gemma2"),
    "Gemma 3": (
        "Gemma3",
        {
            "head_dim": 32, "sliding_window": 8, "sliding_window_pattern": 3, "query_pre_attn_scalar": 20,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
        "gemma3_text",
    ),
}  # fmt: skip


def build(folder: Path, tokenizer: Path, kind: str) -> Path:
    """A random model saved by transformers, also with random norms and biases, and a tokenizer. config.json gets the
    form of older files, without rope_parameters and layer_types; that of transformers 5 must mean the same."""
    name, settings, _ = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**SIZES | settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    file = folder / "config.json"
    saved = json.loads(file.read_text())
    older = {key: value for key, value in saved.items() if key not in ("rope_parameters", "layer_types")} | settings
    assert model_config_from_hf(older, str(file)) == model_config_from_hf(saved, str(file))
    file.write_text(json.dumps(older))
    shutil.copyfile(tokenizer, folder / tokenizer.name)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_transformers_before_and_after_an_export(tmp_path: Path, bpe: Path, kind: str) -> None:
    """Also of texts up to the original context length, where longrope has other factors."""
    folder = build(tmp_path / "hf", bpe, kind)
    run, model_type = tmp_path / "run", KINDS[kind][2]
    assert import_model(folder, run)["warnings"] == []
    ids = real_ids(run, LENGTH)
    export(run, "hf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == model_type
    imported, exported = (
        transformers.AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "out")
    )
    for length in (SHORT, LENGTH):
        with torch.no_grad():
            theirs, again = (model(torch.tensor([ids[:length]])).logits[0] for model in (imported, exported))
        assert theirs.std() > 0.1
        np.testing.assert_allclose(our_logits(run, ids[:length]), theirs, atol=1e-4, rtol=0)
        np.testing.assert_allclose(again, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "warning", "right"),
    [
        ("llama3", "", slice(None)),
        ("windows of some layers", "", slice(None)),
        ("Gemma 3", "", slice(None)),
        ("window", "ignores model.sliding_window: its results are this model's for texts of at most 8", slice(8)),
        ("Gemma 2", "ignores model.sliding_window: its results are this model's for texts of at most 8", slice(8)),
        ("Gemma", "computes this model's GELU without the tanh approximation", slice(0)),
        ("Phi-4", "uses model.rope_scaling.long_factor at any length: up to 16 tokens, its results", slice(None)),
    ],
)
def test_logits_of_mlx_lm_after_an_export(tmp_path: Path, bpe: Path, kind: str, warning: str, right: slice) -> None:
    """As far as the warning says."""
    folder = build(tmp_path / "hf", bpe, kind)
    import_model(folder, tmp_path / "run")
    warnings = export(tmp_path / "run", "mlx", tmp_path / "mlx")["warnings"]
    assert [warning in text for text in warnings] == [True] * bool(warning)
    ids = real_ids(tmp_path / "run", LENGTH)
    theirs = np.array(mlx_load(str(tmp_path / "mlx"))[0](mx.array([ids])))[0]
    np.testing.assert_allclose(theirs[right], their_logits(folder, ids)[right], atol=2e-4, rtol=0)


def test_gemma_3_with_images_is_read_without_them(tmp_path: Path, bpe: Path) -> None:
    text = {**SIZES, **KINDS["Gemma 3"][1]}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "hf")
    shutil.copyfile(bpe, tmp_path / "hf" / bpe.name)
    (warning,) = import_model(tmp_path / "hf", tmp_path / "run")["warnings"]
    assert warning.endswith("tensors for images, which are not supported")
    ids = real_ids(tmp_path / "run", LENGTH)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(our_logits(tmp_path / "run", ids), theirs, atol=1e-4, rtol=0)


def test_the_embedding_scale_is_rounded_as_in_transformers(tmp_path: Path, bpe: Path) -> None:
    """sqrt(72) is 8.485, and 8.5 in bfloat16."""
    sizes = {**SIZES, "hidden_size": 72, "head_dim": 16, "num_hidden_layers": 1}
    transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes)).save_pretrained(tmp_path / "hf")
    shutil.copyfile(bpe, tmp_path / "hf" / bpe.name)
    found, ids = load_hf_folder(tmp_path / "hf"), list(range(100))
    params = {name: mx.array(found.weights[name]) for name in ("model.embed_tokens.weight",)}
    for name in ("float32", "bfloat16"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=getattr(torch, name))
        with torch.no_grad():
            expected = theirs.model.embed_tokens(torch.tensor(ids)).float().numpy()
        ours = embed(params, mx.array([ids]), found.model, getattr(mx, name))
        assert ours.dtype == getattr(mx, name)
        np.testing.assert_array_equal(np.array(ours.astype(mx.float32)), expected)


GEMMA = {"post_norms": True, "embedding_scale": 48**0.5, "ffn_activation": "gelu"}
S, F = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("target", "shape", "problem"),
    [
        ("gguf", GEMMA, "model.post_norms: exports to gguf do not support Gemma2: export to hf"),
        ("gguf", {"rotary_fraction": 0.5}, "model.rotary_fraction: exports to gguf do not support Phi3"),
        ("hf", {"post_norms": True}, r"model.embedding_scale: null: Gemma2 always multiplies by sqrt\(d_model\)"),
        ("hf", {**GEMMA, "attention_bias": True}, r"model.attention_bias: Gemma2 \(model.post_norms\) has no biases"),
        ("hf", {"attention_scale": 0.5}, "model.attention_scale: 0.5: Llama has no such setting"),
        ("hf", {**GEMMA, "attention_scale": 0.8}, r"model.attention_scale: 0.8: Gemma2 supports 1 / sqrt\(n\) for"),
        ("hf", {"attention_softcap": 5.0}, "model.attention_softcap: 5: Llama has no softcap of attention scores"),
        ("mlx", GEMMA, "model.attention_softcap: null: Gemma2 in mlx-lm requires one: export to hf"),
        ("hf", {"sliding_window": 8, "rope_local_theta": 9.0}, "model.rope_local_theta: 9: Mistral has one rope_theta"),
        ("hf", {"rotary_fraction": 0.5, "qk_norm": True}, "model.rotary_fraction: 0.5: Qwen3 rotates whole heads"),
        ("hf", {"rotary_fraction": 0.5, "head_dim": 16}, "model.head_dim: 16: Phi3 requires d_model / n_heads"),
        (
            "hf",
            {"rotary_fraction": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            r"model.rope_scaling.type: linear: Phi3 \(model.rotary_fraction\) supports only longrope",
        ),
        (
            "hf",
            {"rotary_fraction": 0.5, "sliding_window": 8, "layer_types": [S, F]},
            "model.layer_types: Phi3 has one sliding window for all layers",
        ),
        (
            "mlx",
            {**GEMMA, "qk_norm": True, "sliding_window": 8, "layer_types": [F, S]},
            "model.layer_types: Gemma3 in mlx-lm requires full_attention in every nth layer",
        ),
        (
            "hf",
            {**GEMMA, "qk_norm": True, "sliding_window": 8, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "model.rope_scaling: Gemma3 does not scale layers with a sliding window: set model.rope_local_theta",
        ),
        (
            "gguf",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_seq_len": 64}},
            "model.rope_scaling.type: yarn: exports of Llama to gguf support linear and llama3",
        ),
        (
            "mlx",
            {"rope_scaling": {"type": "yarn", "original_max_seq_len": 64, "attention_factor": 1.5}},
            "model.rope_scaling.attention_factor: mlx-lm computes it from factor: export to hf",
        ),
        (
            "mlx",
            {"rope_scaling": {"type": "yarn", "original_max_seq_len": 64, "truncate": False}},
            "model.rope_scaling.truncate: false: mlx-lm always rounds: export to hf",
        ),
    ],
    ids=str,
)
def test_what_an_export_cannot_express_is_refused_by_name(
    tmp_path: Path, bpe: Path, target: Any, shape: dict[str, Any], problem: str
) -> None:
    run = make_run(tmp_path / "run", bpe, **shape)
    with pytest.raises(UserError, match=rf"can't be exported to {target}: {problem}"):
        export(run, target, tmp_path / "out")
