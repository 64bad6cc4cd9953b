"""Tiny Hugging Face folders with the tokenizers of real model families: the same steps, special tokens, strip flags,
end tokens and forms of chat templates as published."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from tests.tokenizers.templates import GEMMA, LLAMA2, LLAMA3, MISTRAL, PHI3, QWEN2

DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """`tokens` are the special tokens of tokenizer.json; `config` is tokenizer_config.json without the template.
    `ends` are the names of all tokens that end generation, that of a document first. `start`: what transformers puts
    before a text. `files` are further files, by name."""

    kind: str  # of tokenizer, see `_model`
    tokens: tuple[str | AddedToken, ...]
    template: str
    config: dict[str, Any]
    ends: tuple[str, ...]
    start: str | None = None
    files: dict[str, Any] = field(default_factory=dict)
    system: bool = True  # whether the template accepts a system message


def _special(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, special=True, normalized=False, **flags)


def _saved(token: AddedToken) -> dict[str, Any]:
    keys = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")
    return {key: getattr(token, key) for key in keys}


_LLAMA3 = ("begin_of_text", "end_of_text", "eom_id", "eot_id", "start_header_id", "end_header_id")
_PHI3 = tuple(_special(f"<|{name}|>", rstrip=True) for name in ("assistant", "system", "end", "user"))
FAMILIES = {
    "qwen": Family(
        "words", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), QWEN2,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "add_bos_token": False},
        ("<|endoftext|>", "<|im_end|>"),
        files={"generation_config.json": {"eos_token_id": ["<|im_end|>", "<|endoftext|>"]}},
    ),
    "llama3": Family(
        "words", tuple(f"<|{name}|>" for name in _LLAMA3), LLAMA3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), "<|begin_of_text|>",
        files={"generation_config.json": {"eos_token_id": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]}},
    ),
    "llama2": Family("first", ("<s>", "</s>"), LLAMA2, {"bos_token": "<s>", "eos_token": "</s>"}, ("</s>",), "<s>"),
    "llama2 before Metaspace": Family(
        "prepend", ("<s>", "</s>"), LLAMA2, {"bos_token": "<s>", "eos_token": "</s>"}, ("</s>",), "<s>"
    ),
    "mistral": Family(
        "first", ("<s>", "</s>", "[INST]", "[/INST]"), MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}, ("</s>",),
        "<s>", system=False,
    ),
    "zephyr": Family("prepend", ("<s>", "</s>"), ZEPHYR, {"bos_token": "<s>", "eos_token": "</s>"}, ("</s>",), "<s>"),
    "gemma": Family(
        "spaces", ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), GEMMA,
        {"bos_token": "<bos>", "eos_token": "<eos>"}, ("<eos>", "<end_of_turn>"), "<bos>", system=False,
        files={"generation_config.json": {"eos_token_id": ["<eos>", "<end_of_turn>"]}},
    ),
    "phi3": Family(
        "prepend", ("<s>", _special("</s>", rstrip=True), "<|endoftext|>", *_PHI3), PHI3,
        {"bos_token": "<s>", "eos_token": "<|endoftext|>"}, ("<|endoftext|>", "<|assistant|>", "<|end|>"), "<s>",
        files={"generation_config.json": {"eos_token_id": ["<|endoftext|>", "<|assistant|>", "<|end|>"]}},
    ),
    "deepseek": Family(
        "words", ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), DEEPSEEK,
        {
            "bos_token": {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>"},
            "eos_token": {"__type": "AddedToken", "content": "<｜end▁of▁sentence｜>"},
        },
        ("<｜end▁of▁sentence｜>",), "<｜begin▁of▁sentence｜>",
    ),
    # A tokenizer.json without the tokens for chat, which older files beside it add.
    "hermes": Family(
        "first", ("<s>", "</s>"), CHATML, {}, ("</s>", "<|im_end|>"), "<s>",
        files={
            "added_tokens.json": {"<|im_end|>": 2, "<|im_start|>": 3},
            "special_tokens_map.json": {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"},
            "config.json": {"eos_token_id": "</s>"},
        },
    ),
    # The strip flags are only in tokenizer_config.json.
    "flags": Family(
        "words", ("<s>", "</s>", "<|im_start|>", "<|im_end|>"), CHATML,
        {
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {
                "</s>": _saved(_special("</s>")), "<|im_start|>": _saved(_special("<|im_start|>", lstrip=True)),
                "<|im_end|>": _saved(_special("<|im_end|>", rstrip=True, lstrip=True)),
            },
        },
        ("<|im_end|>",),
    ),
}  # fmt: skip


def make_family(name: str, folder: Path) -> Path:
    """Writes the folder of a family, without weights. Ids in `files` and `config` are given by name or counted from the
    end of the vocabulary."""
    family = FAMILIES[name]
    folder.mkdir()
    backend = tokenizers.Tokenizer.from_str(_model(family.kind))
    if name == "deepseek":  # these two are added tokens, but not special
        backend.add_tokens(
            [AddedToken(text, special=False, normalized=False) for text in ("<｜User｜>", "<｜Assistant｜>")]
        )
    backend.add_special_tokens([_special(token) if isinstance(token, str) else token for token in family.tokens])
    if family.start is not None:
        start = (family.start, backend.token_to_id(family.start))
        backend.post_processor = processors.TemplateProcessing(f"{start[0]} $A", f"{start[0]} $A $B", [start])
    backend.save(str(folder / "tokenizer.json"))
    size = backend.get_vocab_size()

    def to_id(value: Any) -> Any:
        return [to_id(item) for item in value] if isinstance(value, list) else backend.token_to_id(value)

    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": family.template, **family.config}
    if "added_tokens_decoder" in config:
        added = config["added_tokens_decoder"]
        config["added_tokens_decoder"] = {str(to_id(token)): flags for token, flags in added.items()}
    files: dict[str, Any] = {"tokenizer_config.json": config, "config.json": {}, **family.files}
    for file, values in files.items():
        values = {key: to_id(value) if key == "eos_token_id" else value for key, value in values.items()}
        if file == "added_tokens.json":
            values = {text: size + i for text, i in zip(values, range(len(values)), strict=True)}
        (folder / file).write_text(json.dumps(values, ensure_ascii=False))
    return folder


@cache
def _model(kind: str) -> str:
    """The JSON of a tokenizer without special tokens. "words" is byte-level BPE; the others are SentencePiece's BPE
    with byte fallback, which puts a space before a text ("first"), before each part of it ("prepend") or nowhere
    ("spaces")."""
    text = Path(__file__).read_text(encoding="utf-8")
    if kind == "words":
        backend = tokenizers.Tokenizer(BPE())
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        alphabet, special = pre_tokenizers.ByteLevel.alphabet(), []
    else:
        backend = tokenizers.Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        # Pieces are learned within words; a published model has no such step, but merges only within words as well.
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", True)
        alphabet, special = [], ["<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(text.split("\n"), trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = []  # bytes are ordinary pieces
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    if kind == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", False)
    elif kind != "words":
        steps: list[Any] = [normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if kind == "prepend" else steps)
        backend.pre_tokenizer = None
    if kind != "words":
        strip = [decoders.Strip(" ", 1, 0)] if kind != "spaces" else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
    return str(backend.to_str())
