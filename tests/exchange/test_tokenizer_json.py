"""tokenizer.json: AutoTokenizer of transformers gives our tokenizer's ids."""

import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from anarchobot.config.errors import UserError
from anarchobot.exchange.exporting import export
from anarchobot.exchange.gguf_file import tokenizer_fields
from anarchobot.exchange.tokenizer_json import CONTROL, find_mismatch, tokenizer_files
from anarchobot.tokenizers.fast_tokenizer import adversarial_texts
from anarchobot.tokenizers.sentencepiece_to_json import unknown_id
from anarchobot.tokenizers.tokenizer import Tokenizer, load_tokenizer, read_sentencepiece_proto
from tests.conftest import shared_data_folder
from tests.exchange.random_run import ROOT, STORIES, make_run

SAMPLE = 60  # use every 60th multilingual line


def lines(one_in: int) -> list[str]:
    """The Big List of Naughty Strings and multilingual lines; without the shared data, the README."""
    data = shared_data_folder()
    files = [data / "messy" / "blns.txt", *sorted((data / "multilingual").iterdir())] if data else [ROOT / "README.md"]
    first, *others = (file.read_bytes().decode().split("\n") for file in files)
    texts = [*first, *(text for other in others for text in other[::one_in])]
    return [*texts, *(f"{text}\n" for text in texts[:1000])]


def hugging_face(folder: Path) -> object:
    return AutoTokenizer.from_pretrained(folder)


def differing(ours: Tokenizer, theirs: object, texts: list[str]) -> list[str]:
    ids = theirs(texts, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    return [text for text, a, b in zip(texts, ours.encode_batch(texts), ids, strict=True) if a.tolist() != b]


@pytest.mark.parametrize("one_in", [SAMPLE, pytest.param(1, marks=pytest.mark.faults)])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
def test_autotokenizer_gives_our_ids(tmp_path: Path, tokenizer_path: Path, qk_norm: bool, one_in: int) -> None:
    run = make_run(tmp_path / "run", tokenizer_path, n_layers=1, qk_norm=qk_norm)
    warnings = export(run, "hf", tmp_path / "hf")["warnings"]
    ours, theirs = load_tokenizer(run), hugging_face(tmp_path / "hf")
    texts = [*lines(one_in), *adversarial_texts()]
    wrong = differing(ours, theirs, texts)
    if tokenizer_path.parent.name == "unigram":  # only equally likely segmentations may differ
        assert len(wrong) < len(texts) / 20 and "equally likely" in warnings[0]
        scores = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path)).get_score
        for text, ids in zip(wrong, theirs(wrong, add_special_tokens=False)["input_ids"], strict=True):  # type: ignore[operator]
            ours_sum, theirs_sum = (sum(map(scores, map(int, x))) for x in (ours.encode_batch([text])[0], ids))
            assert theirs_sum == pytest.approx(ours_sum, rel=1e-5), text
    else:
        assert wrong == [] and warnings == []
    sample = [text for text in texts[::50] if text not in wrong]
    for ids in ours.encode_batch(sample):
        assert theirs.decode(ids.tolist(), skip_special_tokens=True) == ours.decode(ids.tolist())  # type: ignore[attr-defined]


def test_end_of_document_is_prepended_as_bos(tmp_path: Path, tokenizer_path: Path) -> None:
    run = make_run(tmp_path / "run", tokenizer_path, n_layers=1)
    export(run, "hf", tmp_path / "hf")
    ours, theirs = load_tokenizer(run), hugging_face(tmp_path / "hf")
    assert theirs("word")["input_ids"] == [ours.eod_id, *ours.encode_batch(["word"])[0].tolist()]  # type: ignore[operator]
    assert theirs.bos_token_id == theirs.eos_token_id == ours.eod_id  # type: ignore[attr-defined]
    assert theirs.decode([ours.eod_id], skip_special_tokens=True) == ""  # type: ignore[attr-defined]
    assert len(theirs) == ours.vocab_size  # type: ignore[arg-type]
    assert "<|im_end|>" in theirs.all_special_tokens or theirs.convert_tokens_to_ids("<|im_end|>") is not None  # type: ignore[attr-defined]


def test_tokenizer_json_is_kept_except_for_its_post_processor(tokenizers_folder: Path) -> None:
    path = tokenizers_folder / "json" / "tokenizer.json"
    written = json.loads(tokenizer_files(load_tokenizer(path), 64, 0)["tokenizer.json"])
    expected = json.loads(path.read_bytes())
    assert written.pop("post_processor")["type"] == "TemplateProcessing" and expected.pop("post_processor") is None
    assert written == expected


@pytest.mark.parametrize(
    "name", ["mistral_v1_tokenizer.model", str(STORIES.relative_to("artifacts") / "hf/tokenizer.model")]
)
def test_public_sentencepiece_tokenizers_give_equal_ids(shared_data: Path, tmp_path: Path, name: str) -> None:
    """They have a dummy prefix; Mistral's also has runs of spaces with equal scores."""
    tokenizer = load_tokenizer(shared_data / "artifacts" / name)
    for file, content in tokenizer_files(tokenizer, 512, 2).items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    texts = [
        *lines(SAMPLE),
        *adversarial_texts(),
        (shared_data / "messy" / "utf8_bmp_all_one_line.txt").read_bytes().decode(),
    ]
    assert differing(tokenizer, hugging_face(tmp_path), texts) == []


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_unknown_piece_is_found_by_its_type(tokenizers_folder: Path, tmp_path: Path, kind: str) -> None:
    """`unk_id` only says what the training was asked for; SentencePiece does not read it."""
    path = tokenizers_folder / kind / "tokenizer.model"
    proto = read_sentencepiece_proto(path)
    proto.trainer_spec.unk_id = 99_999
    (tmp_path / path.name).write_bytes(proto.SerializeToString())
    before, after = (tokenizer_files(load_tokenizer(file), 64, 0) for file in (path, tmp_path / path.name))
    assert before["tokenizer.json"] == after["tokenizer.json"]


def test_a_model_without_an_unknown_piece_is_refused(tokenizers_folder: Path, tmp_path: Path) -> None:
    proto = read_sentencepiece_proto(tokenizers_folder / "bpe" / "tokenizer.model")
    proto.pieces[unknown_id(proto)].type = CONTROL
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"can't be converted to tokenizer\.json: it has no unknown piece"):
        tokenizer_files(tokenizer, 64, 0)
    with pytest.raises(UserError, match="can't be exported to GGUF: it has no unknown piece"):
        tokenizer_fields(tokenizer, None, None)


def test_find_mismatch_detects_another_tokenizer(tokenizers_folder: Path, bpe: Path) -> None:
    written = tokenizer_files(load_tokenizer(tokenizers_folder / "gpt2" / "tiny-vocab.json"), 64, 0)["tokenizer.json"]
    warning = find_mismatch(load_tokenizer(bpe), written)
    assert warning is not None and "other ids than tokenizer.model on" in warning
    assert find_mismatch(load_tokenizer(tokenizers_folder / "gpt2" / "tiny-vocab.json"), written) is None


def test_models_with_a_normalizer_are_rejected(shared_data: Path) -> None:
    for name in ("t5_spiece.model", "torchtune_m.model"):
        with pytest.raises(UserError, match=rf"{name}: can't be converted to tokenizer.json: it has a norm"):
            tokenizer_files(load_tokenizer(shared_data / "artifacts" / name), 64, 1)
