"""Trains tokenizers: SentencePiece (BPE or unigram), or a byte-level BPE in GPT-2's two files.

Both are lossless: without normalizer and dummy prefix, and with byte fallback, `decode(encode(text)) == text` for any
Unicode text.
"""

import io
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from anarchobot.config.errors import UserError
from anarchobot.storage.durable import write_atomic
from anarchobot.tokenizers.tokenizer import CHAT_TOKENS

# SentencePiece skips any "sentence" over its limit with only a warning: 84% of a corpus of whole documents. To skip
# nothing, text is split into lines, at U+2585 (lines that contain it are skipped too), and within longer lines.
MAX_LINE_BYTES = 4000


def train_tokenizer(
    texts: Iterable[str],
    output: str | Path,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    file_format: Literal["sentencepiece", "gpt2"] = "sentencepiece",
) -> list[Path]:
    """Writes `OUTPUT.model` and `OUTPUT.vocab`, or `OUTPUT-vocab.json` and `OUTPUT-merges.txt`. Returns the files, the
    one to load first.

    Raises UserError when there is no text, or too little for `vocab_size` tokens.
    """
    texts = (text for text in texts if text and not text.isspace())
    first = next(texts, None)
    if first is None:
        raise UserError("no text to train a tokenizer on")
    texts = chain([first], texts)
    prefix = Path(output)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    if file_format == "gpt2":
        if model_type != "bpe":
            raise UserError("tokenizer.format: gpt2 supports only BPE: set tokenizer.model_type: bpe")
        return _train_gpt2(texts, prefix, vocab_size)
    return _train_sentencepiece(texts, prefix, vocab_size, model_type)


def limit_bytes(texts: Iterable[str], megabytes: float, taken: list[int]) -> Iterator[str]:
    """Yields the first `megabytes` of UTF-8, truncating the last text; `taken[0]` counts the bytes yielded."""
    limit = int(megabytes * 1e6)
    for text in texts:
        raw = text.encode()[: limit - taken[0]]
        taken[0] += len(raw)
        yield raw.decode(errors="ignore")  # drops a truncated character
        if taken[0] >= limit:
            return


def _train_sentencepiece(texts: Iterable[str], prefix: Path, vocab_size: int, model_type: str) -> list[Path]:
    import sentencepiece

    model = io.BytesIO()
    failures: list[BaseException] = []

    def lines() -> Iterator[str]:
        try:
            yield from (line for text in texts for line in _lines(text))
        except BaseException as error:  # SentencePiece would turn it into a RuntimeError
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # indentation becomes a single piece
            split_digits=True,
            control_symbols=list(CHAT_TOKENS),
            max_sentence_length=MAX_LINE_BYTES + 4,
            num_threads=16,  # fixed, because a unigram model's scores depend on it
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if failures:
            raise failures[0] from None
        raise _training_error(vocab_size, str(error)) from error
    path = prefix.with_name(prefix.name + ".model")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    listing = prefix.with_name(prefix.name + ".vocab")
    lines_of_listing = (  # human-readable, in SentencePiece's own format
        f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n" for i in range(processor.vocab_size())
    )
    write_atomic(listing, "".join(lines_of_listing))
    write_atomic(path, model.getvalue())
    return [path, listing]


def _lines(text: str) -> Iterator[str]:
    for line in re.split("[\n▅]", text):
        if len(line) * 4 <= MAX_LINE_BYTES or len(line.encode()) <= MAX_LINE_BYTES:
            if line:
                yield line
        else:
            step = MAX_LINE_BYTES // 4  # a character takes at most four bytes
            yield from (line[i : i + step] for i in range(0, len(line), step))


def _train_gpt2(texts: Iterable[str], prefix: Path, vocab_size: int) -> list[Path]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    specials = ["<|endoftext|>", *CHAT_TOKENS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        raise _size_error(vocab_size, _at_most(size) if size < vocab_size else _at_least(size))
    with TemporaryDirectory() as folder:
        saved = [Path(file) for file in tokenizer.model.save(folder, prefix.name)]  # vocabulary, merges
        files = [prefix.with_name(file.name) for file in saved]
        for file, source in zip(files, saved, strict=True):
            write_atomic(file, source.read_bytes())
    return files


def _training_error(vocab_size: int, reason: str) -> UserError:
    """SentencePiece's reason in one line, with a remedy."""
    if most := re.search(r"value <= (\d+)", reason):
        return _size_error(vocab_size, _at_most(int(most[1])))
    if least := re.search(r"required_chars\. \d+ vs (\d+)", reason):
        return _size_error(vocab_size, _at_least(int(least[1])))
    return _size_error(vocab_size, " ".join(reason.split()))


def _at_most(size: int) -> str:
    return f"it supports at most {size} tokens: give more text, or set a smaller vocabulary"


def _at_least(size: int) -> str:
    return f"bytes, characters and control tokens alone need {size}: set a larger vocabulary"


def _size_error(vocab_size: int, hint: str) -> UserError:
    return UserError(f"can't train a tokenizer of {vocab_size} tokens on this text: {hint}")
