"""Tokenizers in the field's file formats behind one small face: SentencePiece's `.model`, Hugging Face's
`tokenizer.json`, and GPT-2's `vocab.json` with `merges.txt`."""

import hashlib
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError

Ids = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int32]  # [n, 2]: the first character of each of n tokens, and the one behind its last

# What ends a document, by the names models give it, likeliest first.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
# Reserved by the tokenizers trained here, so that a pretrained model can be taught to chat (ChatML) without resizing.
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")


class Tokenizer(Protocol):
    """Text to ids and back. Ordinary text never becomes a control token, whatever it says."""

    vocab_size: int
    eod_id: int  # stands behind every document in the shards
    files: tuple[Path, ...]  # everything needed to load it again; the first names it

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        """One int32 array of ids a text, without any end-of-document id. Safe to call from several threads."""

    def decode(self, ids: list[int]) -> str:
        """The text of the ids; control tokens are left out, broken UTF-8 becomes U+FFFD."""


class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer that chat templates can be used with: it knows its control tokens, and which text a token is of."""

    control_tokens: dict[str, int]  # control tokens by their text
    control_pattern: re.Pattern[str]  # finds them in text, with the white space that they swallow

    def encode_with_offsets(self, texts: list[str], after_control: Sequence[bool]) -> list[tuple[Ids, Offsets]]:
        """The ids of `encode_batch` with the characters that each is of; a token of no character of its own stands at
        the next one. `after_control`: a control token stands before the text, which matters to a few tokenizers."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer file, or the one tokenizer in a folder.

    Raises UserError when there is none, it can't be read, or it has no end-of-document token.
    """
    path = Path(path)
    if path.is_dir():
        path = _the_one_in(path)
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file: make one with `anarchobot tokenizer train`")
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
        raise UserError(
            f"{path}: not a tokenizer this program can read: {' '.join(str(error).split())[:200]}"
        ) from error
    raise UserError(f"{path}: expected a tokenizer: a .model, tokenizer.json or vocab.json file")


def load_chat_tokenizer(path: str | Path) -> ChatTokenizer:
    """As `load_tokenizer`, but of a folder's several files takes Hugging Face's `tokenizer.json`: beside a `.model`, it
    alone has the control tokens that were added for chats."""
    whole = Path(path) / "tokenizer.json"
    tokenizer = load_tokenizer(whole if whole.is_file() else path)
    assert isinstance(tokenizer, SentencePieceTokenizer | HFTokenizer)
    return tokenizer


def _the_one_in(folder: Path) -> Path:
    for pattern in ("tokenizer.model", "tokenizer.json", "vocab.json", "*.model", "*tokenizer.json", "*vocab.json"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise UserError(f"{folder}: holds several tokenizers: name one of {', '.join(p.name for p in found)}")
        if found:
            return found[0]
    raise UserError(f"{folder}: no tokenizer in this folder (*.model, tokenizer.json or vocab.json + merges.txt)")


def digest(tokenizer: Tokenizer) -> str:
    """sha256 over the tokenizer's files, in their order."""
    sha = hashlib.sha256()
    for file in tokenizer.files:
        sha.update(file.read_bytes())
    return sha.hexdigest()


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> str:
    """Copies the tokenizer's files into `folder` under the names it is found by; returns the first one's name."""
    names = [_plain_name(file) for file in tokenizer.files]
    for file, name in zip(tokenizer.files, names, strict=True):
        if file.resolve() != (folder / name).resolve():
            shutil.copyfile(file, folder / name)
    return names[0]


def _plain_name(file: Path) -> str:
    plain = ("vocab.json", "merges.txt", "tokenizer.json")
    return next((name for name in plain if file.name.endswith(name)), f"tokenizer{file.suffix}")


def _control_pattern(
    controls: Iterable[str], before: Collection[str] = (), behind: Collection[str] = ()
) -> re.Pattern[str]:
    """Finds the longest of the control tokens; `before` and `behind`: those that swallow the white space there."""
    each = [
        (r"\s*" if control in before else "") + re.escape(control) + (r"\s*" if control in behind else "")
        for control in sorted(controls, key=len, reverse=True)
    ]
    return re.compile("|".join(each) or "(?!)")


