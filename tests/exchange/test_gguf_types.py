"""Quantized GGUF files, read back by the gguf package."""

import ctypes
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.exchange import gguf_file
from anarchobot.exchange.exporting import export
from anarchobot.runs import checkpoint
from tests.exchange.random_run import make_run, random_parameters
from tests.exchange.test_gguf_file import NAMES

LEVELS = {"q8_0": 127, "q5_1": 31, "q5_0": 16, "q4_1": 15, "q4_0": 8}  # steps in the range of a block
BITS = {"q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5}  # with a float16 scale, and in _1 a minimum


def tensors_of(folder: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


@pytest.mark.parametrize("kind", LEVELS)
def test_weights_are_within_a_step_and_the_head_has_eight_bits(tmp_path: Path, bpe: Path, kind: str) -> None:
    run = make_run(tmp_path / "run", bpe, d_model=64, qk_norm=True, tie_embeddings=False)  # qk_norm: not interleaved
    done = export(run, "gguf", tmp_path / "gguf", gguf_type=kind)
    params, found = random_parameters(checkpoint.find(run).config.model), tensors_of(tmp_path / "gguf")
    names = NAMES | {f"model.layers.1.self_attn.{x}_norm.weight": f"blk.1.attn_{x}_norm.weight" for x in "qk"}
    for ours, theirs in names.items():
        expected, tensor = params[ours], found[theirs]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        stored = "f32" if expected.ndim == 1 else "q8_0" if ours == "lm_head.weight" else kind
        assert tensor.tensor_type.name.lower() == stored, ours
        if stored == "f32":
            np.testing.assert_array_equal(values, expected)
            continue
        blocks = expected.reshape(-1, 32)
        widest = np.ptp(blocks, axis=1) if stored.endswith("_1") else np.abs(blocks).max(axis=1)
        errors = np.abs(values.reshape(-1, 32) - blocks).max(axis=1)
        assert (errors <= 1.01 * widest / LEVELS[stored]).all() and errors.max() > 0.1 * widest.max() / LEVELS[stored]
    # Bits of the matrices, the head and the norms.
    head, norms = params["lm_head.weight"].size, sum(array.size for array in params.values() if array.ndim == 1)
    total = sum(array.size for array in params.values())
    expected_bits = (BITS[kind] * (total - head - norms) + 8.5 * head + 32 * norms) / total
    assert done["bits_per_weight"] == pytest.approx(expected_bits) and done["warnings"] == []
    assert sum(done["types"].values()) == len(params)
    reader = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf")
    file_type = reader.get_field("general.file_type")
    assert file_type is not None and file_type.contents() == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]


def test_rows_that_cannot_be_divided_are_float16_and_named(tmp_path: Path, bpe: Path) -> None:
    run = make_run(tmp_path / "run", bpe, d_model=48, mlp_multiple=2.67)  # rows of 48 and 128 weights
    done = export(run, "gguf", tmp_path / "gguf", gguf_type="q4_0")
    patterns = ["token_embd.weight", *(f"blk.*.{x}.weight" for x in (*(f"attn_{y}" for y in ("q", "k", "v", "output")),
                "ffn_gate", "ffn_up"))]  # fmt: skip
    assert done["warnings"] == [
        f"13 matrices are f16: their rows can't be divided into blocks of 32: {', '.join(patterns)}"
    ]
    assert done["types"] == {"f16": 13, "q4_0": 2, "f32": 5}
    assert f"> {done['warnings'][0]}" in (tmp_path / "gguf" / "README.md").read_text()


@pytest.mark.parametrize("shape", [{}, {"qk_norm": True}, {"tie_embeddings": False, "embedding_scale": 2.0}], ids=str)
def test_parameters_are_read_back(tmp_path: Path, bpe: Path, shape: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", bpe, **shape)
    export(run, "gguf", tmp_path / "gguf")
    model = checkpoint.find(run).config.model
    expected = random_parameters(model)
    expected["model.embed_tokens.weight"] *= shape.get("embedding_scale", 1)
    found = gguf_file.read_parameters(tmp_path / "gguf" / "model.gguf", model)
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_value_beyond_the_scale_of_a_block_leaves_no_files(tmp_path: Path, bpe: Path) -> None:
    run = make_run(tmp_path / "run", bpe, d_model=64, tie_embeddings=False, embedding_scale=1e6)
    with pytest.raises(UserError, match=r"model.embed_tokens.weight: value \S+ exceeds float16's maximum"):
        export(run, "gguf", tmp_path / "out", gguf_type="q4_0")
    assert not (tmp_path / "out").exists()


def test_k_quants_are_made_by_llama_cpp(tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that copies the file. The real one was checked by hand (docs/export.md)."""
    asked: list[tuple[str, int]] = []

    class Params(ctypes.Structure):
        _fields_ = (("ftype", ctypes.c_int),)

    def quantize(source: bytes, output: bytes, params: Any) -> int:
        asked.append((Path(source.decode()).name, params._obj.ftype))
        shutil.copy(source.decode(), output.decode())
        return failure

    run, failure = make_run(tmp_path / "run", bpe, d_model=64), 0
    package = SimpleNamespace(
        LLAMA_FTYPE_MOSTLY_Q4_K_M=15, llama_model_quantize_default_params=Params, llama_model_quantize=quantize
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    done = export(run, "gguf", tmp_path / "gguf", gguf_type="q4_k_m")
    assert asked == [("model.f32.gguf", 15)] and set(done["files"]) == {"model.gguf", "README.md"}
    assert done["warnings"][0].startswith("15 matrices are f32: their rows can't be divided into blocks of 256: token_")
    failure = 1
    with pytest.raises(UserError, match=r"llama.cpp can't quantize this model to q4_k_m"):
        export(run, "gguf", tmp_path / "out", gguf_type="q4_k_m")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(
        UserError, match=r"^K-quants need llama.cpp: pip install 'anarchobot\[llama-cpp\]', or choose --type q8_0"
    ):
        export(run, "gguf", tmp_path / "out", gguf_type="q4_k_m")
    assert not (tmp_path / "out").exists()
