"""Tokenizers in common file formats behind one interface: SentencePiece's `.model`, Hugging Face's `tokenizer.json`,
and GPT-2's `vocab.json` with `merges.txt`."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.storage.durable import write_atomic
from anarchobot.tokenizers.byte_fallback import separate_invalid_bytes
from anarchobot.tokenizers.special_tokens import (
    ADDED_TOKEN_FLAGS,
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    AddedToken,
    SpecialTokens,
    read_config,
    read_special_tokens,
)
from anarchobot.tokenizers.token_pattern import TokenPattern

Ids = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int32]  # [n, 2]: the character range [start, end) of each of n tokens

# End-of-document tokens as models name them, most likely first. Used for tokenizers without a named end.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
# Reserved in tokenizers trained here, so that a pretrained model can be tuned for chat (ChatML) without resizing.
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
MAX_GAPS = 1024  # ids without a token, beyond as many as there are tokens
SENTENCEPIECE = "tokenizer.model"  # beside a tokenizer.json, it is only used for GGUF


class Tokenizer(Protocol):
    """Text to ids and back. Text that looks like a control token is always encoded as ordinary text."""

    vocab_size: int
    eod_id: int  # ends every document in the shards
    stop_ids: frozenset[int]  # end generation: eod_id and the model's other ends, such as the end of a turn
    files: tuple[Path, ...]  # the first one names it
    overrides: dict[str, Any]  # what the files beside it change: "added_tokens_decoder", "eod_id", "vocab_size"

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        """Returns one int32 array of ids per text, without an end-of-document id. Thread-safe."""

    def decode(self, ids: list[int]) -> str:
        """Control tokens are omitted; invalid UTF-8 becomes U+FFFD."""


class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer for chat templates, with control tokens and character offsets."""

    control_tokens: dict[str, int]  # ids by token text
    control_pattern: TokenPattern
    longest_token: int  # at least as many characters as any token stands for

    def encode_segments(self, texts: list[str], after_control: Sequence[bool]) -> list[Ids]:
        """The ids of `encode_with_offsets`, at a fraction of its cost."""

    def encode_with_offsets(self, texts: list[str], after_control: Sequence[bool]) -> list[tuple[Ids, Offsets]]:
        """The ids of `encode_batch`, with the characters of each token. A token without characters gets an
        empty range at the next character. `after_control`: whether the text follows a control token, which matters to
        a few tokenizers."""

    def start_ids(self) -> list[int] | None:
        """The ids that transformers puts before a text; None if the tokenizer's files don't say."""


def load_tokenizer(path: str | Path) -> ChatTokenizer:
    """Loads a tokenizer file, or the tokenizer of a folder: its tokenizer.json, or the only other one. The files of a
    Hugging Face model beside it determine the special tokens (special_tokens.py).

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
    except BaseException as error:
        # The libraries raise plain Exception, and Rust's panics are no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{path}: not a supported tokenizer: {' '.join(str(error).split())[:200]}") from error
    raise UserError(f"{path}: expected a tokenizer: a .model, tokenizer.json or vocab.json file")


def _check_ids(path: Path, vocab: Mapping[str, int]) -> None:
    """Raises UserError if two tokens have the same id: the library saves one of them, at random."""
    tokens = {i: token for token, i in vocab.items()}
    for token, i in vocab.items() if len(tokens) < len(vocab) else ():
        if tokens[i] != token:
            first, second = sorted((token, tokens[i]))
            raise UserError(f"{path}: the tokens {first!r} and {second!r} have the id {i}: damaged")


def _find_in_folder(folder: Path) -> Path:
    for pattern in ("tokenizer.json", SENTENCEPIECE, "vocab.json", "*.model", "*tokenizer.json", "*vocab.json"):
        paths = sorted(folder.glob(pattern))
        if len(paths) > 1:
            raise UserError(f"{folder}: several tokenizers here: specify one of {', '.join(p.name for p in paths)}")
        if paths:
            return paths[0]
    raise UserError(f"{folder}: no tokenizer in this folder (*.model, tokenizer.json or vocab.json + merges.txt)")


def digest(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer's files, concatenated, and of the special tokens that the files beside it change."""
    sha = hashlib.sha256()
    for file in tokenizer.files:
        sha.update(file.read_bytes())
    if tokenizer.overrides:
        sha.update(json.dumps(tokenizer.overrides, sort_keys=True).encode())
    return sha.hexdigest()


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> str:
    """Copies the tokenizer's files into `folder` under their standard names, with the special tokens that the files
    beside it define; returns the first name. Identical copies are not written again, and each file is replaced
    atomically."""
    names = [_standard_name(file) for file in tokenizer.files]
    for file, name in zip(tokenizer.files, names, strict=True):
        _write_if_changed(folder / name, file.read_bytes())
    sentencepiece = tokenizer.files[0].with_name(SENTENCEPIECE)
    if names[0] == "tokenizer.json" and sentencepiece.is_file():
        _write_if_changed(folder / SENTENCEPIECE, sentencepiece.read_bytes())
    copy_special_tokens(tokenizer, folder)
    return names[0]


