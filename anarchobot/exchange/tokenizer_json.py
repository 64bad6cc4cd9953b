"""Any of our tokenizers as the files that transformers and mlx-lm read: tokenizer.json and tokenizer_config.json.

A text's own spaces stand in the vocabulary as spaces, not as SentencePiece's U+2581: so a U+2581 of the text is what it
is to our tokenizers, three bytes, and nothing has to be replaced. Ordinary text never becomes a control token, whatever
it says (`split_special_tokens`); and a token is put before a text, as the model has always seen one there.

A chat template is written as text and tokenised again by those programs, so with one, and as everywhere, a control
token's name is that token, whoever wrote it. What a template renders gets nothing put before it.
"""

import json
import re
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.exchange.chat_format import Chat
from anarchobot.tokenizers.chat_template import FILE
from anarchobot.tokenizers.fast_tokenizer import adversarial_texts
from anarchobot.tokenizers.sentencepiece_to_json import BYTE, NORMAL, NotConvertible, spm_to_json
from anarchobot.tokenizers.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer

UNKNOWN, CONTROL = 2, 3  # a piece's types, beside those of spm_to_json
TIES = (
    "a unigram tokenizer in tokenizer.json: of ways to cut a text that are equally likely, transformers and mlx-lm may "
    "take another than SentencePiece; the exact one is tokenizer.model"
)


def tokenizer_files(tokenizer: Tokenizer, max_seq_len: int, bos_id: int, chat: Chat | None = None) -> dict[str, bytes]:
    """File names and contents: tokenizer.json, tokenizer_config.json, and tokenizer.model and chat_template.jinja where
    there is one. `bos_id` is what a text begins with.

    A tokenizer.json is passed on, but for that. Raises UserError for a SentencePiece model that has no equal.
    """
    import tokenizers

    files = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        path = tokenizer.files[0]
        spec = proto(path)
        try:
            whole = _bpe(path, spec) if spec.trainer_spec.model_type == spec.trainer_spec.BPE else _unigram(spec)
        except NotConvertible as reason:
            raise UserError(f"{path}: this tokenizer can't be written as tokenizer.json: {reason}") from None
        files["tokenizer.model"] = path.read_bytes()
    else:
        assert isinstance(tokenizer, HFTokenizer)
        passed_on = len(tokenizer.files) == 1  # else GPT-2's two files
        used = described(tokenizer)
        # The file's own, but with ends of document and the marks of chats as the control tokens that they are here.
        own = json.loads(tokenizer.files[0].read_bytes()) if passed_on else used
        whole = {**own, "added_tokens": used["added_tokens"]}
    names = tokenizers.Tokenizer.from_str(json.dumps(whole))
    bos, eos = (str(names.id_to_token(i)) for i in (bos_id, tokenizer.eod_id))
    files["tokenizer.json"] = _dumped({**whole, "post_processor": _begins_with(bos, bos_id)})
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": True,
        "split_special_tokens": chat is None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
    if chat is not None:
        files[FILE] = chat.template.source.encode()
        settings |= chat.tokens
        if "bos_token" not in chat.tokens and chat.speaks_of("bos_token"):
            del settings["bos_token"]  # to the template it was none
        if settings.get("bos_token") != bos:
            del settings["add_bos_token"]  # tokenizer.json says what a text begins with
    files["tokenizer_config.json"] = _dumped(settings)
    return files


def differences(tokenizer: Tokenizer, written: bytes) -> str | None:
    """A line for people if a tokenizer.json gives other ids than `tokenizer` on texts made to break tokenizers."""
    import tokenizers

    json_tokenizer = tokenizers.Tokenizer.from_str(written.decode())
    json_tokenizer.encode_special_tokens = True
    json_tokenizer.no_truncation()
    json_tokenizer.no_padding()
    texts = adversarial_texts()
    encoded = json_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ours = tokenizer.encode_batch(texts)
    wrong = [text for text, e, ids in zip(texts, encoded, ours, strict=True) if e.ids != ids.tolist()]
    if not wrong:
        return None
    return (
        f"tokenizer.json gives other ids than {tokenizer.files[0].name} on {len(wrong)} of {len(texts)} texts made to "
        f"break tokenizers, such as {wrong[0][:40]!a}"
    )


