"""Tokenizers in common file formats behind one interface: SentencePiece's `.model`, Hugging Face's `tokenizer.json`,
and GPT-2's `vocab.json` with `merges.txt`."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.storage.durable import write_atomic

Ids = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int32]  # [n, 2]: the character range [start, end) of each of n tokens

# End-of-document tokens as models name them, most likely first.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
# Reserved in tokenizers trained here, so that a pretrained model can be tuned for chat (ChatML) without resizing.
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")


class Tokenizer(Protocol):
    """Text to ids and back. Text that looks like a control token is always encoded as ordinary text."""

    vocab_size: int
    eod_id: int  # ends every document in the shards
    files: tuple[Path, ...]  # everything needed to load it again; the first one names it

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        """Returns one int32 array of ids per text, without an end-of-document id. Thread-safe."""

    def decode(self, ids: list[int]) -> str:
        """Control tokens are omitted; invalid UTF-8 becomes U+FFFD."""


class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer for chat templates, with control tokens and character offsets."""

    control_tokens: dict[str, int]  # ids by token text
    control_pattern: re.Pattern[str]  # matches control tokens in text, including the whitespace that they absorb

    def encode_with_offsets(self, texts: list[str], after_control: Sequence[bool]) -> list[tuple[Ids, Offsets]]:
        """The ids of `encode_batch`, with the characters of each token. A token without characters gets an
        empty range at the next character. `after_control`: whether the text follows a control token, which matters to
        a few tokenizers."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer file, or the only tokenizer in a folder.

    Raises UserError when there is none, it can't be read, or it has no end-of-document token.
    """
    path = Path(path)
    if path.is_dir():
        path = _find_in_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file: create one with `anarchobot tokenizer train`")
    try:
        if path.suffix == ".model":
            return SentencePieceTokenizer(path)
        if path.name.endswith("vocab.json"):
            return HFTokenizer(path, path.with_name(path.name.removesuffix("vocab.json") + "merges.txt"))
        if path.suffix == ".json":
            return HFTokenizer(path)
    except UserError:
        raise
    except Exception as error:  # the libraries raise plain Exception
        raise UserError(f"{path}: not a supported tokenizer: {' '.join(str(error).split())[:200]}") from error
    raise UserError(f"{path}: expected a tokenizer: a .model, tokenizer.json or vocab.json file")


def load_chat_tokenizer(path: str | Path) -> ChatTokenizer:
    """Like `load_tokenizer`, but prefers Hugging Face's `tokenizer.json` in a folder with several tokenizers: beside a
    `.model`, only it includes control tokens that were added for chat."""
    hf_file = Path(path) / "tokenizer.json"
    tokenizer = load_tokenizer(hf_file if hf_file.is_file() else path)
    assert isinstance(tokenizer, SentencePieceTokenizer | HFTokenizer)
    return tokenizer


def _find_in_folder(folder: Path) -> Path:
    for pattern in ("tokenizer.model", "tokenizer.json", "vocab.json", "*.model", "*tokenizer.json", "*vocab.json"):
        paths = sorted(folder.glob(pattern))
        if len(paths) > 1:
            raise UserError(f"{folder}: several tokenizers here: specify one of {', '.join(p.name for p in paths)}")
        if paths:
            return paths[0]
    raise UserError(f"{folder}: no tokenizer in this folder (*.model, tokenizer.json or vocab.json + merges.txt)")


