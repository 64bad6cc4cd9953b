"""Making a tokenizer from text: SentencePiece (BPE or unigram) or a byte-level BPE in GPT-2's two files.

Both keep every character: no normaliser, no added prefix, bytes for what the vocabulary lacks, so that
`decode(encode(text)) == text` for any Unicode text.
"""

import io
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.tokenizer import CHAT_TOKENS

# SentencePiece skips any "sentence" over its limit with a mere warning: 84 % of a corpus of whole documents. We cut
# lines below it instead, and at U+2585, for which it skips a line too, so that no text is skipped.
MAX_LINE_BYTES = 4000


def train_tokenizer(
    texts: Iterable[str],
    output: str | Path,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    file_format: Literal["sentencepiece", "gpt2"] = "sentencepiece",
) -> list[Path]:
    """Learns `vocab_size` tokens from `texts` and writes `OUTPUT.model` and `OUTPUT.vocab`, or `OUTPUT-vocab.json` and
    `OUTPUT-merges.txt`. Returns the files, the one to load first.

    Raises UserError when there is no text, or too little for so many tokens.
    """
    texts = (text for text in texts if text and not text.isspace())
    first = next(texts, None)
    if first is None:
        raise UserError("no text to learn a tokenizer from")
    texts = chain([first], texts)
    prefix = Path(output)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    if file_format == "gpt2":
        if model_type != "bpe":
            raise UserError("tokenizer.format: gpt2 files hold a BPE model: set tokenizer.model_type: bpe")
        return _train_gpt2(texts, prefix, vocab_size)
    return _train_sentencepiece(texts, prefix, vocab_size, model_type)


def limit_bytes(texts: Iterable[str], megabytes: float, taken: list[int]) -> Iterator[str]:
    """The texts from the start, the last one cut at `megabytes` of UTF-8; `taken[0]` counts the bytes given out."""
    most = int(megabytes * 1e6)
    for text in texts:
        raw = text.encode()[: most - taken[0]]
        taken[0] += len(raw)
        yield raw.decode(errors="ignore")  # of a character that was cut
        if taken[0] >= most:
            return


def _train_sentencepiece(texts: Iterable[str], prefix: Path, vocab_size: int, model_type: str) -> list[Path]:
    import sentencepiece

    model = io.BytesIO()
    failures: list[BaseException] = []

    def lines() -> Iterator[str]:
        try:
            yield from (line for text in texts for line in _lines(text))
        except BaseException as error:  # SentencePiece would make a RuntimeError of it
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
            allow_whitespace_only_pieces=True,  # indentation becomes one piece
            split_digits=True,
            control_symbols=list(CHAT_TOKENS),
            max_sentence_length=MAX_LINE_BYTES + 4,
            num_threads=16,  # fixed, on any machine: a unigram model's scores depend on it
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if failures:
            raise failures[0] from None
        raise _explained(vocab_size, str(error)) from error
    path = prefix.with_name(prefix.name + ".model")
    path.write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    listing = prefix.with_name(prefix.name + ".vocab")
    with listing.open("w", encoding="utf-8") as file:  # a list for people, in SentencePiece's own form
        for i in range(processor.vocab_size()):
            file.write(f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n")
    return [path, listing]


def _lines(text: str) -> Iterator[str]:
    for line in re.split("[\n▅]", text):
        if len(line) * 4 <= MAX_LINE_BYTES or len(line.encode()) <= MAX_LINE_BYTES:
            if line:
                yield line
        else:
            step = MAX_LINE_BYTES // 4  # a character has at most four bytes
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
        raise _impossible(vocab_size, _most(size) if size < vocab_size else _least(size))
    vocab, merges = tokenizer.model.save(str(prefix.parent), prefix.name)
    return [Path(vocab), Path(merges)]


def _explained(vocab_size: int, reason: str) -> UserError:
    """SentencePiece's reason in one line that says what to change."""
    if most := re.search(r"value <= (\d+)", reason):
        return _impossible(vocab_size, _most(int(most[1])))
    if least := re.search(r"required_chars\. \d+ vs (\d+)", reason):
        return _impossible(vocab_size, _least(int(least[1])))
    return _impossible(vocab_size, " ".join(reason.split()))


def _most(size: int) -> str:
    return f"it gives at most {size}: give more text, or set a smaller vocabulary"


def _least(size: int) -> str:
    return f"bytes, characters and control tokens alone need {size}: set a larger vocabulary"


def _impossible(vocab_size: int, hint: str) -> UserError:
    return UserError(f"no tokenizer of {vocab_size} tokens can be made from this text: {hint}")
