"""Model folders that only mlx-lm computes: what is read, and what is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.exchange.exporting import export
from anarchobot.exchange.importing import import_model, load_hf_folder
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.inference.model import load_model
from anarchobot.model.architecture import forward_pass
from anarchobot.model.loss import logits
from tests.exchange.test_importing import VOCAB
from tests.model.mlx_lm.families import CONFIGS, mlx_lm_module, write_model

IDS = np.random.default_rng(0).integers(0, VOCAB, (1, 20)).astype(np.int32)


def folder_of(path: Path, tokenizers_folder: Path, name: str = "experts", **changes: Any) -> Path:
    write_model(path, {**CONFIGS[name], "vocab_size": VOCAB, **changes})
    shutil.copyfile(tokenizers_folder / "json" / "tokenizer.json", path / "tokenizer.json")
    return path


def our_logits(folder: Path) -> np.ndarray:
    model, _ = load_model(folder)
    hidden = forward_pass(model.config).hidden_states(model.params, mx.array(IDS), model.config, dtype=mx.float32)
    return np.array(logits(hidden, model.params, model.config))


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def tensors(folder: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(folder / "model.safetensors"))
    assert isinstance(arrays, dict)
    return arrays


@pytest.mark.parametrize("name", ["experts", "scaled logits"])
def test_imported_and_exported_models_give_the_logits_of_mlx_lm(
    tmp_path: Path, tokenizers_folder: Path, name: str
) -> None:
    folder = folder_of(tmp_path / "hf", tokenizers_folder, name)
    summary = import_model(folder, tmp_path / "run")
    (warning, *_) = summary["warnings"]
    assert warning.startswith("mlx-lm computes this model (model.architecture: mlx_lm): unsupported model_type")
    export(tmp_path / "run", "mlx", tmp_path / "mlx")
    theirs = np.array(mlx_lm_module(folder)(mx.array(IDS)))
    for path in (folder, tmp_path / "run", tmp_path / "mlx"):
        np.testing.assert_allclose(our_logits(path), theirs, atol=1e-5)
    np.testing.assert_allclose(np.array(mlx_lm_module(tmp_path / "mlx")(mx.array(IDS))), theirs, atol=1e-5)
    with pytest.raises(UserError, match=r"can't be exported to gguf: model\.architecture: mlx_lm"):
        export(tmp_path / "run", "gguf", tmp_path / "gguf")


def test_export_to_hf_only_with_the_tensors_of_the_folder(tmp_path: Path, tokenizers_folder: Path) -> None:
    """mlx-lm stacks the experts of Hugging Face's files."""
    folder = folder_of(tmp_path / "hf", tokenizers_folder)
    import_model(folder, tmp_path / "same")
    export(tmp_path / "same", "hf", tmp_path / "out")
    assert set(tensors(tmp_path / "out")) == set(tensors(folder))
    arrays = {}
    for name, array in tensors(folder).items():
        if "switch_mlp" in name:
            arrays |= {name.replace("switch_mlp", f"experts.{i}"): part for i, part in enumerate(array)}
        else:
            arrays[name] = array
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    import_model(folder, tmp_path / "stacked")
    np.testing.assert_allclose(our_logits(tmp_path / "stacked"), our_logits(tmp_path / "same"), atol=1e-6)
    with pytest.raises(UserError, match="has other tensors than the files it came from: export to mlx"):
        export(tmp_path / "stacked", "hf", tmp_path / "refused")


