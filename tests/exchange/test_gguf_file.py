"""GGUF files, read back by the gguf package and compared with the checkpoint and the tokenizer."""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece

from anarchobot.config.errors import UserError
from anarchobot.exchange import gguf_file
from anarchobot.exchange.exporting import export
from anarchobot.exchange.gguf_file import tokenizer_fields
from anarchobot.exchange.importing import import_model
from anarchobot.tokenizers.tokenizer import load_tokenizer
from tests.exchange.random_run import make_run

# Written by hand from llama.cpp's documentation, independently of the module.
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
    "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
    "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
    "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v.weight",
    "model.layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight",
    "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
    "model.layers.1.mlp.gate_proj.weight": "blk.1.ffn_gate.weight",
    "model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up.weight",
    "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
}


def read(run: Path, output: Path, dtype: Any = "float32") -> gguf.GGUFReader:
    export(run, "gguf", output, dtype)
    return gguf.GGUFReader(output / "model.gguf")


def field(reader: gguf.GGUFReader, name: str) -> Any:
    found = reader.get_field(name)
    return None if found is None else found.contents()


def test_scaled_rotary_embeddings(tmp_path: Path, bpe: Path) -> None:
    """llama.cpp divides the frequency of each pair by rope_freqs, or all of them by a factor."""
    shape = {"head_dim": 16, "rope_theta": 5e5, "sliding_window": 100}
    scaling = {"type": "llama3", "factor": 8.0, "original_max_seq_len": 512}
    reader = read(make_run(tmp_path / "a", bpe, **shape, rope_scaling=scaling), tmp_path / "llama3")
    assert field(reader, "general.architecture") == "llama"  # llama.cpp has no Mistral
    assert field(reader, "llama.context_length") == 100  # nor its window, so longer texts would differ
    (found,) = (tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    expected = []
    for i in range(8):  # Llama 3.1's reference code, with low_freq_factor 1 and high_freq_factor 4
        wavelength = 2 * np.pi * 5e5 ** (2 * i / 16)
        smooth = (512 / wavelength - 1) / (4 - 1)
        middle = 1 / ((1 - smooth) / 8 + smooth)
        expected.append(1.0 if wavelength < 512 / 4 else 8.0 if wavelength > 512 else middle)
    assert 1 < expected[2] < 8
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    scaling = {"type": "linear", "factor": 4.0}
    reader = read(make_run(tmp_path / "b", bpe, **shape, rope_scaling=scaling), tmp_path / "linear")
    assert field(reader, "llama.rope.scaling.type") == "linear" and field(reader, "llama.rope.scaling.factor") == 4


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_tensors_equal_the_checkpoint(tmp_path: Path, bpe: Path, dtype: Any, kind: str) -> None:
    torch = pytest.importorskip("torch")
    shape = {"qk_norm": kind == "qwen3", "attention_bias": kind == "qwen2", "tie_embeddings": False}
    run = make_run(tmp_path / "run", bpe, **shape)
    reader = read(run, tmp_path / "gguf", dtype)
    assert field(reader, "general.architecture") == kind
    found = {t.name: t for t in reader.tensors}
    with np.load(run / "step_00000040" / "model.npz") as npz:
        params = dict(npz)
    names = dict(NAMES)
    if kind == "qwen2":
        names |= {f"model.layers.1.self_attn.{x}_proj.bias": f"blk.1.attn_{x}.bias" for x in "qkv"}
    if kind == "qwen3":
        names |= {f"model.layers.1.self_attn.{x}_norm.weight": f"blk.1.attn_{x}_norm.weight" for x in "qk"}
    names |= {ours.replace(".1.", ".0."): theirs.replace(".1.", ".0.") for ours, theirs in names.items()}
    assert set(names) == set(params) and set(names.values()) == set(found)
    for ours, theirs in names.items():
        expected, tensor = params[ours], found[theirs]
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        else:
            data = np.asarray(tensor.data, np.float32)
        if expected.ndim == 1:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        else:
            expected = torch.from_numpy(expected).to(getattr(torch, dtype)).float().numpy()
        if kind == "llama" and ours.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates rows 2i and 2i + 1 of a head together, our model i and i + E/2.
            head = 12
            for row in range(len(data)):
                i = row % head
                assert np.array_equal(data[row], expected[row - i + i // 2 + (head // 2) * (i % 2)]), ours
        else:
            np.testing.assert_array_equal(data, expected, err_msg=ours)


def test_keys_describe_the_shape(tmp_path: Path, bpe: Path) -> None:
    shape = {"n_kv_heads": 2, "head_dim": 20, "rope_theta": 50000.0, "norm_eps": 1e-6, "mlp_multiple": 2.5}
    reader = read(make_run(tmp_path / "a run", bpe, **shape), tmp_path / "gguf")
    assert field(reader, "general.architecture") == "llama" and field(reader, "general.name") == "a run"
    expected = {
        "context_length": 1024, "embedding_length": 48, "block_count": 2, "feed_forward_length": 120,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 20,
        "attention.value_length": 20, "rope.dimension_count": 20, "rope.freq_base": 50000.0, "vocab_size": 500,
    }  # fmt: skip
    assert {key: field(reader, f"llama.{key}") for key in expected} == expected
    assert field(reader, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)


def test_sentencepiece_vocabulary(tmp_path: Path, bpe: Path) -> None:
    reader = read(make_run(tmp_path / "run", bpe, n_layers=1), tmp_path / "gguf")
    truth = sentencepiece.SentencePieceProcessor(model_file=str(bpe))
    ids = range(truth.vocab_size())
    assert field(reader, "tokenizer.ggml.model") == "llama"
    assert field(reader, "tokenizer.ggml.tokens") == [truth.id_to_piece(i) for i in ids]
    np.testing.assert_array_equal(
        np.float32(field(reader, "tokenizer.ggml.scores")), np.float32([truth.get_score(i) for i in ids])
    )
    kinds = [6 if truth.is_byte(i) else 3 if truth.is_control(i) else 2 if truth.is_unknown(i) else 1 for i in ids]
    assert field(reader, "tokenizer.ggml.token_type") == kinds
    special_ids = {key: field(reader, f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "unknown")}
    assert special_ids == {"bos": truth.eos_id(), "eos": truth.eos_id(), "unknown": truth.unk_id()}
    flags = [field(reader, f"tokenizer.ggml.{key}") for key in ("add_bos_token", "add_eos_token", "add_space_prefix")]
    assert flags == [True, False, False]


@pytest.mark.parametrize("kind", ["gpt2", "json"])
def test_byte_level_bpe_vocabulary(tmp_path: Path, tokenizers_folder: Path, kind: str) -> None:
    folder = tokenizers_folder / kind
    (path,) = (p for p in folder.iterdir() if p.name.endswith(("vocab.json", "tokenizer.json")))
    reader = read(make_run(tmp_path / "run", path, n_layers=1), tmp_path / "gguf")
    vocab = json.loads((tokenizers_folder / "gpt2" / "tiny-vocab.json").read_text())
    merges = (tokenizers_folder / "gpt2" / "tiny-merges.txt").read_text().splitlines()
    assert field(reader, "tokenizer.ggml.model") == "gpt2" and field(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert field(reader, "tokenizer.ggml.tokens") == sorted(vocab, key=vocab.__getitem__)
    assert field(reader, "tokenizer.ggml.merges") == [m for m in merges if not m.startswith("#version")]
    assert field(reader, "tokenizer.ggml.token_type") == [3, 3, 3] + [1] * 497
    assert field(reader, "tokenizer.ggml.eos_token_id") == vocab["<|endoftext|>"]


def test_pre_tokenizers(tmp_path: Path, tokenizers_folder: Path) -> None:
    """llama.cpp has names for Llama 3's and Qwen 2's; others are rejected. Unused ids get placeholders."""
    whole = json.loads((tokenizers_folder / "json" / "tokenizer.json").read_text())
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

    def of(pattern: str, normalizer: Any = None) -> Any:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        before = {"type": "Sequence", "pretokenizers": [split, last]}
        extra = {**whole["added_tokens"][0], "id": 510, "content": "<|later|>", "special": False}
        tokens = [*whole["added_tokens"], extra]
        changed = {**whole, "pre_tokenizer": before, "normalizer": normalizer, "added_tokens": tokens}
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        return tokenizer_fields(load_tokenizer(tmp_path / "tokenizer.json"), 0, None)

    assert of(words + "{1,3}" + rest)["tokenizer_pre"] == "llama-bpe"
    found = of(words + rest, {"type": "NFC"})
    assert found["tokenizer_pre"] == "qwen2"
    added = found["token_list"].index("<|later|>")
    assert found["token_types"][added] == 4 and len(found["token_list"]) == len(found["token_types"]) == added + 1
    with pytest.raises(
        UserError, match=r"tokenizer.json: this tokenizer can't be exported to GGUF: its pre-tokenizer is not"
    ):
        of(words + "+" + rest)
    with pytest.raises(UserError, match=r"llama.cpp has no Lowercase normalizer: export to hf or mlx"):
        of(words + rest, {"type": "Lowercase"})


def test_tokens_beyond_the_rows_of_the_model_are_left_out(tmp_path: Path, tokenizers_folder: Path) -> None:
    """Such as Gemma's image token in a model for text."""
    plain = tokenizers_folder / "json" / "tokenizer.json"
    spec = json.loads(plain.read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 500, "content": "<image>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "config.json").write_text('{"vocab_size": 500}')
    found, expected = (tokenizer_fields(load_tokenizer(file), 0, None) for file in (tmp_path, plain))
    assert found == expected and len(found["token_list"]) == 500


def test_unigram_is_rejected(tmp_path: Path, tokenizers_folder: Path) -> None:
    run = make_run(tmp_path / "run", tokenizers_folder / "unigram" / "tokenizer.model", n_layers=1)
    with pytest.raises(
        UserError, match=r"can't be exported to GGUF: .* only SentencePiece BPE with byte fallback: export to hf or mlx"
    ):
        export(run, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_package_is_a_one_line_error(tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", bpe, n_layers=1)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"need the gguf package: pip install 'anarchobot\[gguf\]'$"):
        export(run, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_interleaved_rows_give_the_same_attention_scores() -> None:
    """RoPE on adjacent pairs of interleaved rows equals RoPE on the halves of the original rows."""
    rng = np.random.default_rng(0)
    E, D, t, s = 12, 7, 5, 3
    q, k, x, y = (rng.standard_normal(shape).astype(np.float32) for shape in ((2 * E, D), (2 * E, D), (D,), (D,)))

    def rotated(v: Any, position: int, adjacent: bool) -> Any:
        z = v[0::2] + 1j * v[1::2] if adjacent else v[: E // 2] + 1j * v[E // 2 :]
        return z * np.exp(1j * position * 10000.0 ** (-np.arange(E // 2) * 2 / E))

    for head in range(2):
        rows = slice(head * E, head * E + E)
        halves = rotated((q @ x)[rows], t, False) @ rotated((k @ y)[rows], s, False).conj()
        iq, ik = gguf_file.interleave(q, E), gguf_file.interleave(k, E)
        pairs = rotated((iq @ x)[rows], t, True) @ rotated((ik @ y)[rows], s, True).conj()
        assert pairs.real == pytest.approx(halves.real, rel=1e-5)


def test_imported_sentencepiece_with_added_tokens(tmp_path: Path, bpe: Path) -> None:
    """An import uses tokenizer.json, which GGUF can't represent, and keeps the tokenizer.model for this."""
    (source := tmp_path / "source").mkdir()
    (source / "tokenizer.model").write_bytes(bpe.read_bytes())
    (source / "added_tokens.json").write_text('{"<|stop|>": 500, "<tool>": 501}')
    (source / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<|stop|>"]}')
    run = make_run(tmp_path / "run", source / "tokenizer.model", n_layers=1)
    expected = read(run, tmp_path / "a")
    names, types = (field(expected, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(bpe))
    assert names == [*(pieces.id_to_piece(i) for i in range(500)), "<|stop|>", "<tool>"]
    assert types[-2:] == [gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED]
    export(run, "hf", tmp_path / "hf")
    assert import_model(tmp_path / "hf", tmp_path / "again")["tokenizer"] == "tokenizer.json"
    found = read(tmp_path / "again", tmp_path / "b")
    for key in ("tokens", "token_type", "scores", "bos_token_id", "eos_token_id", "add_bos_token", "add_space_prefix"):
        assert field(found, f"tokenizer.ggml.{key}") == field(expected, f"tokenizer.ggml.{key}"), key