def _joined(parts: list[tuple[Ids, Offsets]], lengths: Iterable[int]) -> tuple[Ids, Offsets]:
    """The parts of a text, of these lengths in characters, as one."""
    starts = accumulate(lengths, initial=0)
    shifted = [offsets + start for (_, offsets), start in zip(parts, starts, strict=False)]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate(shifted)


class SentencePieceTokenizer:
    """A SentencePiece model (BPE or unigram).

    SentencePiece writes a space as U+2581, so a U+2581 of the text would come back as a space. In models that keep all
    other text as it is (no normaliser, no dummy prefix, byte fallback) it is encoded as its three bytes instead.
    """

    def __init__(self, path: Path) -> None:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        proto = path.read_bytes()
        if not proto:
            raise UserError(f"{path}: the file is empty: make a tokenizer with `anarchobot tokenizer train`")
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:  # it names a line of its own source
            raise UserError(f"{path}: not a SentencePiece model") from error
        self.files: tuple[Path, ...] = (path,)
        self.vocab_size: int = self._model.vocab_size()
        self.eod_id: int = self._model.eos_id()
        if self.eod_id < 0:
            raise UserError(f"{path}: this tokenizer has no end-of-sentence piece to end documents with")
        spec: Any = sentencepiece_model_pb2.ModelProto.FromString(proto)  # type: ignore[attr-defined]
        normalizer = spec.normalizer_spec
        self.is_lossless = (
            spec.trainer_spec.byte_fallback
            and normalizer.name == "identity"
            and not (normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces)
        )
        self._space_mark = np.array([self._model.piece_to_id(f"<0x{b:02X}>") for b in "▁".encode()], np.int32)
        controls = (i for i in range(self.vocab_size) if self._model.is_control(i))
        self.control_tokens: dict[str, int] = {self._model.id_to_piece(i): i for i in controls}
        self.control_pattern = _control_pattern(self.control_tokens)

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        ids: list[Ids] = self._model.encode(texts, return_type="numpy", num_threads=1)
        if self.is_lossless:
            for i, text in enumerate(texts):
                if "▁" in text:
                    ids[i] = self._encode_marked(text)
        return ids

    def _encode_marked(self, text: str) -> Ids:
        parts: list[Ids] = self._model.encode(text.split("▁"), return_type="numpy")
        joined = [array for part in parts for array in (part, self._space_mark)]
        return np.concatenate(joined[:-1])

    def encode_with_offsets(self, texts: list[str], after_control: Sequence[bool]) -> list[tuple[Ids, Offsets]]:
        """`after_control` makes no difference: each text gets the model's dummy prefix, if it has one."""
        return [
            self._marked_with_offsets(text) if self.is_lossless and "▁" in text else _arrays(found)
            for text, found in zip(texts, self._offset_mapping(texts), strict=True)
        ]

    def _offset_mapping(self, texts: list[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._model.encode(texts, return_type="offset_mapping", num_threads=1)
        return found

    def _marked_with_offsets(self, text: str) -> tuple[Ids, Offsets]:
        mark = self._space_mark, np.array([[0, 1]] * len(self._space_mark), np.int32)
        parts = text.split("▁")
        alternating = [pair for found in self._offset_mapping(parts) for pair in (_arrays(found), mark)]
        return _joined(alternating[:-1], (length for part in parts for length in (len(part), 1)))

    def decode(self, ids: list[int]) -> str:
        return str(self._model.decode(ids))


def _arrays(found: dict[str, Any]) -> tuple[Ids, Offsets]:
    return np.array(found["ids"], np.int32), np.array(found["offsets"], np.int32).reshape(-1, 2)


class HFTokenizer:
    """A model of Hugging Face's `tokenizers`: a whole `tokenizer.json`, or GPT-2's vocabulary and merges."""

    def __init__(self, path: Path, merges: Path | None = None) -> None:
        import tokenizers

        if merges is None:
            self._model: Any = tokenizers.Tokenizer.from_file(str(path))
            self.files: tuple[Path, ...] = (path,)
        elif not merges.is_file():
            raise UserError(f"{merges}: no such file: {path.name} needs its merges beside it")
        else:
            vocab, pairs = tokenizers.models.BPE.read_file(str(path), str(merges))
            for pair in pairs:  # the library would panic
                if "".join(pair) not in vocab:
                    raise UserError(f"{merges}: {path.name} lacks its merge '{' '.join(pair)}': not of one tokenizer")
            self._model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs))
            self._model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            self._model.decoder = tokenizers.decoders.ByteLevel()
            self.files = (path, merges)
        ids = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(ids.values(), default=-1) + 1  # there may be holes
        ends = [name for name in END_OF_DOCUMENT if name in ids]
        if not ends:
            raise UserError(f"{path}: none of {', '.join(END_OF_DOCUMENT)} is in this tokenizer to end documents with")
        self.eod_id: int = ids[ends[0]]
        controls = dict.fromkeys((*END_OF_DOCUMENT, *CHAT_TOKENS))
        self._model.add_special_tokens([name for name in controls if name in ids])
        self._model.encode_special_tokens = True  # "<|endoftext|>" in a document is text, not the end of it
        self._model.no_truncation()
        self._model.no_padding()
        specials = {i: token for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        self._special_ids = set(specials)
        self._inside_special = re.compile(
            "|".join(f"(?<={re.escape(t.content[0])})(?={re.escape(t.content[1:])})" for t in specials.values())
        )
        self.control_tokens: dict[str, int] = {token.content: i for i, token in specials.items()}
        self.control_pattern = _control_pattern(
            self.control_tokens,
            before={token.content for token in specials.values() if token.lstrip},
            behind={token.content for token in specials.values() if token.rstrip},
        )

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        encoded = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return [
            np.array(e.ids if self._special_ids.isdisjoint(e.ids) else self._encode_cut(text), np.int32)
            for e, text in zip(encoded, texts, strict=True)
        ]

    def _encode_cut(self, text: str) -> list[int]:
        """Cuts "</s>" behind its "<": a unigram model of this library would take it for the control token."""
        encoded = self._model.encode_batch_fast(self._inside_special.split(text), add_special_tokens=False)
        return [i for e in encoded for i in e.ids]

    @cached_property
    def _behind_control(self) -> Any:
        """The model for text behind a control token: another one where only a text's very start gets a space."""
        import tokenizers

        metaspace = self._model.pre_tokenizer
        if getattr(metaspace, "prepend_scheme", None) != "first":
            return self._model
        model = tokenizers.Tokenizer.from_str(self._model.to_str())
        model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(metaspace.replacement, "never", metaspace.split)
        model.encode_special_tokens = True  # not in the JSON
        return model

    def encode_with_offsets(self, texts: list[str], after_control: Sequence[bool]) -> list[tuple[Ids, Offsets]]:
        found: list[tuple[Ids, Offsets]] = [(np.empty(0, np.int32), np.empty((0, 2), np.int32))] * len(texts)
        for model, chosen in ((self._model, False), (self._behind_control, True)):
            numbers = [i for i, behind in enumerate(after_control) if behind == chosen]
            encoded = model.encode_batch([texts[i] for i in numbers], add_special_tokens=False)
            for i, e in zip(numbers, encoded, strict=True):
                clean = self._special_ids.isdisjoint(e.ids)
                found[i] = _with_offsets(e) if clean else self._cut_with_offsets(texts[i], model)
        return found

    def _cut_with_offsets(self, text: str, model: Any) -> tuple[Ids, Offsets]:
        first, *others = parts = self._inside_special.split(text)
        encoded = self._behind_control.encode_batch(others, add_special_tokens=False)
        encoded.insert(0, model.encode(first, add_special_tokens=False))
        return _joined([_with_offsets(e) for e in encoded], map(len, parts))

    def decode(self, ids: list[int]) -> str:
        return str(self._model.decode(ids, skip_special_tokens=True))


def _with_offsets(encoded: Any) -> tuple[Ids, Offsets]:
    offsets = np.array(encoded.offsets, np.int32).reshape(-1, 2)
    # Some tokenizers leave the white space at a token's ends out of its offsets.
    offsets[1:, 0] = np.minimum(offsets[1:, 0], offsets[:-1, 1])
    offsets[:1, 0] = 0
    return np.array(encoded.ids, np.int32), offsets
