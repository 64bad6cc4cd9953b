"""Exports any tokenizer as the files that transformers and mlx-lm read: tokenizer.json and tokenizer_config.json.

The exported vocabulary stores spaces as spaces, not as SentencePiece's U+2581. A U+2581 in the text is therefore
encoded as its three UTF-8 bytes, as AnarchoBot's tokenizers do. Control tokens in text are encoded as text
(`split_special_tokens`), and the tokenizer prepends the token that texts started with in training.

With a chat template, these libraries render a conversation to text before tokenizing it, so a control token's name
anywhere in the conversation becomes that token. Nothing is prepended to a rendered conversation.
"""

import json
import re
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.exchange.chat_format import ChatFormat
from anarchobot.tokenizers.chat_template import FILE
from anarchobot.tokenizers.fast_tokenizer import adversarial_texts
from anarchobot.tokenizers.sentencepiece_to_json import BYTE, NORMAL, UNKNOWN, NotConvertible, spm_to_json, unknown_id
from anarchobot.tokenizers.special_tokens import ADDED_TOKEN_FLAGS
from anarchobot.tokenizers.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer, read_sentencepiece_proto

CONTROL = 3  # a SentencePiece piece type, in addition to those in sentencepiece_to_json
UNIGRAM_WARNING = (
    "unigram tokenizer in tokenizer.json: where several segmentations of a text are equally likely, transformers and "
    "mlx-lm may choose a different one than SentencePiece; tokenizer.model is exact"
)


def tokenizer_files(
    tokenizer: Tokenizer, max_seq_len: int, bos_id: int | None, chat: ChatFormat | None = None
) -> dict[str, bytes]:
    """Returns the contents of tokenizer.json and tokenizer_config.json, and of tokenizer.model and chat_template.jinja
    if the tokenizer has them, by file name. `bos_id` is the token that starts a text, if any.

    An existing tokenizer.json is kept, except for its post-processor and added tokens. Raises UserError for a
    SentencePiece model with no equivalent tokenizer.json.
    """
    import tokenizers

    files = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        path = tokenizer.files[0]
        proto = read_sentencepiece_proto(path)
        try:
            is_bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
            spec = _bpe(path, proto) if is_bpe else _unigram(proto)
            spec["added_tokens"] += _added_tokens(tokenizer)
        except NotConvertible as reason:
            raise UserError(f"{path}: can't be converted to tokenizer.json: {reason}") from None
        files["tokenizer.model"] = path.read_bytes()
    else:
        assert isinstance(tokenizer, HFTokenizer)
        effective = tokenizer.spec()
        is_gpt2 = len(tokenizer.files) > 1  # vocab.json and merges.txt
        try:
            original = effective if is_gpt2 else json.loads(tokenizer.files[0].read_bytes())
        except ValueError as error:  # the library's parser is more lenient
            raise UserError(f"{tokenizer.files[0]}: this tokenizer can't be exported: {error}") from error
        # End-of-document and chat tokens must be control tokens, even if the original file has them as text.
        spec = {**original, "added_tokens": effective["added_tokens"]}
    parsed = tokenizers.Tokenizer.from_str(json.dumps(spec))
    bos = processor = None
    if bos_id is not None:
        bos = str(parsed.id_to_token(bos_id))
        processor = _prepend_token(bos, bos_id)
    files["tokenizer.json"] = _to_bytes({**spec, "post_processor": processor})
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": str(parsed.id_to_token(tokenizer.eod_id)),
        "add_bos_token": bos is not None,
        "split_special_tokens": chat is None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
    if chat is not None:
        files[FILE] = chat.template.source.encode()
        config |= chat.special_tokens
        if "bos_token" not in chat.special_tokens and chat.mentions("bos_token"):
            del config["bos_token"]  # the template was used without one in training
        if bos is not None and config.get("bos_token") != bos:
            del config["add_bos_token"]  # the post-processor in tokenizer.json prepends another token
    files["tokenizer_config.json"] = _to_bytes(config)
    return files


