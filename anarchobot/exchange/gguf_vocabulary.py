"""A tokenizer as GGUF's tokenizer.ggml keys, for the tokenizers that llama.cpp has itself: SentencePiece BPE and
byte-level BPE with a pre-tokenizer that it knows by name."""

from pathlib import Path
from typing import Any, NamedTuple

from anarchobot.config.errors import UserError
from anarchobot.exchange.chat_format import Chat
from anarchobot.exchange.tokenizer_json import CONTROL, described, proto
from anarchobot.tokenizers.sentencepiece_to_json import NORMAL, UNUSED, USER_DEFINED
from anarchobot.tokenizers.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer

# The pre-tokenizers' patterns, as their models' tokenizer.json have them, and llama.cpp's names for them.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {rf"{_WORDS}\p{{N}}{{1,3}}{_REST}": "llama-bpe", rf"{_WORDS}\p{{N}}{_REST}": "qwen2"}


class Vocabulary(NamedTuple):
    """`model` is llama.cpp's name of the algorithm, `pre` of the pre-tokenizer; the lists have an entry a token, but
    `merges`, and `scores`, which byte-level BPE has none of."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    unknown_id: int | None
    space_prefix: bool


class SpecialTokens(NamedTuple):
    """`add_bos`: whether `bos` is put before whatever is tokenised; `eot`: the end of a turn, where there is a chat
    template and another token than `eos` ends its answers."""

    bos: int
    add_bos: bool
    eos: int
    eot: int | None = None
    template: str | None = None


def special_tokens(tokenizer: Tokenizer, bos_id: int, chat: Chat | None) -> SpecialTokens:
    """`bos_id` is what a text begins with.

    llama.cpp puts `bos` before texts and rendered chats alike, but for chats that have it already. So a model with a
    chat template gets it where the template has it. There, bos_token and eos_token are these two.
    """
    if chat is None:
        return SpecialTokens(bos_id, True, tokenizer.eod_id)
    assert isinstance(tokenizer, SentencePieceTokenizer | HFTokenizer)
    named = chat.tokens.get("eos_token") if chat.speaks_of("eos_token") else None
    eos = tokenizer.eod_id if named is None else tokenizer.control_tokens[named]
    others = [end for end in reversed(chat.ends) if end != eos]
    bos = bos_id if chat.begins is None else chat.begins
    return SpecialTokens(bos, chat.begins is not None, eos, others[0] if others else None, chat.template.source)


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Raises UserError for a tokenizer that llama.cpp has no equal of."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece(tokenizer)
    assert isinstance(tokenizer, HFTokenizer)
    return _byte_level(tokenizer)


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> Vocabulary:
    path = tokenizer.files[0]
    spec = proto(path)
    trainer, normalizer = spec.trainer_spec, spec.normalizer_spec
    if trainer.model_type != trainer.BPE or not trainer.byte_fallback:
        raise _refused(path, "llama.cpp has SentencePiece with bytes for what the vocabulary lacks as BPE only")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise _refused(path, "it has a normaliser, which llama.cpp's BPE has not")
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=[piece.piece for piece in spec.pieces],
        types=[piece.type for piece in spec.pieces],
        scores=[piece.score for piece in spec.pieces],
        merges=[],
        unknown_id=trainer.unk_id,
        space_prefix=normalizer.add_dummy_prefix,
    )


def _byte_level(tokenizer: HFTokenizer) -> Vocabulary:
    path, whole = tokenizer.files[0], described(tokenizer)
    model = whole["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise _refused(path, "llama.cpp reads byte-level BPE from a tokenizer.json, and this is another kind")
    normalizer = whole["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refused(path, f"llama.cpp has no normaliser {normalizer['type']}")
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    types = [UNUSED] * tokenizer.vocab_size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in whole["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return Vocabulary(
        model="gpt2",
        pre=_pre_tokenizer(path, whole["pre_tokenizer"]),
        tokens=tokens,
        types=types,
        scores=[],
        merges=[" ".join(pair) for pair in model["merges"]],
        unknown_id=None,
        space_prefix=False,
    )


def _pre_tokenizer(path: Path, told: dict[str, Any] | None) -> str:
    """llama.cpp's name of a pre-tokenizer: GPT-2's is in the HFTokenizer step itself, the others' before it."""
    steps = told["pretokenizers"] if told and told["type"] == "Sequence" else [told or {"type": "none"}]
    *before, last = steps
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if not before and last["use_regex"]:
            return "gpt-2"
        if len(before) == 1 and not last["use_regex"] and before[0]["type"] == "Split":
            pattern = before[0]["pattern"].get("Regex")
            if pattern in _PATTERNS and before[0]["behavior"] == "Isolated":
                return _PATTERNS[pattern]
    raise _refused(
        path, "llama.cpp knows its way to cut words under no name that is known here (GPT-2, Llama 3, Qwen 2)"
    )


def _refused(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: this tokenizer can't go into a GGUF file: {reason}: export to hf or mlx")
