"""Checks of text, tokenizer and shards, and of whether they match each other and the model."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from anarchobot.config.schema import DataConfig
from anarchobot.config.validation import untrained_distances
from anarchobot.config.wording import count
from anarchobot.data.batches import TrainBatches
from anarchobot.data.conversations.reading import (
    RowCounts,
    read_conversations,
    read_labeled,
    read_pairs,
    read_questions,
)
from anarchobot.data.shards import TokenStream, verify
from anarchobot.data.sources.documents import DocumentCounts, open_source
from anarchobot.data.windows import StreamWindows, open_windows
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.model.parameters import parameter_count
from anarchobot.optim.schedule import sequences_per_step
from anarchobot.preflight.check import Context, Outcome, check
from anarchobot.tasks.adaptation import checks as adapt_checks
from anarchobot.tasks.distillation import describe_teacher, open_teacher
from anarchobot.tasks.pretrain import check_tokenizers, initial_weights
from anarchobot.tokenizers.conversation import PreferencePair
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.training.rewards import Rewards, without_function

SAMPLE = 100  # documents or rows that are read
SHOWN, SHOWN_CHARS = 2, 60  # of those, how many are shown, and how many characters of each


@check("tokenizer", ("configuration",), "train it: anarchobot tokenizer train CONFIG")
def tokenizer(context: Context) -> Outcome:
    loaded = context.loaded
    path, size = loaded.config.train.tokenizer_path, loaded.config.model.vocab_size
    if path is None:
        return "pass", "train.tokenizer_path is not set: using the shards' tokenizer"
    actual = load_tokenizer(path).vocab_size
    if actual != size:
        return (
            "fail",
            f"{loaded.where('model.vocab_size')}: {size}, but {path} has {actual} tokens",
            f"set model.vocab_size: {actual}",
        )
    return "pass", f"{path}: {actual:,} tokens"


@check(
    "dataset",
    ("optional packages",),
    "name local files in data.dataset (and their field in data.text_field), or set data.fallback: builtin",
)
def dataset(context: Context) -> Outcome:
    return _documents(context.loaded.config.data, context.loaded.config.train.seed)


@check("corpus", ("configuration",), "correct corpus.domain or corpus.text_field")
def corpus(context: Context) -> Outcome:
    """adapt-vocab's domain text."""
    corpus = context.adapt.config.corpus
    return _documents(DataConfig(dataset=corpus.domain, text_field=corpus.text_field, documents=corpus.documents), 0)


def _documents(data: DataConfig, seed: int) -> Outcome:
    """Reads the first documents like pretokenize, without downloading more of a Hugging Face dataset than that."""
    if data.dataset is None:
        return "pass", "data.dataset is not set: using the existing shards"
    warnings: list[str] = []
    counts = DocumentCounts()
    name, documents = open_source(
        data.model_copy(update={"shuffle_buffer": 0, "streaming": True}), seed, counts, warn=warnings.append
    )
    first = [document.text for document in islice(documents, SAMPLE)]
    if not first:
        return (
            "fail",
            f"{name}: no usable document ({counts.summary()})",
            "use other text in data.dataset, or check data.min_chars and data.text_field",
        )
    if warnings:
        return "warn", warnings[0], "name local files in data.dataset, or fix the network"
    if counts.broken:
        return (
            "warn",
            f"{name}: {counts.broken} of the first {counts.read} documents are broken; {counts.first_broken}",
            "fix the file in data.dataset; broken documents are skipped",
        )
    return "pass", f"{name}: {_excerpts(first)}"


def _excerpts(texts: Iterable[str]) -> str:
    return "; ".join(repr(text[:SHOWN_CHARS]) for text in islice(texts, SHOWN))


