"""Exports: transformers and mlx-lm compute our logits."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import transformers
from mlx_lm import load as mlx_load
from mlx_lm.generate import generate_step
from safetensors.numpy import load_file

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig
from anarchobot.exchange.exporting import export
from anarchobot.inference.model import load_model
from tests.exchange.random_run import make_run, our_logits, real_ids
from tests.inference.conftest import generate_ids

torch = pytest.importorskip("torch")

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie_embeddings": False, "n_kv_heads": None, "rope_theta": 50000.0, "norm_eps": 1e-6},
    "wide heads": {"head_dim": 20},
    "scaled": {"tie_embeddings": False, "embedding_scale": 6.5},
    "qwen3": {"qk_norm": True},
    "qwen2": {"attention_bias": True},
    "qwen2, untied": {"attention_bias": True, "n_kv_heads": 4, "tie_embeddings": False, "embedding_scale": 3.0},
    "qwen3, 3 heads": {"qk_norm": True, "n_heads": 5, "n_kv_heads": 1, "head_dim": 16, "tie_embeddings": False},
}


def transformers_model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def transformers_logits(folder: Path, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return transformers_model(folder)(torch.tensor([ids])).logits[0].numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_and_mlx_lm_compute_our_logits_on_1000_tokens(tmp_path: Path, bpe: Path, name: str) -> None:
    run = make_run(tmp_path / "run", bpe, **SHAPES[name])
    ids = real_ids(run)
    assert len(ids) == 1000
    ours = our_logits(run, ids)
    assert ours.std() > 0.2
    export(run, "hf", tmp_path / "hf")
    kind = type(transformers_model(tmp_path / "hf")).__name__
    assert kind == {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM"}.get(name[:5], "LlamaForCausalLM")
    np.testing.assert_allclose(transformers_logits(tmp_path / "hf", ids), ours, atol=1e-4, rtol=0)
    export(run, "mlx", tmp_path / "mlx")
    theirs, _ = mlx_load(str(tmp_path / "mlx"))[:2]
    np.testing.assert_allclose(np.array(theirs(mx.array([ids])))[0], ours, atol=1e-4, rtol=0)


def test_gelu_can_only_be_exported_to_hf(tmp_path: Path, bpe: Path) -> None:
    run = make_run(tmp_path / "run", bpe, ffn_activation="gelu")
    ids = real_ids(run, 300)
    export(run, "hf", tmp_path / "hf")
    np.testing.assert_allclose(transformers_logits(tmp_path / "hf", ids), our_logits(run, ids), atol=1e-4, rtol=0)
    for target in ("mlx", "gguf"):
        with pytest.raises(UserError, match=r"model.ffn_activation: gelu: .* supports only silu: export to hf"):
            export(run, target, tmp_path / "no")  # type: ignore[arg-type]


def test_greedy_decoding_gives_equal_tokens(tmp_path: Path, tokenizer_path: Path) -> None:
    """Each program uses its own loop, cache and tokenizer."""
    name = "qwen3" if tokenizer_path.parent.name in ("gpt2", "unigram") else "llama"
    run = make_run(tmp_path / "run", tokenizer_path, **{**SHAPES[name], "tie_embeddings": False})
    export(run, "hf", tmp_path / "hf")
    model, _ = load_model(run)
    settings = GenerationConfig(prompt="The text of a", method="greedy", max_new_tokens=60)
    ours = generate_ids(model, settings)
    assert len(ours) == 60
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = tokenizer(settings.prompt, return_tensors="pt")
    out = transformers_model(tmp_path / "hf").generate(**prompt, max_new_tokens=60, do_sample=False)
    assert out[0, prompt["input_ids"].shape[1] :].tolist() == ours
    theirs, mlx_tokenizer = mlx_load(str(tmp_path / "hf"))[:2]
    ids = mx.array(mlx_tokenizer.encode(settings.prompt))
    assert [int(token) for token, _ in generate_step(ids, theirs, max_tokens=60)] == ours


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_are_rounded_and_half_the_size(tmp_path: Path, bpe: Path, dtype: Any) -> None:
    run = make_run(tmp_path / "run", bpe)
    whole = export(run, "hf", tmp_path / "whole")["files"]["model.safetensors"]
    assert 1.9 < whole / export(run, "hf", tmp_path / "half", dtype)["files"]["model.safetensors"] < 2
    model = transformers_model(tmp_path / "half")
    assert model.dtype == getattr(torch, dtype)
    full = transformers_model(tmp_path / "whole").state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, full[key].to(tensor.dtype)), key


@pytest.mark.parametrize("target", ["hf", "mlx", "gguf"])
@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ({"logit_softcap": 30.0}, "model.logit_softcap: 30: Llama has no logit softcap"),
        ({"attention_bias": True, "qk_norm": True}, "model.attention_bias: no supported architecture has both"),
        ({"embedding_scale": 8.0}, "model.embedding_scale: 8: Llama has no such scale, and with model.tie_embeddings"),
    ],
    ids=str,
)
def test_unsupported_settings_are_rejected_by_name(
    tmp_path: Path, bpe: Path, target: Any, shape: dict[str, Any], problem: str
) -> None:
    run = make_run(tmp_path / "run", bpe, n_layers=1, **shape)
    with pytest.raises(UserError, match=rf"can't be exported to {target}: {problem}"):
        export(run, target, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_n_heads_that_does_not_divide_d_model(tmp_path: Path, bpe: Path) -> None:
    """transformers rejects it for Llama but not for Qwen3; GGUF stores the head size explicitly."""
    run = make_run(tmp_path / "run", bpe, n_heads=5, n_kv_heads=5, head_dim=16)
    with pytest.raises(UserError, match=r"model.n_heads: 5: .*: export to gguf"):
        export(run, "hf", tmp_path / "out")
    export(run, "gguf", tmp_path / "out")


@pytest.mark.parametrize("shape", [{"head_dim": 16}, {"n_heads": 5, "n_kv_heads": 5, "head_dim": 16}], ids=str)
def test_head_dim_with_attention_bias(tmp_path: Path, bpe: Path, shape: dict[str, Any]) -> None:
    """Only Qwen2 in transformers supports it."""
    run = make_run(tmp_path / "run", bpe, attention_bias=True, **shape)
    ids = real_ids(run, 100)
    export(run, "hf", tmp_path / "hf")
    np.testing.assert_allclose(transformers_logits(tmp_path / "hf", ids), our_logits(run, ids), atol=1e-4, rtol=0)
    for target in ("mlx", "gguf"):
        with pytest.raises(UserError, match=r"model.head_dim: 16: Qwen2 .* requires d_model / n_heads: export to hf"):
            export(run, target, tmp_path / "no")  # type: ignore[arg-type]


def test_float16_overflow_leaves_no_files(tmp_path: Path, bpe: Path) -> None:
    run = make_run(tmp_path / "run", bpe, tie_embeddings=False, embedding_scale=1e6)
    with pytest.raises(UserError, match=r"model.embed_tokens.weight: value \S+ exceeds float16's maximum"):
        export(run, "hf", tmp_path / "out", "float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_nothing_is_overwritten(tmp_path: Path, bpe: Path) -> None:
    run = make_run(tmp_path / "run", bpe, n_layers=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(UserError, match=r"full: already exists and is not empty: choose another folder, or remove it"):
        export(run, "hf", tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes"]
    (tmp_path / "empty").mkdir()
    export(run, "hf", tmp_path / "empty")
    with pytest.raises(UserError, match=r"already exists and is not empty"):
        export(run, "mlx", tmp_path / "empty")
    with pytest.raises(UserError, match=r"notes: is a file: choose"):
        export(run, "hf", tmp_path / "full" / "notes")
    with pytest.raises(UserError, match=r"nothere: no checkpoint here"):
        export(tmp_path / "nothere", "hf", tmp_path / "out")


def test_exported_files(tmp_path: Path, bpe: Path) -> None:
    run = make_run(tmp_path / "run", bpe)
    done = export(run / "step_00000040", "mlx", tmp_path / "deep" / "down" / "mlx")
    folder = tmp_path / "deep" / "down" / "mlx"
    assert set(done["files"]) == {p.name for p in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    }  # fmt: skip
    assert (folder / "tokenizer.model").read_bytes() == bpe.read_bytes()
    eod = load_model(run)[0].tokenizer.eod_id
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": eod, "eos_token_id": eod}
    npz = np.load(run / "step_00000040" / "model.npz")
    found = load_file(folder / "model.safetensors")
    assert set(found) == set(npz.files)
    assert all(np.array_equal(found[name], npz[name]) for name in found)
    assert mx.load(str(folder / "model.safetensors"), return_metadata=True)[1] == {"format": "mlx"}  # type: ignore[call-overload]