def copy_special_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes what the files beside the tokenizer define, as files beside its copy in `folder`."""
    values: dict[str, dict[str, Any]] = {}
    if added := tokenizer.overrides.get("added_tokens_decoder"):
        values[TOKENIZER_CONFIG] = {"added_tokens_decoder": added}
    if "eod_id" in tokenizer.overrides or len(tokenizer.stop_ids) > 1:
        ends = [tokenizer.eod_id, *sorted(tokenizer.stop_ids - {tokenizer.eod_id})]
        values[GENERATION_CONFIG] = {"eos_token_id": ends}
    if "vocab_size" in tokenizer.overrides:
        values.setdefault(GENERATION_CONFIG, {})["vocab_size"] = tokenizer.vocab_size
    for name, value in values.items():
        text = json.dumps(read_config(folder / name) | value, indent=2, ensure_ascii=False) + "\n"
        _write_if_changed(folder / name, text.encode())


def _write_if_changed(path: Path, content: bytes) -> None:
    if not (path.is_file() and path.read_bytes() == content):
        write_atomic(path, content)


def text_start(tokenizer: Tokenizer, bos_id: int | None) -> list[int]:
    """The ids before a text, for a model with this `model.bos_id`: by default the end of the document before it, as in
    the shards."""
    if bos_id is None:
        return [tokenizer.eod_id]
    return [] if bos_id < 0 else [bos_id]


def _standard_name(file: Path) -> str:
    names = ("vocab.json", "merges.txt", "tokenizer.json")
    return next((name for name in names if file.name.endswith(name)), f"tokenizer{file.suffix}")


def _end_ids(
    tokens: SpecialTokens, find: Callable[[str], int | None], known: list[int], size: int
) -> tuple[int, frozenset[int]] | None:
    """The end of a document, and all ids that end generation: those that the files name, or else the first of `known`.
    None if there is none. `known` are ids of usual ends of a document, preferred among several; `find` returns a
    token's id. Ids from `size` on are ignored: the tokenizer has no such tokens."""
    ends = [i for i in tokens.eos_ids if 0 <= i < size]
    if (eos := find(tokens.names.get("eos_token", ""))) is not None:
        ends.append(eos)
    candidates = [i for i in known if i in ends] or ends or known
    return (candidates[0], frozenset([candidates[0], *ends])) if candidates else None


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
        tokens = read_special_tokens(path.parent)
        pieces: int = self.processor.vocab_size()
        rows = tokens.vocab_size
        self.added_tokens = {
            i: token for i, token in tokens.added.items() if i >= pieces and (rows is None or i < rows)
        }
        self.vocab_size = pieces + len(self.added_tokens)
        if list(self.added_tokens) != list(range(pieces, self.vocab_size)):
            raise UserError(
                f"{path}: it has {pieces} tokens, but the files beside it add tokens with ids "
                f"{', '.join(map(str, self.added_tokens))}: expected {pieces} and the following"
            )
        eos = self.processor.eos_id()
        ends = _end_ids(tokens, self._find, [eos] if eos >= 0 else [], self.vocab_size)
        if ends is None:
            raise UserError(f"{path}: this tokenizer has no end-of-sentence token to end documents with")
        self.eod_id, self.stop_ids = ends
        self.overrides: dict[str, Any] = {"eod_id": self.eod_id} if self.eod_id != eos else {}
        if self.added_tokens:  # without those beyond the model's rows
            self.overrides["added_tokens_decoder"] = {str(i): token for i, token in self.added_tokens.items()}
        proto = read_sentencepiece_proto(path)
        normalizer = proto.normalizer_spec
        is_lossless = (
            proto.trainer_spec.byte_fallback
            and normalizer.name == "identity"
            and not (normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces)
        )
        added = (token["content"] for token in self.added_tokens.values())
        self.longest_token = max(map(len, (*self.processor.id_to_piece(list(range(pieces))), *added)))
        controls = (i for i in range(pieces) if self.processor.is_control(i))
        self.control_tokens: dict[str, int] = {self.processor.id_to_piece(i): i for i in controls}
        special = {
            i: token
            for i, token in self.added_tokens.items()
            if token.get("special") or i in self.stop_ids or token["content"] in CHAT_TOKENS
        }
        self.control_pattern = TokenPattern((*({"content": t} for t in self.control_tokens), *special.values()))
        self.control_tokens |= {token["content"]: i for i, token in special.items()}
        plain = {i: token for i, token in self.added_tokens.items() if i not in special}
        self._fixed = {token["content"]: np.array([i], np.int32) for i, token in plain.items()}
        fixed = list(plain.values())
        if is_lossless:
            mark = [self.processor.piece_to_id(f"<0x{b:02X}>") for b in "▁".encode()]
            self._fixed["▁"] = np.array(mark, np.int32)
            fixed.append({"content": "▁"})
        self._fixed_pattern = TokenPattern(tuple(fixed))

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        ids: list[Ids] = self.processor.encode(texts, return_type="numpy", num_threads=1)
        if self._fixed:
            for i, text in enumerate(texts):
                if self._fixed_pattern.search(text):
                    ids[i] = self._encode_parts(text)[0]
        return ids

    def encode_segments(self, texts: list[str], after_control: Sequence[bool]) -> list[Ids]:
        """`after_control` has no effect: each text gets the model's dummy prefix, if it has one."""
        return self.encode_batch(texts)

    def encode_with_offsets(self, texts: list[str], after_control: Sequence[bool]) -> list[tuple[Ids, Offsets]]:
        """`after_control`: see `encode_segments`."""
        return [
            self._encode_parts(text) if self._fixed_pattern.search(text) else _to_arrays(mapping)
            for text, mapping in zip(texts, self._offset_mapping(texts), strict=True)
        ]

    def _offset_mapping(self, texts: list[str]) -> list[dict[str, Any]]:
        mappings: list[dict[str, Any]] = self.processor.encode(texts, return_type="offset_mapping", num_threads=1)
        return mappings

    def _encode_parts(self, text: str) -> tuple[Ids, Offsets]:
        """Splits the text at strings that have fixed ids."""
        matches = list(self._fixed_pattern.finditer(text))
        bounds = [0, *(place for match in matches for place in match[:2]), len(text)]
        mappings = self._offset_mapping([text[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)])
        parts = [_to_arrays(mappings[0])]
        for match, mapping in zip(matches, mappings[1:], strict=True):
            ids = self._fixed[match.content]
            parts += [(ids, np.array([[0, match.end - match.start]] * len(ids), np.int32)), _to_arrays(mapping)]
        return _concatenate(parts, (b - a for a, b in pairwise(bounds)))

    def decode(self, ids: list[int]) -> str:
        if not self.added_tokens:
            return str(self.processor.decode(ids))
        special = set(self.control_tokens.values())
        kept = [i for i in ids if i not in special]
        runs = groupby(kept, key=lambda i: i if i in self.added_tokens else -1)
        return "".join(
            str(self.processor.decode(list(run))) if i < 0 else self.added_tokens[i]["content"] * len(list(run))
            for i, run in runs
        )

    def start_ids(self) -> list[int] | None:
        return _configured_start(self.files[0].parent, self._find)

    def _find(self, token: str) -> int | None:
        i: int = self.processor.piece_to_id(token)
        if token and self.processor.id_to_piece(i) == token:
            return i
        return next((i for i, added in self.added_tokens.items() if added["content"] == token), None)