@check("dataset", ("optional packages",), "correct data.dataset: docs/tuning.md")
def conversations(context: Context) -> Outcome:
    """Reads the first conversations (sft), preference pairs or labeled answers (dpo), or questions (grpo)."""
    config, counts = context.loaded.config, RowCounts()
    data = config.data.model_copy(update={"shuffle_buffer": 0, "streaming": True})
    if config.grpo.rewards is not None:
        rewards = Rewards(without_function(config.grpo))
        questions = read_questions(data, counts, rewards.check_answer)
        first = [question.prompt[-1].content for _, question in islice(questions, SAMPLE)]
    elif context.pairs:
        items = (read_labeled if config.preference.loss == "kto" else read_pairs)(data, counts, config.chat.language)
        first = [
            (item.chosen if isinstance(item, PreferencePair) else item.conversation[-1]).content
            for _, item in islice(items, SAMPLE)
        ]
    else:
        conversations = read_conversations(data, counts, config.chat.format, config.chat.language)
        first = [conversation[-1].content for _, conversation in islice(conversations, SAMPLE)]
    if not first:
        return "fail", f"no usable row; {'; '.join(counts.summary())}", "fix data.dataset: docs/tuning.md"
    return "pass", f"{counts.kept} of the first {counts.read} rows are usable; they end with: {_excerpts(first)}"


@check("shards", ("configuration", "required fields"), "anarchobot pretokenize CONFIG")
def shards(context: Context) -> Outcome:
    folders, files = context.loaded.config.data.shard_dirs, 0
    for folder in folders:
        for file, problem in verify(folder):
            files += 1
            if problem:
                return (
                    "fail",
                    f"{Path(folder) / file}: {problem.partition(': pretokenize')[0]}",
                    f"anarchobot pretokenize {context.name} --restart",
                )
    context.streams = [TokenStream(folder, "train") for folder in folders]
    validation = sum(stream.manifest.tokens("val") for stream in context.streams)
    training = sum(stream.tokens for stream in context.streams)
    return (
        "pass",
        f"{count(files, 'intact file')} in {', '.join(folders)}: {training:,} training tokens, {validation:,} "
        "validation tokens",
    )


@check(
    "model and data",
    ("shards", "tokenizer"),
    "fix the setting, or rebuild the shards: anarchobot pretokenize CONFIG --restart",
)
def model_and_data(context: Context) -> Outcome:
    loaded, config = context.loaded, context.loaded.config
    data, train = config.data, config.train
    context.teacher = open_teacher(loaded, check_tokenizers(loaded, context.streams))
    sets = [open_windows(stream, data.seq_len, data.pack, data.document_mask) for stream in context.streams]
    context.windows = TrainBatches(sets, train.seed, data.shard_weights).windows
    if train.init_from is not None:
        context.base = load_pretrained(train.init_from)
        initial_weights(loaded, context.base)
    validation = sum(
        StreamWindows(TokenStream(s.folder, "val"), data.seq_len, data.document_mask).count for s in context.streams
    )
    if validation == 0:
        return (
            "warn",
            "the validation split has no sequence: no validation, no best checkpoint",
            f"raise data.val_fraction or add text, then anarchobot pretokenize {context.name} --restart",
        )
    if text := untrained_distances(config):
        problem, _, remedy = text.partition("; ")
        return "warn", problem, remedy
    per_step = sequences_per_step(train)
    if per_step > context.windows:
        return (
            "warn",
            f"a step takes {per_step:,} sequences, but there are only {context.windows:,}: some repeat within a step",
            "lower train.micro_batch_size or train.grad_accum_steps, or add text",
        )
    return (
        "pass",
        f"{parameter_count(config.model):,} parameters; sequences of {data.seq_len}: {context.windows:,} for training, "
        f"{validation:,} for validation{describe_teacher(loaded, context.teacher)}",
    )


@check("source model", ("configuration",), "correct models.source_model or the setting named")
def source_model(context: Context) -> Outcome:
    """Runs the checks of adapt-vocab."""
    base = load_pretrained(context.adapt.config.models.source_model)
    adapt_checks.check(context.adapt, base)
    return "pass", f"{base.name}: {parameter_count(base.model):,} parameters, {base.model.vocab_size:,} tokens"
