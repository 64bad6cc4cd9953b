"""Checks of text, tokenizer and shards, and of whether they and the model belong together."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from anarchobot.config.schema import DataConfig
from anarchobot.data.batches import TrainBatches
from anarchobot.data.conversations.reading import conversations, pairs
from anarchobot.data.conversations.tally import Tally
from anarchobot.data.shards import TokenStream, verify
from anarchobot.data.sources.documents import DocumentCounts, open_source
from anarchobot.data.windows import StreamWindows, open_windows
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.model.parameters import parameter_count
from anarchobot.preflight.check import Answer, Question, Setup
from anarchobot.preflight.settings import shard_folders
from anarchobot.tasks.adaptation import checks as adapt_checks
from anarchobot.tasks.pretrain import check_tokenizers, first_weights
from anarchobot.tokenizers.tokenizer import load_tokenizer

SHOWN, SHOWN_CHARS = 2, 60  # documents, and characters of each
LOOKED_AT = 100  # documents or rows that are read


def tokenizer(setup: Setup) -> Answer:
    loaded = setup.loaded
    path, size = loaded.config.train.tokenizer_path, loaded.config.model.vocab_size
    if path is None:
        return Answer("pass", "train.tokenizer_path is left out: the one beside the shards")
    found = load_tokenizer(path).vocab_size
    if found != size:
        return Answer(
            "fail",
            f"{loaded.where('model.vocab_size')}: {size}, but {path} has {found} tokens",
            f"set model.vocab_size: {found}",
        )
    return Answer("pass", f"{path}: {found:,} tokens")


def dataset(setup: Setup) -> Answer:
    return _documents(setup.loaded.config.data, setup.loaded.config.train.seed)


def corpus(setup: Setup) -> Answer:
    """The field's text of adapt-vocab."""
    own = setup.adapt.config.corpus
    return _documents(DataConfig(dataset=own.domain, text_field=own.text_field, documents=own.documents), 0)


def _documents(data: DataConfig, seed: int) -> Answer:
    """The first ones, read as pretokenize would; of a Hugging Face dataset no more is fetched than that."""
    if data.dataset is None:
        return Answer("pass", "data.dataset is left out: the shards are there")
    warned: list[str] = []
    counts = DocumentCounts()
    name, documents = open_source(
        data.model_copy(update={"shuffle_buffer": 0, "streaming": True}), seed, counts, warn=warned.append
    )
    first = [document.text for document in islice(documents, LOOKED_AT)]
    if not first:
        return Answer(
            "fail",
            f"{name}: no document in it is of use ({counts.summary()})",
            "give other text in data.dataset, or see data.min_chars and data.text_field",
        )
    if warned:
        return Answer("warn", warned[0], "name local files in data.dataset, or mend the network")
    if counts.broken:
        return Answer(
            "warn",
            f"{name}: {counts.broken} of the first {counts.read} are broken; {counts.first_broken}",
            "mend the file that data.dataset names: they are left out",
        )
    return Answer("pass", f"{name}: {_shown(first)}")


def _shown(texts: Iterable[str]) -> str:
    return "; ".join(repr(text[:SHOWN_CHARS]) for text in islice(texts, SHOWN))


def rows(setup: Setup) -> Answer:
    """The first conversations or pairs."""
    config, tally = setup.loaded.config, Tally()
    data = config.data.model_copy(update={"shuffle_buffer": 0, "streaming": True})
    if setup.pairs:
        first = [pair.chosen for _, pair in islice(pairs(data, tally, config.chat.language), LOOKED_AT)]
    else:
        found = conversations(data, tally, config.chat.format, config.chat.language)
        first = [conversation[-1].content for _, conversation in islice(found, LOOKED_AT)]
    if not first:
        return Answer("fail", f"no row is of use; {'; '.join(tally.lines())}", "mend data.dataset: docs/tuning.md")
    return Answer("pass", f"{tally.kept} of the first {tally.read} rows are good; the first end with: {_shown(first)}")


def shards(setup: Setup) -> Answer:
    folders, files = shard_folders(setup.loaded.config), 0
    for folder in folders:
        for file, problem in verify(folder):
            files += 1
            if problem:
                return Answer(
                    "fail",
                    f"{Path(folder) / file}: {problem.partition(': pretokenize')[0]}",
                    f"anarchobot pretokenize {setup.path} --restart",
                )
    setup.streams = [TokenStream(folder, "train") for folder in folders]
    held_out = sum(stream.manifest.tokens("val") for stream in setup.streams)
    tokens = sum(stream.tokens for stream in setup.streams)
    good = f"{files} files in {', '.join(folders)} are good"
    return Answer("pass", f"{good}: {tokens:,} tokens to learn from, {held_out:,} held out")


def model_and_data(setup: Setup) -> Answer:
    loaded, config = setup.loaded, setup.loaded.config
    data, train = config.data, config.train
    check_tokenizers(loaded, setup.streams)
    sets = [open_windows(stream, data.seq_len, data.pack, data.document_mask) for stream in setup.streams]
    setup.windows = TrainBatches(sets, train.seed, data.shard_weights).windows
    if train.init_from is not None:
        setup.base = load_pretrained(train.init_from)
        first_weights(loaded, setup.base)
    held_out = sum(
        StreamWindows(TokenStream(s.folder, "val"), data.seq_len, data.document_mask).count for s in setup.streams
    )
    if held_out == 0:
        return Answer(
            "warn",
            "the validation split has no sequence: no validation, no best checkpoint",
            f"raise data.val_fraction or give more text, then anarchobot pretokenize {setup.path} --restart",
        )
    per_step = train.micro_batch_size * train.grad_accum_steps
    if per_step > setup.windows:
        return Answer(
            "warn",
            f"a step takes {per_step:,} sequences, and there are {setup.windows:,}: some come twice",
            "lower train.micro_batch_size or train.grad_accum_steps, or give more text",
        )
    parameters = f"{parameter_count(config.model):,} parameters"
    sequences = f"{setup.windows:,} sequences of {data.seq_len} to learn from, {held_out:,} held out"
    return Answer("pass", f"{parameters}, {sequences}")


def source_model(setup: Setup) -> Answer:
    """What adapt-vocab itself refuses before it begins."""
    base = load_pretrained(setup.adapt.config.models.source_model)
    adapt_checks.check(setup.adapt, base)
    return Answer(
        "pass", f"{base.folder}: {parameter_count(base.model):,} parameters, {base.model.vocab_size:,} tokens"
    )


TOKENIZER = Question("tokenizer", tokenizer, ("configuration",), "make it: anarchobot tokenizer train CONFIG")
DATASET = Question(
    "dataset",
    dataset,
    ("packages it asks for",),
    "name local files in data.dataset (and their field in data.text_field), or set data.fallback: builtin",
)
CORPUS = Question("corpus", corpus, ("configuration",), "set corpus.domain or corpus.text_field right")
ROWS = Question("dataset", rows, ("packages it asks for",), "set data.dataset right: docs/tuning.md")
SHARDS = Question("shards", shards, ("configuration", "required fields"), "anarchobot pretokenize CONFIG")
MODEL_AND_DATA = Question(
    "model and data",
    model_and_data,
    ("shards", "tokenizer"),
    "mend what is named, or make the shards anew: anarchobot pretokenize CONFIG --restart",
)
SOURCE_MODEL = Question(
    "source model", source_model, ("configuration",), "set models.source_model, or what is named, right"
)
