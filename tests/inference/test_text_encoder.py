"""Embeddings are those of transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.exchange import safetensors_file
from anarchobot.inference.text_encoder import TextEncoder
from tests.inference.encoder_folders import CONFIG, VOCAB, pooling, write_encoder

TEXTS = ["the beaver builds a dam", "apple", "the red river , the red apples and the beavers", ""]
TOKENS = [*TEXTS[:2], "the red river [UNK] the red apple ##s [UNK] the beaver ##s", ""]  # more than a model's 10 or 9
KINDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "bert, first token": {"files": pooling("cls_token"), "prefix": "bert."},
    "xlm-roberta": {"model_type": "xlm-roberta", "pad_token_id": 0, "type_vocab_size": 1, "prefix": "roberta."},
}
# The first four dimensions of the first text, by transformers 5.10.2 and torch 2.13.0 (the test below).
EXPECTED = {
    "bert": [0.064584, 0.212489, 0.303888, 0.243628],
    "bert, first token": [0.142648, 0.171776, 0.165528, 0.156395],
    "xlm-roberta": [-0.512196, 0.100883, -0.110099, 0.022715],
}


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_have_their_reference_values(kind: str, tmp_path: Path) -> None:
    encoder = TextEncoder(str(write_encoder(tmp_path / "m", **KINDS[kind])))
    embeddings = encoder.encode_passages(TEXTS)
    assert embeddings.shape == (len(TEXTS), encoder.dimensions) and encoder.dimensions == CONFIG["hidden_size"]
    np.testing.assert_allclose(embeddings[0, :4], EXPECTED[kind], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_question(TEXTS[0]), embeddings[0], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = write_encoder(tmp_path / "m", **KINDS[kind])
    embeddings = TextEncoder(str(folder)).encode_passages(TEXTS)
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    longest = CONFIG["max_position_embeddings"] - 2 - (kind == "xlm-roberta")
    for tokens, embedding in zip(TOKENS, embeddings, strict=True):
        ids = torch.tensor([[VOCAB[token] for token in ("[CLS]", *tokens.split()[:longest], "[SEP]")]])
        with torch.no_grad():
            states = model(input_ids=ids).last_hidden_state[0].double()
        pooled = states[0] if "first" in kind else states.mean(dim=0)
        np.testing.assert_allclose(embedding, pooled / pooled.norm(), atol=1e-5)


def test_settings_of_the_folder_apply(tmp_path: Path) -> None:
    """Prompts, and a shorter maximum length."""
    plain = TextEncoder(str(write_encoder(tmp_path / "plain")))
    prompts = {"config_sentence_transformers.json": {"prompts": {"query": "query : ", "document": "the "}}}
    encoder = TextEncoder(str(write_encoder(tmp_path / "prompts", files=prompts)))
    np.testing.assert_allclose(encoder.encode_question("dam"), plain.encode_question("query : dam"), atol=1e-6)
    np.testing.assert_allclose(encoder.encode_passages(["dam"])[0], plain.encode_question("the dam"), atol=1e-6)
    short = TextEncoder(
        str(write_encoder(tmp_path / "short", files={"sentence_bert_config.json": {"max_seq_length": 4}}))
    )
    np.testing.assert_allclose(short.encode_question("dam a red"), plain.encode_question("dam a"), atol=1e-6)
    assert len({plain.digest, encoder.digest, short.digest}) == 3
    assert TextEncoder(str(write_encoder(tmp_path / "same"))).digest == plain.digest
    assert TextEncoder(str(write_encoder(tmp_path / "other", seed=1))).digest != plain.digest


def test_half_precision_is_read(tmp_path: Path) -> None:
    full = TextEncoder(str(write_encoder(tmp_path / "full"))).encode_passages(TEXTS)
    for dtype in ("float16", "bfloat16"):
        half = TextEncoder(str(write_encoder(tmp_path / dtype, dtype=dtype))).encode_passages(TEXTS)
        np.testing.assert_allclose(half, full, atol=0.05)


def test_many_texts_of_different_lengths_keep_their_order(tmp_path: Path) -> None:
    encoder = TextEncoder(str(write_encoder(tmp_path / "m")))
    texts = [" ".join([["the", "beaver", "builds", "a", "dam"][i % 5]] * (i % 7)) for i in range(70)]
    each = np.stack([encoder.encode_question(text) for text in texts])
    np.testing.assert_allclose(encoder.encode_passages(texts), each, atol=1e-5)


def problem(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        TextEncoder(str(folder)).encode_question("dam")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_models_that_are_not_supported_are_refused(tmp_path: Path) -> None:
    assert "model_type llama is not supported" in problem(write_encoder(tmp_path / "a", model_type="llama"))
    assert "hidden_act relu is not supported" in problem(write_encoder(tmp_path / "b", hidden_act="relu"))
    maximum = write_encoder(tmp_path / "c", files=pooling("max_tokens"))
    assert "expected the pooling mode mean or cls" in problem(maximum)
    dense = {"modules.json": [{"type": "sentence_transformers.models.Dense"}]}
    assert "the module Dense is not supported" in problem(write_encoder(tmp_path / "d", files=dense))
    endless = write_encoder(tmp_path / "f", files={"config.json": CONFIG | {"num_hidden_layers": 10**12}})
    assert "no tensor encoder.layer.2.attention" in problem(endless)
    assert "do not fit together" in problem(write_encoder(tmp_path / "e", num_attention_heads=3))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "a")
    fewer = write_encoder(tmp_path / "b", vocab_size=5)
    assert "mismatched files" in problem(fewer)
    (folder / "config.json").write_bytes((fewer / "config.json").read_bytes())
    assert "word_embeddings.weight: shape [15, 16], expected [5, 16]" in problem(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    assert "model_type None is not supported" in problem(folder)
    folder = write_encoder(tmp_path / "c")
    (folder / "tokenizer.json").write_text("{}")
    assert "not a supported tokenizer" in problem(folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert "not a safetensors file" in problem(folder)
    folder = write_encoder(tmp_path / "d")
    safetensors_file.write(folder / "model.safetensors", {"x": np.zeros(2, np.float32)}, "float32", {})
    assert "no tensor embeddings.word_embeddings.weight" in problem(folder)
    assert "no such folder" in problem(tmp_path / "none")
