"""A fast engine in front of a tokenizer: the same ids several times as soon, compared with the tokenizer's own library
at the start and on a sample all along, so that a wrong id is an error and not a secret."""

import json
import os
import random
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import pairwise
from threading import Lock
from typing import Any, Literal

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.sentencepiece_to_json import NotConvertible, spm_to_json
from anarchobot.tokenizers.tokenizer import (
    CHAT_TOKENS,
    END_OF_DOCUMENT,
    HFTokenizer,
    Ids,
    SentencePieceTokenizer,
    Tokenizer,
)

PACKAGE = "fastokens"
INSTALL = "pip install fastokens==0.3.5"  # the version of the extra `fast`

START_CHARS = 2**20  # compared at the start of the real text
SAMPLE_EVERY = 1000  # then one document of so many,
SAMPLE_CHARS = 2**14  # of which so many characters: a thousandth of the text at most

OnMismatch = Literal["stop", "fallback"]


def select_engine(
    tokenizer: Tokenizer,
    engine: Literal["auto", "fast", "reference"],
    on_mismatch: OnMismatch,
    say: Callable[[str], None],
) -> Tokenizer:
    """`tokenizer` itself, or one that gives its ids faster; `say` gets a line that tells which.

    Raises UserError when `engine` is "fast" and that can't be, and, with `on_mismatch` "stop", when the ids differ.
    """
    reference = _library(tokenizer)
    if engine == "reference":
        say(f"tokenising with {reference}")
        return tokenizer
    try:
        encoder, avoid = _fast_encoder(tokenizer)
    except NotConvertible as reason:
        if engine == "fast":
            raise UserError(
                f"{tokenizer.files[0]}: tokenizer.engine: fast can't take this tokenizer: {reason}: set it to auto"
            ) from None
        say(f"tokenising with {reference} ({PACKAGE} can't take this tokenizer: {reason})")
        return tokenizer
    except ModuleNotFoundError:
        if engine == "fast":
            raise UserError(f"tokenizer.engine: fast needs {PACKAGE}: {INSTALL}, or set it to auto") from None
        say(f"tokenising with {reference} (about ten times as fast with {PACKAGE}: {INSTALL})")
        return tokenizer
    fast = VerifiedTokenizer(tokenizer, encoder, avoid, on_mismatch, say)
    fast.compare_on(adversarial_texts())
    if not fast.given_up:
        say(f"tokenising with {PACKAGE} {version(PACKAGE)}, checked against {reference}")
    return fast


def engine_name(tokenizer: Tokenizer) -> str:
    """What gives this tokenizer's ids: `"fastokens 0.3.5"`, `"sentencepiece"`, `"tokenizers"`."""
    return f"{PACKAGE} {version(PACKAGE)}" if isinstance(tokenizer, VerifiedTokenizer) else _library(tokenizer)


class VerifiedTokenizer:
    """A Tokenizer whose ids are `encoder`'s as long as they are `reference`'s.

    `encoder` has fastokens' `encode_batch_flat(texts)`: all ids as bytes of uint32, and where each text's begin, as
    bytes of uint64 with the end last. It lets go of the interpreter and may be called from several threads. Texts that
    hold one of `avoid` are left to the reference.
    """

    def __init__(
        self,
        reference: Tokenizer,
        encoder: Any,
        avoid: tuple[str, ...] = (),
        on_mismatch: OnMismatch = "stop",
        say: Callable[[str], None] = print,
    ) -> None:
        self.vocab_size, self.eod_id, self.files = reference.vocab_size, reference.eod_id, reference.files
        self.given_up = False  # a difference was found and the reference is used from there on
        self._reference, self._encoder = reference, encoder
        self._avoid = [(part, part[0]) for part in avoid]
        self._on_mismatch, self._say = on_mismatch, say
        self._lock = Lock()
        self._start_left = START_CHARS
        self._since_sample = 0

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        if not self.given_up:
            ids = self._encode(texts)
            if self._equal_on_sample(texts, ids):
                return ids
        return self._reference.encode_batch(texts)

    def decode(self, ids: list[int]) -> str:
        return self._reference.decode(ids)

    def compare_on(self, texts: list[str]) -> None:
        """Compares all the ids of `texts`; acts on a difference as `on_mismatch` says."""
        with self._lock:
            self._equal(texts, self._encode(texts))

    def _encode(self, texts: list[str]) -> list[Ids]:
        left_out = {  # one character is found ten times as fast as several
            i for part, first in self._avoid for i, text in enumerate(texts) if first in text and part in text
        }
        if left_out:
            texts, all_texts = list(texts), texts
            for i in left_out:
                texts[i] = ""
        buffer, offsets = self._encoder.encode_batch_flat(texts)
        flat = np.frombuffer(buffer, np.uint32).view(np.int32)
        ids: list[Ids] = [flat[start:end] for start, end in pairwise(np.frombuffer(offsets, np.uint64).tolist())]
        if left_out:
            for i, own in zip(left_out, self._reference.encode_batch([all_texts[i] for i in left_out]), strict=True):
                ids[i] = own
        return ids

    def _equal_on_sample(self, texts: list[str], ids: list[Ids]) -> bool:
        """False: given up, now or before."""
        with self._lock:  # nobody passes while the start of the text is being compared
            sample, of_sample = [], []
            for i, length in self._due(texts):
                whole = length >= len(texts[i])
                sample.append(texts[i] if whole else texts[i][:length])
                of_sample.append(ids[i] if whole else self._encode(sample[-1:])[0])
            return not self.given_up and (not sample or self._equal(sample, of_sample))

    def _due(self, texts: list[str]) -> Iterator[tuple[int, int]]:
        """Which of the texts to compare now, and how many characters of each."""
        for i, text in enumerate(texts):
            if self._start_left > 0:
                yield i, self._start_left
                self._start_left -= len(text)
                continue
            self._since_sample += 1 + len(text) // SAMPLE_CHARS  # long ones count as several
            if self._since_sample >= SAMPLE_EVERY:
                self._since_sample = 0
                yield i, SAMPLE_CHARS

    def _equal(self, texts: list[str], ids: list[Ids]) -> bool:
        for text, ours, true in zip(texts, ids, self._reference.encode_batch(texts), strict=True):
            if np.array_equal(ours, true):
                continue
            both = min(len(ours), len(true))
            at = int(np.argmax(np.append(ours[:both] != true[:both], True)))
            differs = (
                f"{PACKAGE} differs from {_library(self._reference)} on {text[:60]!r}: at token {at}, "
                f"{_id(ours, at)} instead of {_id(true, at)}"
            )
            if self._on_mismatch == "stop":
                raise UserError(f"{differs}: set tokenizer.engine: reference, or tokenizer.on_mismatch: fallback")
            self.given_up = True
            self._say(f"WARNING: {differs}: going on with {_library(self._reference)} alone")
            return False
        return True