def proto(path: Path) -> Any:
    """What a SentencePiece file holds."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]


def described(tokenizer: HFTokenizer) -> dict[str, Any]:
    """The tokenizer as it is used here, in tokenizer.json's form."""
    whole: dict[str, Any] = json.loads(tokenizer._model.to_str())
    return whole


def _bpe(path: Path, spec: Any) -> dict[str, Any]:
    """spm_to_json's model with the pieces' own names, control tokens, and the way back to text."""
    text, tied_spaces = spm_to_json(path)
    whole: dict[str, Any] = json.loads(text)
    model = whole["model"]
    merges = [merge.split(" ") for merge in model["merges"]]
    if tied_spaces:
        # Runs of spaces with one score: SentencePiece merges the leftmost, so the run that is growing goes first.
        runs = [pair for pair in merges if not "".join(pair).strip("▁")]
        first = merges.index(runs[0])
        merges[first : first + len(runs)] = sorted(runs, key=lambda pair: (-len(pair[0]), len(pair[1])))
    model["merges"] = [[_spaced(part) for part in pair] for pair in merges]
    model["vocab"] = {_spaced(piece.piece): i for i, piece in enumerate(spec.pieces)}
    if len(model["vocab"]) < len(spec.pieces):
        raise NotConvertible("it has pieces that differ in the kind of space alone")
    model["unk_token"] = spec.pieces[spec.trainer_spec.unk_id].piece
    dummy = spec.normalizer_spec.add_dummy_prefix
    spaces = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Prepend", "prepend": " "}]
    whole["normalizer"] = {"type": "Sequence", "normalizers": spaces} if dummy else None
    return {**whole, "added_tokens": _controls(spec), "decoder": _decoder(dummy)}


def _unigram(spec: Any) -> dict[str, Any]:
    """As `tokenizer train` makes them: no normaliser, no prefix, bytes for what the vocabulary lacks."""
    trainer, normalizer = spec.trainer_spec, spec.normalizer_spec
    if trainer.model_type != trainer.UNIGRAM:
        raise NotConvertible("it is neither a BPE nor a unigram model")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or normalizer.add_dummy_prefix:
        raise NotConvertible("it has a normaliser")
    if not trainer.byte_fallback:
        raise NotConvertible("it has no bytes for what its vocabulary lacks")
    worst = min(piece.score for piece in spec.pieces if piece.type == NORMAL)
    scores = [piece.score if piece.type == NORMAL else worst - 1000 for piece in spec.pieces]
    names = [piece.piece for piece in spec.pieces if piece.type in (UNKNOWN, CONTROL, BYTE)]
    # This library's model would find "<s>" and "<0x41>" in a text; it is cut behind their first character.
    inside = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _controls(spec),
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": inside},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "decoder": _decoder(dummy_prefix=False),
        "model": {
            "type": "Unigram",
            "unk_id": trainer.unk_id,
            "byte_fallback": True,
            "vocab": [[_spaced(piece.piece), score] for piece, score in zip(spec.pieces, scores, strict=True)],
        },
    }


def _controls(spec: Any) -> list[dict[str, Any]]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": piece.piece, **plain, "special": True}
        for i, piece in enumerate(spec.pieces)
        if piece.type in (UNKNOWN, CONTROL)
    ]


def _decoder(dummy_prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _begins_with(name: str, token: int) -> dict[str, Any]:
    """Puts the token before a text, unless special tokens are not wanted."""
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    single = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, first, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def _spaced(piece: str) -> str:
    return piece.replace("▁", " ")


def _dumped(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