def find_mismatch(tokenizer: Tokenizer, tokenizer_json: bytes) -> str | None:
    """Returns a warning if a tokenizer.json gives other ids than `tokenizer` on adversarial texts."""
    import tokenizers

    exported = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
    exported.encode_special_tokens = True
    exported.no_truncation()
    exported.no_padding()
    texts = adversarial_texts()
    pairs = zip(exported.encode_batch_fast(texts, add_special_tokens=False), tokenizer.encode_batch(texts), strict=True)
    wrong = [text for text, (actual, expected) in zip(texts, pairs, strict=True) if actual.ids != expected.tolist()]
    if not wrong:
        return None
    return (
        f"tokenizer.json gives other ids than {tokenizer.files[0].name} on {len(wrong)} of {len(texts)} adversarial "
        f"texts, for example {wrong[0][:40]!a}"
    )


def _bpe(path: Path, proto: Any) -> dict[str, Any]:
    """Adds the pieces' own names, control tokens and a decoder to the model of `spm_to_json`."""
    text, tied_spaces = spm_to_json(path)
    spec: dict[str, Any] = json.loads(text)
    model = spec["model"]
    merges = [merge.split(" ") for merge in model["merges"]]
    if tied_spaces:
        # SentencePiece merges the leftmost of equal scores, so among runs of spaces the longest left part comes first.
        runs = [pair for pair in merges if not "".join(pair).strip("▁")]
        first = merges.index(runs[0])
        merges[first : first + len(runs)] = sorted(runs, key=lambda pair: (-len(pair[0]), len(pair[1])))
    model["merges"] = [[_with_spaces(part) for part in pair] for pair in merges]
    model["vocab"] = {_with_spaces(piece.piece): i for i, piece in enumerate(proto.pieces)}
    if len(model["vocab"]) < len(proto.pieces):
        raise NotConvertible("it has pieces that differ only in the kind of space")
    model["unk_token"] = proto.pieces[unknown_id(proto)].piece
    dummy = proto.normalizer_spec.add_dummy_prefix
    spaces = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Prepend", "prepend": " "}]
    spec["normalizer"] = {"type": "Sequence", "normalizers": spaces} if dummy else None
    return {**spec, "added_tokens": _control_tokens(proto), "decoder": _decoder(dummy)}


def _unigram(proto: Any) -> dict[str, Any]:
    """Converts unigram models such as `tokenizer train` makes: no normalizer, no dummy prefix, byte fallback."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.UNIGRAM:
        raise NotConvertible("it is neither a BPE nor a unigram model")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or normalizer.add_dummy_prefix:
        raise NotConvertible("it has a normalizer")
    if not trainer.byte_fallback:
        raise NotConvertible("it has no byte fallback")
    worst = min(piece.score for piece in proto.pieces if piece.type == NORMAL)
    scores = [piece.score if piece.type == NORMAL else worst - 1000 for piece in proto.pieces]
    names = [piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL, BYTE)]
    # The library would match "<s>" and "<0x41>" in text; splitting after their first character prevents that.
    pattern = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _control_tokens(proto),
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "decoder": _decoder(dummy_prefix=False),
        "model": {
            "type": "Unigram",
            "unk_id": unknown_id(proto),
            "byte_fallback": True,
            "vocab": [[_with_spaces(piece.piece), score] for piece, score in zip(proto.pieces, scores, strict=True)],
        },
    }


def _control_tokens(proto: Any) -> list[dict[str, Any]]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": piece.piece, **plain, "special": True}
        for i, piece in enumerate(proto.pieces)
        if piece.type in (UNKNOWN, CONTROL)
    ]


def _added_tokens(tokenizer: SentencePieceTokenizer) -> list[dict[str, Any]]:
    """The tokens that are not pieces of the model."""
    plain = dict.fromkeys(ADDED_TOKEN_FLAGS, False)
    return [{"id": i, **plain, **token} for i, token in tokenizer.added_tokens.items()]


def _decoder(dummy_prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _prepend_token(name: str, token: int) -> dict[str, Any]:
    """A post-processor that prepends a token, unless add_special_tokens is False."""
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    single = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, first, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def _with_spaces(piece: str) -> str:
    return piece.replace("▁", " ")


def _to_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