def _id(ids: Ids, at: int) -> str:
    return str(ids[at]) if at < len(ids) else "no id"


def _library(tokenizer: Tokenizer) -> str:
    return "sentencepiece" if isinstance(tokenizer, SentencePieceTokenizer) else "tokenizers"


def _fast_encoder(tokenizer: Tokenizer) -> tuple[Any, tuple[str, ...]]:
    """fastokens' tokenizer, and the strings whose texts it must not get.

    Raises ModuleNotFoundError when it is not installed, NotConvertible when it can't take this tokenizer.
    """
    # One thread a call, so that data.num_workers says how many work. The library reads it at its first call.
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
    import fastokens

    avoid: list[str] = []
    if isinstance(tokenizer, SentencePieceTokenizer):
        model, tied_spaces = spm_to_json(tokenizer.files[0])
        avoid += ["▁", "<0x"]  # a space, for the engine, and a byte
        if tied_spaces:
            avoid.append(" " * tied_spaces)
    else:
        assert isinstance(tokenizer, HFTokenizer)
        whole = json.loads(tokenizer._model.to_str())
        if whole["model"]["type"] != "BPE" or whole["model"]["byte_fallback"]:
            raise NotConvertible("it is not a byte-level BPE model")
        # "<|endoftext|>" in a text stays text: an engine can't find what it hasn't been told of.
        whole["added_tokens"] = [token for token in whole["added_tokens"] if not token["special"]]
        model = json.dumps(whole)
    try:
        encoder = fastokens.Tokenizer.from_json_str(model)
        encoder.encode_batch_flat([_EVERY_BYTE])
    except ValueError as error:  # what it can't do, or that a byte has no token
        raise NotConvertible(" ".join(str(error).split())[:200]) from error
    return encoder, tuple(avoid)


# Every byte there is in UTF-8.
_EVERY_BYTE = "".join(map(chr, (*range(0x800), *range(0x800, 0xD800, 0x200), *range(0xE000, 0x110000, 0x1000))))

_FRAGMENTS = (
    *("the", " The", "a", "aaa", "ababa", "s'il", "'s", "'LL", "’t", "1", "12345", "3.14", "x²", "->", "...", "=="),
    *("\n", "\r\n", "\t", " ", "  ", "\n\n  ", "\u00a0", "\u2028", "\u3000", "\u200b", "\0", "\x7f", "\ufeff"),
    *(
        "é",
        "e\u0301",
        "ß",
        "Київ",
        "吾輩は猫",
        "한국어",
        "مرحبا",
        "नमस्ते",
        "🙂",
        "👩\u200d👩\u200d👧",
        "\U0010ffff",
        "\ufffd",
    ),
    *("▁", "▁▁the", "Ġ", "<0x41>", "<s>", "</s>", "<unk>", "<pad>", "[INST]", *END_OF_DOCUMENT, *CHAT_TOKENS),
)


def adversarial_texts() -> list[str]:
    """Texts on which engines have been wrong: control tokens, white space, repeats, scripts, and these mixed."""
    mixed = random.Random(0)
    return [
        "",
        _EVERY_BYTE,
        *_FRAGMENTS,
        *(unit * n for unit in (" ", "\n", "a", "ab", "0", "日", "🙂", "'") for n in (*range(2, 40), 100, 1000)),
        *(f"x{' ' * n}y\n{' ' * n}z" for n in range(2, 40)),
        *("".join(mixed.choices(_FRAGMENTS, k=mixed.randint(2, 20))) for _ in range(500)),
    ]