def digest(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer's files, concatenated."""
    sha = hashlib.sha256()
    for file in tokenizer.files:
        sha.update(file.read_bytes())
    return sha.hexdigest()


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> str:
    """Copies the tokenizer's files into `folder` under their standard names; returns the first name. Identical copies
    are not written again, and each file is replaced atomically."""
    names = [_standard_name(file) for file in tokenizer.files]
    for file, name in zip(tokenizer.files, names, strict=True):
        content, copy = file.read_bytes(), folder / name
        if not (copy.is_file() and copy.read_bytes() == content):
            write_atomic(copy, content)
    return names[0]


def _standard_name(file: Path) -> str:
    names = ("vocab.json", "merges.txt", "tokenizer.json")
    return next((name for name in names if file.name.endswith(name)), f"tokenizer{file.suffix}")


def _control_pattern(
    controls: Iterable[str], lstrip: Collection[str] = (), rstrip: Collection[str] = ()
) -> re.Pattern[str]:
    """Matches the longest control token; `lstrip` and `rstrip`: those that absorb whitespace on that side."""
    patterns = [
        (r"\s*" if control in lstrip else "") + re.escape(control) + (r"\s*" if control in rstrip else "")
        for control in sorted(controls, key=len, reverse=True)
    ]
    return re.compile("|".join(patterns) or "(?!)")


def _concatenate(chunks: list[tuple[Ids, Offsets]], lengths: Iterable[int]) -> tuple[Ids, Offsets]:
    """Joins the consecutive chunks of a text. `lengths`: their lengths in characters."""
    starts = accumulate(lengths, initial=0)
    shifted = [offsets + start for (_, offsets), start in zip(chunks, starts, strict=False)]
    return np.concatenate([ids for ids, _ in chunks]), np.concatenate(shifted)


def read_sentencepiece_proto(path: Path) -> Any:
    """Parses a SentencePiece model file."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]


class SentencePieceTokenizer:
    """A SentencePiece model (BPE or unigram). `processor` is the library's SentencePieceProcessor.

    SentencePiece writes a space as U+2581, so a U+2581 in the text would be decoded as a space. In models that are
    otherwise lossless (no normalizer, no dummy prefix, byte fallback) it is encoded as its three bytes instead.
    """

    def __init__(self, path: Path) -> None:
        import sentencepiece

        if not path.stat().st_size:
            raise UserError(f"{path}: the file is empty: create a tokenizer with `anarchobot tokenizer train`")
        try:
            self.processor: Any = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:  # its message refers to a line of its source code
            raise UserError(f"{path}: not a SentencePiece model") from error
        self.files: tuple[Path, ...] = (path,)
        self.vocab_size: int = self.processor.vocab_size()
        self.eod_id: int = self.processor.eos_id()
        if self.eod_id < 0:
            raise UserError(f"{path}: this tokenizer has no end-of-sentence token to end documents with")
        proto = read_sentencepiece_proto(path)
        normalizer = proto.normalizer_spec
        self._is_lossless = (
            proto.trainer_spec.byte_fallback
            and normalizer.name == "identity"
            and not (normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces)
        )
        self._space_mark = np.array([self.processor.piece_to_id(f"<0x{b:02X}>") for b in "▁".encode()], np.int32)
        controls = (i for i in range(self.vocab_size) if self.processor.is_control(i))
        self.control_tokens: dict[str, int] = {self.processor.id_to_piece(i): i for i in controls}
        self.control_pattern = _control_pattern(self.control_tokens)

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        ids: list[Ids] = self.processor.encode(texts, return_type="numpy", num_threads=1)
        if self._is_lossless:
            for i, text in enumerate(texts):
                if "▁" in text:
                    ids[i] = self._encode_marked(text)
        return ids

    def _encode_marked(self, text: str) -> Ids:
        chunks: list[Ids] = self.processor.encode(text.split("▁"), return_type="numpy")
        alternating = [ids for chunk in chunks for ids in (chunk, self._space_mark)]
        return np.concatenate(alternating[:-1])

    def encode_with_offsets(self, texts: list[str], after_control: Sequence[bool]) -> list[tuple[Ids, Offsets]]:
        """`after_control` has no effect: each text gets the model's dummy prefix, if it has one."""
        return [
            self._encode_marked_with_offsets(text) if self._is_lossless and "▁" in text else _to_arrays(mapping)
            for text, mapping in zip(texts, self._offset_mapping(texts), strict=True)
        ]

    def _offset_mapping(self, texts: list[str]) -> list[dict[str, Any]]:
        mappings: list[dict[str, Any]] = self.processor.encode(texts, return_type="offset_mapping", num_threads=1)
        return mappings

    def _encode_marked_with_offsets(self, text: str) -> tuple[Ids, Offsets]:
        mark = self._space_mark, np.array([[0, 1]] * len(self._space_mark), np.int32)
        chunks = text.split("▁")
        alternating = [pair for mapping in self._offset_mapping(chunks) for pair in (_to_arrays(mapping), mark)]
        return _concatenate(alternating[:-1], (length for chunk in chunks for length in (len(chunk), 1)))

    def decode(self, ids: list[int]) -> str:
        return str(self.processor.decode(ids))


def _to_arrays(mapping: dict[str, Any]) -> tuple[Ids, Offsets]:
    return np.array(mapping["ids"], np.int32), np.array(mapping["offsets"], np.int32).reshape(-1, 2)


class HFTokenizer:
    """A Hugging Face tokenizer from `tokenizer.json`, or from GPT-2's vocabulary and merges. `backend` is the library's
    `tokenizers.Tokenizer`."""

    def __init__(self, path: Path, merges: Path | None = None) -> None:
        import tokenizers

        if merges is None:
            self.backend: Any = tokenizers.Tokenizer.from_file(str(path))
            self.files: tuple[Path, ...] = (path,)
        elif not merges.is_file():
            raise UserError(f"{merges}: no such file: {path.name} needs its merges beside it")
        else:
            vocab, pairs = tokenizers.models.BPE.read_file(str(path), str(merges))
            for pair in pairs:  # the library would panic
                if "".join(pair) not in vocab:
                    raise UserError(f"{merges}: {path.name} lacks the merge '{' '.join(pair)}': mismatched files")
            self.backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs))
            self.backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            self.backend.decoder = tokenizers.decoders.ByteLevel()
            self.files = (path, merges)
        ids = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(ids.values(), default=-1) + 1  # ids may have gaps
        ends = [name for name in END_OF_DOCUMENT if name in ids]
        if not ends:
            raise UserError(f"{path}: no end-of-document token: expected one of {', '.join(END_OF_DOCUMENT)}")
        self.eod_id: int = ids[ends[0]]
        controls = dict.fromkeys((*END_OF_DOCUMENT, *CHAT_TOKENS))
        self.backend.add_special_tokens([name for name in controls if name in ids])
        self.backend.encode_special_tokens = True  # "<|endoftext|>" in a document is text, not the end of it
        self.backend.no_truncation()
        self.backend.no_padding()
        specials = {i: token for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        self._special_ids = set(specials)
        self._inside_special = re.compile(
            "|".join(f"(?<={re.escape(t.content[0])})(?={re.escape(t.content[1:])})" for t in specials.values())
        )
        self.control_tokens: dict[str, int] = {token.content: i for i, token in specials.items()}
        self.control_pattern = _control_pattern(
            self.control_tokens,
            lstrip={token.content for token in specials.values() if token.lstrip},
            rstrip={token.content for token in specials.values() if token.rstrip},
        )

    def spec(self) -> dict[str, Any]:
        """The content of a tokenizer.json, including the control tokens that are added when loading."""
        spec: dict[str, Any] = json.loads(self.backend.to_str())
        return spec

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [
            np.array(e.ids if self._special_ids.isdisjoint(e.ids) else self._encode_split(text), np.int32)
            for e, text in zip(encodings, texts, strict=True)
        ]

    def _encode_split(self, text: str) -> list[int]:
        """Splits "</s>" after its "<": the library's unigram models would encode it as the control token."""
        encodings = self.backend.encode_batch_fast(self._inside_special.split(text), add_special_tokens=False)
        return [i for e in encodings for i in e.ids]

    @cached_property
    def _backend_after_control(self) -> Any:
        """Differs from `backend` if only the start of a text gets a space prepended."""
        import tokenizers

        metaspace = self.backend.pre_tokenizer
        if getattr(metaspace, "prepend_scheme", None) != "first":
            return self.backend
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(metaspace.replacement, "never", metaspace.split)
        backend.encode_special_tokens = True  # not stored in the JSON
        return backend

    def encode_with_offsets(self, texts: list[str], after_control: Sequence[bool]) -> list[tuple[Ids, Offsets]]:
        result: list[tuple[Ids, Offsets]] = [(np.empty(0, np.int32), np.empty((0, 2), np.int32))] * len(texts)
        for backend, after in ((self.backend, False), (self._backend_after_control, True)):
            indices = [i for i, value in enumerate(after_control) if value == after]
            encodings = backend.encode_batch([texts[i] for i in indices], add_special_tokens=False)
            for i, e in zip(indices, encodings, strict=True):
                clean = self._special_ids.isdisjoint(e.ids)
                result[i] = _with_offsets(e) if clean else self._encode_split_with_offsets(texts[i], backend)
        return result

    def _encode_split_with_offsets(self, text: str, backend: Any) -> tuple[Ids, Offsets]:
        first, *others = chunks = self._inside_special.split(text)
        encodings = self._backend_after_control.encode_batch(others, add_special_tokens=False)
        encodings.insert(0, backend.encode(first, add_special_tokens=False))
        return _concatenate([_with_offsets(e) for e in encodings], map(len, chunks))

    def decode(self, ids: list[int]) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=True))


def _with_offsets(encoding: Any) -> tuple[Ids, Offsets]:
    offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
    # Some tokenizers exclude whitespace at the ends of a token from its offsets.
    offsets[1:, 0] = np.minimum(offsets[1:, 0], offsets[:-1, 1])
    offsets[:1, 0] = 0
    return np.array(encoding.ids, np.int32), offsets