def test_what_does_not_fit_is_named(tmp_path: Path, tokenizers_folder: Path) -> None:
    folder = folder_of(tmp_path / "hf", tokenizers_folder)
    arrays = tensors(folder)
    mx.eval(arrays)
    missing = "model.layers.1.self_attn.q_proj.weight"
    mx.save_safetensors(str(folder / "model.safetensors"), {n: a for n, a in arrays.items() if n != missing})
    with pytest.raises(UserError, match=rf"mlx-lm can't load this model: .*{missing}"):
        load_hf_folder(folder)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays | {"model.layers.0.extra.weight": mx.zeros(3)})
    with pytest.raises(UserError, match=r"mlx-lm can't load this model: .*extra\.weight"):
        load_hf_folder(folder)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays | {missing: mx.full((32, 32), np.nan)})
    with pytest.raises(UserError, match=f"{missing} contains a value that is not finite"):
        import_model(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_files_that_no_index_lists_are_checked_too(tmp_path: Path, tokenizers_folder: Path) -> None:
    """mlx-lm reads all files model*.safetensors."""
    folder = folder_of(tmp_path / "hf", tokenizers_folder)
    header = b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'
    (folder / "model-2.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match=r"model-2\.safetensors: truncated"):
        load_hf_folder(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "unheard_of"}, "unsupported model_type 'unheard_of'.*mlx-lm has no such model either"),
        ({"model_file": "modeling.py"}, "model_file: modeling.py: code of a model is never run"),
        ({"num_hidden_layers": 200_000_000}, "200,000,000 blocks, but the safetensors files have"),
        ({"hidden_size": None}, "mlx-lm can't build a qwen3_moe from it"),
    ],
    ids=str,
)
def test_refused_configs(tmp_path: Path, tokenizers_folder: Path, values: dict[str, Any], message: str) -> None:
    folder = folder_of(tmp_path / "hf", tokenizers_folder)
    change(folder, **values)
    (folder / "modeling.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(UserError, match=message):
        load_hf_folder(folder)


def test_a_window_that_mlx_lm_ignores_limits_the_length(tmp_path: Path, tokenizers_folder: Path) -> None:
    folder = folder_of(tmp_path / "hf", tokenizers_folder)
    change(folder, sliding_window=40, use_sliding_window=True)
    found = load_hf_folder(folder)
    assert found.model.max_seq_len == 40
    assert "mlx-lm ignores sliding_window: 40: sequences are limited to 40 tokens" in found.warnings
    change(folder, use_sliding_window=False)
    assert load_hf_folder(folder).model.max_seq_len == 128


def test_quantized_layers_stay_quantized(tmp_path: Path, tokenizers_folder: Path) -> None:
    from tests.model.mlx_lm.test_gradients import quantized

    folder = folder_of(tmp_path / "hf", tokenizers_folder)
    packed = quantized(folder, tmp_path / "packed")
    shutil.copyfile(folder / "tokenizer.json", packed / "tokenizer.json")
    base = load_pretrained(str(packed))
    assert base.model.quantization == '{"bits": 4, "group_size": 32}'
    params = load_model(packed)[0].params
    assert params["model.layers.0.mlp.switch_mlp.up_proj.weight"].dtype == mx.uint32
    theirs = np.array(mlx_lm_module(packed)(mx.array(IDS)))
    np.testing.assert_allclose(our_logits(packed), theirs, atol=1e-5)
    import_model(packed, tmp_path / "run")  # dequantized
    np.testing.assert_allclose(our_logits(tmp_path / "run"), theirs, atol=1e-4)


def test_weights_are_dequantized_in_float32(tmp_path: Path, tokenizers_folder: Path) -> None:
    """Not in the dtype of the scales, in bfloat16 as mlx_lm.convert writes them: the imported model is the same."""
    from tests.model.mlx_lm.test_gradients import quantized

    folder = folder_of(tmp_path / "hf", tokenizers_folder)
    packed = quantized(folder, tmp_path / "packed", mx.bfloat16)
    shutil.copyfile(folder / "tokenizer.json", packed / "tokenizer.json")
    import_model(packed, tmp_path / "run")
    np.testing.assert_allclose(our_logits(tmp_path / "run"), our_logits(packed), atol=1e-4)


@pytest.mark.parametrize("kind", ["GPT2", "GptOss", "GPTNeoX"])
def test_forms_that_mlx_lm_does_not_read(tmp_path: Path, tokenizers_folder: Path, kind: str) -> None:
    """GPT-2's names have a prefix; gpt-oss's experts are not quantized, and YaRN's bounds are not rounded; GPT-NeoX has
    an exact GELU."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "initializer_range": 0.1, "attn_implementation": "eager"}
    if kind == "GPT2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    elif kind == "GPTNeoX":
        sizes |= {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    else:
        sizes |= {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
        }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")(config).eval()
    model.save_pretrained(tmp_path)
    shutil.copyfile(tokenizers_folder / "json" / "tokenizer.json", tmp_path / "tokenizer.json")
    with torch.no_grad():
        theirs = model(torch.tensor(IDS.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(our_logits(tmp_path), theirs, atol=2e-5)
