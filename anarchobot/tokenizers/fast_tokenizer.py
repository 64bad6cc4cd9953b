"""A fast tokenizer engine that is verified against the tokenizer's reference library.

Ids are compared at the start of the text and on a sample throughout, so that a wrong id becomes an error.
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import pairwise
from math import inf
from threading import Lock
from time import process_time, thread_time
from typing import Any, Literal

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.sentencepiece_to_byte_level import spm_to_byte_level
from anarchobot.tokenizers.sentencepiece_to_json import NotConvertible
from anarchobot.tokenizers.tokenizer import (
    CHAT_TOKENS,
    END_OF_DOCUMENT,
    HFTokenizer,
    Ids,
    SentencePieceTokenizer,
    Tokenizer,
)

PACKAGE = "fastokens"
INSTALL = "pip install fastokens==0.3.5"  # the version in the extra `fast`

# Building the fast engine and comparing the start of the text take about as long as the reference takes for this much.
SMALL_TEXT = 3_000_000  # bytes

START_CHARS = 2**20  # compared at the start of the text
SAMPLE_EVERY = 1000  # afterwards, one document in SAMPLE_EVERY,
SAMPLE_CHARS = 2**14  # its first SAMPLE_CHARS characters: at most a thousandth of the text
MEASURED_CHARS = 2**18  # a shorter batch says little about speed
RETRY_EVERY = 16  # batches, while the reference is the faster one

OnMismatch = Literal["stop", "fallback"]


def select_engine(
    tokenizer: Tokenizer,
    engine: Literal["auto", "fast", "reference"],
    on_mismatch: OnMismatch,
    log: Callable[[str], None],
    text_bytes: int | None = None,
) -> Tokenizer:
    """Returns `tokenizer` or a faster equivalent for a text of this size, and logs which one. None: an unknown size.

    Raises UserError when `engine` is "fast" but unavailable, and, with `on_mismatch` "stop", when ids differ.
    """
    reference = _library(tokenizer)
    if engine == "reference":
        log(f"tokenizing with {reference}")
        return tokenizer
    if engine == "auto" and text_bytes is not None and text_bytes < SMALL_TEXT:
        log(f"tokenizing with {reference} (faster than {PACKAGE} for less than {SMALL_TEXT // 10**6} MB)")
        return tokenizer
    try:
        encoder, avoid = _fast_encoder(tokenizer)
    except NotConvertible as reason:
        if engine == "fast":
            raise UserError(
                f"{tokenizer.files[0]}: tokenizer.engine: fast does not support this tokenizer: {reason}: set it to "
                "auto"
            ) from None
        log(f"tokenizing with {reference} ({PACKAGE} does not support this tokenizer: {reason})")
        return tokenizer
    except ModuleNotFoundError:
        if engine == "fast":
            raise UserError(f"tokenizer.engine: fast needs {PACKAGE}: {INSTALL}, or set it to auto") from None
        log(f"tokenizing with {reference} (about ten times faster with {PACKAGE}: {INSTALL})")
        return tokenizer
    fast = VerifiedTokenizer(tokenizer, encoder, avoid, on_mismatch, log, choose=engine == "auto")
    fast.verify(adversarial_texts())
    if not fast.fell_back:
        log(f"tokenizing with {PACKAGE} {version(PACKAGE)}, verified against {reference}")
    return fast


def engine_name(tokenizer: Tokenizer) -> str:
    """The library that produces the ids: "fastokens 0.3.5", "sentencepiece" or "tokenizers"."""
    return f"{PACKAGE} {version(PACKAGE)}" if isinstance(tokenizer, VerifiedTokenizer) else _library(tokenizer)


class VerifiedTokenizer:
    """A Tokenizer that uses `encoder` as long as its ids equal the ids of `reference`.

    `encoder` has fastokens' `encode_batch_flat(texts)`, which returns all ids as bytes of uint32, and the start of each
    text's ids, followed by the end, as bytes of uint64. It releases the GIL, is thread-safe and runs in the calling
    thread. Texts that contain one of the strings in `avoid` are encoded by the reference.

    With `choose`, the reference encodes most of the text if it takes less CPU time for the start of the text. The ids
    are the same.
    """

    def __init__(
        self,
        reference: Tokenizer,
        encoder: Any,
        avoid: tuple[str, ...] = (),
        on_mismatch: OnMismatch = "stop",
        log: Callable[[str], None] = print,
        choose: bool = False,
    ) -> None:
        self.vocab_size, self.eod_id, self.files = reference.vocab_size, reference.eod_id, reference.files
        self.stop_ids, self.overrides = reference.stop_ids, reference.overrides
        self.fell_back = False  # after a mismatch, only the reference is used
        self._reference, self._encoder = reference, encoder
        self._avoid = [(string, string[0]) for string in avoid]
        self._on_mismatch, self._log = on_mismatch, log
        self._lock = Lock()
        self._start_left = START_CHARS
        self._since_sample = 0
        self._choose = choose
        self._cost, self._reference_cost = 0.0, inf  # seconds of CPU time per character
        self._left_to_reference = 0  # batches, since the last try

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        if not self.fell_back and not self._leave_to_reference():
            start, chars = thread_time(), sum(map(len, texts))
            ids = self._encode(texts)
            if chars >= MEASURED_CHARS:
                self._cost = (thread_time() - start) / chars
            if self._verify_sample(texts, ids):
                return ids
        return self._reference.encode_batch(texts)

    def _leave_to_reference(self) -> bool:
        if not self._choose or self._cost <= self._reference_cost:
            return False
        with self._lock:
            self._left_to_reference = (self._left_to_reference + 1) % RETRY_EVERY
            return self._left_to_reference > 0

    def decode(self, ids: list[int]) -> str:
        return self._reference.decode(ids)

    def verify(self, texts: list[str]) -> None:
        """Compares all ids of `texts` and handles a mismatch according to `on_mismatch`."""
        with self._lock:
            self._compare(texts, self._encode(texts))

    def _encode(self, texts: list[str]) -> list[Ids]:
        excluded = {  # finding one character is ten times faster than finding several
            i for string, first in self._avoid for i, text in enumerate(texts) if first in text and string in text
        }
        if excluded:
            texts, all_texts = list(texts), texts
            for i in excluded:
                texts[i] = ""
        buffer, offsets = self._encoder.encode_batch_flat(texts)
        flat = np.frombuffer(buffer, np.uint32).view(np.int32)
        ids: list[Ids] = [flat[start:end] for start, end in pairwise(np.frombuffer(offsets, np.uint64).tolist())]
        if excluded:
            exact = self._reference.encode_batch([all_texts[i] for i in excluded])
            for i, reference_ids in zip(excluded, exact, strict=True):
                ids[i] = reference_ids
        return ids

    def _verify_sample(self, texts: list[str], ids: list[Ids]) -> bool:
        """Returns False after a fallback, now or earlier."""
        with self._lock:  # other threads wait while the start of the text is compared
            sample, sample_ids = [], []
            for i, length in self._choose_sample(texts):
                whole = length >= len(texts[i])
                sample.append(texts[i] if whole else texts[i][:length])
                sample_ids.append(ids[i] if whole else self._encode(sample[-1:])[0])
            return not self.fell_back and (not sample or self._compare(sample, sample_ids))

    def _choose_sample(self, texts: list[str]) -> Iterator[tuple[int, int]]:
        """Yields (index, number of characters) of the texts to compare."""
        for i, text in enumerate(texts):
            if self._start_left > 0:
                yield i, self._start_left
                self._start_left -= len(text)
                continue
            self._since_sample += 1 + len(text) // SAMPLE_CHARS  # a long text counts as several
            if self._since_sample >= SAMPLE_EVERY:
                self._since_sample = 0
                yield i, SAMPLE_CHARS

    def _compare(self, texts: list[str], ids: list[Ids]) -> bool:
        start, chars = process_time(), sum(map(len, texts))  # sentencepiece has its own thread
        reference_ids = self._reference.encode_batch(texts)
        if chars >= MEASURED_CHARS:
            self._reference_cost = (process_time() - start) / chars
        for text, ours, expected in zip(texts, ids, reference_ids, strict=True):
            if np.array_equal(ours, expected):
                continue
            both = min(len(ours), len(expected))
            at = int(np.argmax(np.append(ours[:both] != expected[:both], True)))
            mismatch = (
                f"{PACKAGE} differs from {_library(self._reference)} on {text[:60]!r}: at token {at}, "
                f"{_id_at(ours, at)} instead of {_id_at(expected, at)}"
            )
            if self._on_mismatch == "stop":
                raise UserError(f"{mismatch}: set tokenizer.engine: reference, or tokenizer.on_mismatch: fallback")
            self.fell_back = True
            self._log(f"WARNING: {mismatch}: using {_library(self._reference)} from here on")
            return False
        return True


def _id_at(ids: Ids, at: int) -> str:
    return str(ids[at]) if at < len(ids) else "no id"


def _library(tokenizer: Tokenizer) -> str:
    return "sentencepiece" if isinstance(tokenizer, SentencePieceTokenizer) else "tokenizers"


def _fast_encoder(tokenizer: Tokenizer) -> tuple[Any, tuple[str, ...]]:
    """Returns fastokens' tokenizer, and the strings that it encodes differently.

    Raises ModuleNotFoundError when it is not installed, NotConvertible when it does not support this tokenizer.
    """
    # One thread per call, so that data.num_workers controls the parallelism. Read at the library's first call.
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
    import fastokens

    avoid: list[str] = []
    partial_characters: dict[int, list[int]] = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        model, tied_spaces, partial_characters = spm_to_byte_level(tokenizer.files[0])
        avoid += ["▁", *(token["content"] for token in tokenizer.added_tokens.values())]
        if tied_spaces:
            avoid.append(" " * tied_spaces)
    else:
        assert isinstance(tokenizer, HFTokenizer)
        spec = tokenizer.spec()
        if spec["model"]["type"] != "BPE" or spec["model"]["byte_fallback"]:
            raise NotConvertible("it is not a byte-level BPE model")
        # "<|endoftext|>" in a text stays text, because the engine does not know it as a token.
        spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["special"]]
        model = json.dumps(spec)
    try:
        encoder = fastokens.Tokenizer.from_json_str(model)
        encoder.encode_batch_flat([_EVERY_BYTE])
    except ValueError as error:  # an unsupported feature, or a byte without a token
        raise NotConvertible(" ".join(str(error).split())[:200]) from error
    if partial_characters:
        encoder = _WithPartialCharacters(encoder, partial_characters)
    return encoder, tuple(avoid)


class _WithPartialCharacters:
    """Replaces ids of partial characters by the ids of their bytes: see `ByteLevelModel`."""

    def __init__(self, encoder: Any, partial_characters: dict[int, list[int]]) -> None:
        self._encoder, self._first = encoder, min(partial_characters)
        self._lengths = np.array([len(ids) for ids in partial_characters.values()])
        self._bytes = np.array([[*ids, 0][:3] for ids in partial_characters.values()], np.uint32)

    def encode_batch_flat(self, texts: list[str]) -> tuple[Any, Any]:
        buffer, offsets = self._encoder.encode_batch_flat(texts)
        ids = np.frombuffer(buffer, np.uint32)
        (found,) = np.nonzero(ids >= self._first)
        if not len(found):
            return buffer, offsets
        partial = ids[found] - self._first
        counts = np.ones(len(ids), np.int64)
        counts[found] = self._lengths[partial]
        starts = np.concatenate([[0], np.cumsum(counts)])
        result = np.repeat(ids, counts)
        for i in range(self._bytes.shape[1]):
            has = self._lengths[partial] > i
            result[starts[found[has]] + i] = self._bytes[partial[has], i]
        return result, starts[np.frombuffer(offsets, np.uint64)].astype(np.uint64)


# Contains every byte that occurs in UTF-8.
_EVERY_BYTE = "".join(map(chr, (*range(0x800), *range(0x800, 0xD800, 0x200), *range(0xE000, 0x110000, 0x1000))))

_FRAGMENTS = (
    *("the", " The", "a", "aaa", "ababa", "s'il", "'s", "'LL", "’t", "1", "12345", "3.14", "x²", "->", "...", "=="),
    *("\n", "\r\n", "\t", " ", "  ", "\n\n  ", "\u00a0", "\u2028", "\u3000", "\u200b", "\0", "\x7f", "\ufeff"),
    *(["é", "é", "ß", "Київ", "吾輩は猫", "한국어", "مرحبا", "नमस्ते", "🙂", "👩\u200d👩\u200d👧", "\U0010ffff", "�"]),
    *("▁", "▁▁the", "Ġ", "<0x41>", "<s>", "</s>", "<unk>", "<pad>", "[INST]", *END_OF_DOCUMENT, *CHAT_TOKENS),
)


def adversarial_texts() -> list[str]:
    """Texts that engines have encoded wrongly: control tokens, whitespace, repetition, scripts and mixtures."""
    rng = random.Random(0)  # noqa: S311
    return [
        "",
        _EVERY_BYTE,
        *_FRAGMENTS,
        *(string * n for string in (" ", "\n", "a", "ab", "0", "日", "🙂", "'") for n in (*range(2, 40), 100, 1000)),
        *(f"x{' ' * n}y\n{' ' * n}z" for n in range(2, 40)),
        *("".join(rng.choices(_FRAGMENTS, k=rng.randint(2, 20))) for _ in range(500)),
    ]