def _configured_start(folder: Path, find: Callable[[str], int | None]) -> list[int] | None:
    """What transformers puts before a text if there is no tokenizer.json; None if tokenizer_config.json is silent."""
    add_bos = read_config(folder / TOKENIZER_CONFIG).get("add_bos_token")
    if not isinstance(add_bos, bool):
        return None
    bos = find(read_special_tokens(folder).names.get("bos_token", "<s>"))
    return [bos] if add_bos and bos is not None else []


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
        _check_ids(path, self.backend.get_vocab(with_added_tokens=False))
        self._mark_special([*END_OF_DOCUMENT, *CHAT_TOKENS])
        bare = self._read_added_tokens()
        tokens = read_special_tokens(path.parent)
        self._add_tokens(tokens.added)
        self._mark_special([*tokens.names.values(), *tokens.others])
        ids = self.backend.get_vocab(with_added_tokens=True)
        self.longest_token = max(map(len, ids), default=1)  # in bytes for byte-level models
        beyond = {i for i in self._read_added_tokens() if tokens.vocab_size is not None and i >= tokens.vocab_size}
        self.vocab_size: int = max((i for i in ids.values() if i not in beyond), default=-1) + 1  # ids may have gaps
        if self.vocab_size > 2 * len(ids) + MAX_GAPS:  # memory is in proportion to the largest id
            raise UserError(f"{path}: {len(ids):,} tokens, but ids up to {self.vocab_size - 1:,}: damaged")
        known = [ids[name] for name in END_OF_DOCUMENT if name in ids]
        ends = _end_ids(tokens, ids.get, known, self.vocab_size)
        if ends is None:
            raise UserError(
                f"{path}: no end-of-document token: expected one of {', '.join(END_OF_DOCUMENT)}, or eos_token in a "
                f"{TOKENIZER_CONFIG} beside it"
            )
        self.eod_id, self.stop_ids = ends
        # An ordinary token that the files name as an end, such as a newline, remains one.
        added = self._read_added_tokens()
        self._mark_special([added[i]["content"] for i in (*self.stop_ids, *beyond) if i in added])
        self.added_tokens = added = self._read_added_tokens()  # by id
        self.overrides: dict[str, Any] = {"eod_id": self.eod_id} if [self.eod_id] != known[:1] else {}
        if added != bare:
            self.overrides["added_tokens_decoder"] = {str(i): token for i, token in added.items()}
        if beyond:
            self.overrides["vocab_size"] = self.vocab_size
        self.backend.encode_special_tokens = True  # "<|endoftext|>" in a document is text, not the end of it
        self.backend.no_truncation()
        self.backend.no_padding()
        specials = {i: token for i, token in added.items() if token["special"] and i not in beyond}
        self._special_ids = set(specials)
        self.control_tokens: dict[str, int] = {token["content"]: i for i, token in specials.items()}
        self.control_pattern = TokenPattern(tuple(specials.values()))
        self._start_ids = self._read_start_ids()

    def _read_added_tokens(self) -> dict[int, AddedToken]:
        tokens = sorted(self.backend.get_added_tokens_decoder().items())
        return {i: {key: getattr(token, key) for key in ("content", *ADDED_TOKEN_FLAGS)} for i, token in tokens}

    def _add_tokens(self, tokens: dict[int, AddedToken]) -> None:
        """Adds tokens or changes how existing ones strip whitespace. Raises UserError if one would get another id."""
        import tokenizers

        for i, token in tokens.items():
            added = tokenizers.AddedToken(**{"normalized": not token.get("special"), **token})
            (self.backend.add_special_tokens if added.special else self.backend.add_tokens)([added])
            if (actual := self.backend.token_to_id(added.content)) != i:
                raise UserError(
                    f"{self.files[0]}: the files beside it add {added.content!r} with id {i}, but here it has id "
                    f"{actual}: expected {TOKENIZER_CONFIG} of the same tokenizer"
                )

    def _mark_special(self, names: Iterable[str]) -> None:
        """Makes these tokens of the vocabulary special. Those that are already keep how they strip whitespace: adding
        one again by name alone would reset that."""
        import tokenizers

        added = {token["content"]: token for token in self._read_added_tokens().values()}
        for name in names:
            token = added.get(name, {"content": name, "special": False, "normalized": False})
            if not token["special"] and self.backend.token_to_id(name) is not None:
                self.backend.add_special_tokens([tokenizers.AddedToken(**{**token, "special": True})])

    def _read_start_ids(self) -> list[int] | None:
        """Raises UserError if the tokens of a text are not among those with start and end."""
        if len(self.files) > 1:  # without a tokenizer.json
            return _configured_start(self.files[0].parent, self.backend.token_to_id)
        with_start, plain = (self.backend.encode("a", add_special_tokens=add).ids for add in (True, False))
        for n in range(len(with_start) + 1):
            if with_start[n : n + len(plain)] == plain:
                return list(with_start[:n])
        raise UserError(f"{self.files[0]}: its post-processor changes the tokens of a text: damaged")

    def start_ids(self) -> list[int] | None:
        return self._start_ids

    def spec(self) -> dict[str, Any]:
        """The content of a tokenizer.json, including the control tokens that are added when loading."""
        spec: dict[str, Any] = json.loads(self.backend.to_str())
        return spec

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        return self._encode(texts, self.backend)

    def encode_segments(self, texts: list[str], after_control: Sequence[bool]) -> list[Ids]:
        backends = (self._backend_after_control if after else self.backend for after in after_control)
        return [self._encode([text], backend)[0] for text, backend in zip(texts, backends, strict=True)]

    def _encode(self, texts: list[str], backend: Any) -> list[Ids]:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [
            np.array(e.ids if self._special_ids.isdisjoint(e.ids) else self._encode_split(text, backend), np.int32)
            for e, text in zip(encodings, texts, strict=True)
        ]

    def _encode_split(self, text: str, backend: Any) -> list[int]:
        """Splits "</s>" after its "<": the library's unigram models would encode it as the control token."""
        first, *others = self.control_pattern.split_inside(text)
        encodings = self._backend_after_control.encode_batch_fast(others, add_special_tokens=False)
        return [i for e in (backend.encode(first, add_special_tokens=False), *encodings) for i in e.ids]

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
        first, *others = chunks = self.control_pattern.split_inside(text)
        encodings = self._backend_after_control.encode_batch(others, add_special_tokens=False)
        encodings.insert(0, backend.encode(first, add_special_tokens=False))
        return _concatenate([_with_offsets(e) for e in encodings], map(len, chunks))

    def decode(self, ids: list[int]) -> str:
        text = str(self.backend.decode(ids, skip_special_tokens=True))
        if "\ufffd" not in text or not self._has_byte_tokens:
            return text
        special = {i for i, token in self.added_tokens.items() if token["special"]}
        tokens = (self.backend.id_to_token(i) for i in ids if i not in special)
        return str(self.backend.decoder.decode(list(separate_invalid_bytes(filter(None, tokens)))))

    @cached_property
    def _has_byte_tokens(self) -> bool:
        return "ByteFallback" in json.dumps(self.spec()["decoder"])


def _with_offsets(encoding: Any) -> tuple[Ids, Offsets]:
    offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
    # Some tokenizers exclude whitespace at the ends of a token from its offsets.
    offsets[1:, 0] = np.minimum(offsets[1:, 0], offsets[:-1, 1])
    offsets[:1, 0] = 0
    return np.array(encoding.ids, np.int32), offsets
