"""Decides what `train` does: reads the text, measures this machine, and writes the settings of the run as sections of a
configuration."""

import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig, load_config
from anarchobot.config.schema import Config, DataConfig
from anarchobot.config.wording import count
from anarchobot.data.document_batches import DocumentBatch, batch_documents, key_words
from anarchobot.data.sources import files
from anarchobot.data.sources.documents import DocumentCounts, from_files
from anarchobot.exchange.pretrained import PretrainedModel, load_pretrained
from anarchobot.numerics.cores import available_cores
from anarchobot.system.memory import expected_device
from anarchobot.system.micro_batch import resolve_micro_batch
from anarchobot.tasks.calibration import step_seconds
from anarchobot.tasks.pretrain import initial_weights
from anarchobot.tasks.supervise import CPU_RATE, GPU_RATE
from anarchobot.tasks.training_rule import MEASURED_SHAPES, Speed, bytes_per_token, choose_settings, settings_for_shape
from anarchobot.training.display import duration

Sections = dict[str, dict[str, Any]]

MIN_TEXT = 10_000  # bytes
MIN_STEPS, MIN_ADAPTER_STEPS = 50, 10
MEASURE_SECONDS = 4.0  # per measurement
FIRST_PART = 0.15  # of the steps, at a constant learning rate, before the number of steps is final
VALIDATIONS = 10
MIN_HELD_OUT, MAX_HELD_OUT = 0.02, 0.25  # fractions of the text
HELD_OUT_BYTES = 20_000  # enough to compare the steps of a run
ADAPTER_EPOCHS = 3
PROMPT_WORDS, PROMPT_CHARS = 3, 30  # of samples; the words of some languages have no spaces between them
PASSAGE, SENTENCE = 120, 40  # characters: shorter ones are headings or fragments
SEARCHED = 200_000  # characters, for a prompt
GPU_BATCH, SEQUENCE = 4096, 256  # tokens per step that keep a GPU busy, and each core of a CPU


@dataclass(frozen=True)
class TextSurvey:
    """`documents`: what counts as a document in text files (data.documents). Bytes are of UTF-8."""

    train_bytes: int
    val_bytes: int
    number: int
    val_fraction: float
    documents: str
    prompt: str  # the first words of a paragraph, held out if there are any
    counts: DocumentCounts

    def __str__(self) -> str:
        unit = {"file": "document", "paragraphs": "paragraph"}[self.documents]
        text = f"{size(self.train_bytes)} in {count(self.number, unit)}"
        if not self.val_bytes:
            return f"{text}; no validation: a single document can't be divided"
        held_out = f"{size(self.val_bytes)} held out for validation"
        if self.documents == "paragraphs":
            held_out += " (each paragraph is a document, because no file could be held out)"
        return f"{text}; {held_out}"


@dataclass(frozen=True)
class Plan:
    """`sections` are the configuration; `table` describes it in rows of name and value. `step_seconds`: what a training
    step is expected to take, or None; `not_read`: those of the notes that name files left out."""

    sections: Sections
    table: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)
    step_seconds: float | None = None
    not_read: list[str] = field(default_factory=list)


@dataclass
class _Split:
    survey: TextSurvey
    documents: list[tuple[int, int]]  # hash and bytes of each document that is not divided

    @property
    def is_usable(self) -> bool:
        total = self.survey.train_bytes + self.survey.val_bytes
        return 0 < self.survey.val_bytes <= MAX_HELD_OUT * total

    def fraction_for(self, wanted: float) -> float:
        """The val_fraction with which the documents of the lowest hashes hold about this fraction of the bytes."""
        total, held = self.survey.train_bytes + self.survey.val_bytes, 0
        for word, number in sorted(self.documents):
            held += number
            if held >= wanted * total:
                return (word + 2**12) / 2**64  # above the word after rounding to a float
        return wanted


def survey_texts(names: list[str]) -> TextSurvey:
    """Reads all documents and chooses the validation split. Raises UserError if there is too little text."""
    for documents in ("file", "paragraphs"):
        split = _read(names, documents, MIN_HELD_OUT)
        total = split.survey.train_bytes + split.survey.val_bytes
        if total < MIN_TEXT:
            raise UserError(
                f"{', '.join(names)}: {size(total)} of text is too little to train on: expected at least "
                f"{size(MIN_TEXT)} ({split.survey.counts.summary()})"
            )
        wanted = min(5 * MIN_HELD_OUT, max(MIN_HELD_OUT, HELD_OUT_BYTES / total))
        for fraction in (wanted, split.fraction_for(wanted)):
            found = _read(names, documents, fraction)
            if found.is_usable:
                return found.survey
    return _read(names, "file", 0.0).survey


def _read(names: list[str], documents: str, fraction: float) -> _Split:
    counts, config = DocumentCounts(), DataConfig.model_validate({"documents": documents, "clean": True})
    train_bytes = val_bytes = number = 0
    whole: list[tuple[int, int]] = []
    prompts = ["", ""]  # of training and held-out text
    for batch in batch_documents(from_files(names, config, counts), counts, True, fraction):
        held = int(batch.sizes[batch.is_val].sum())
        train_bytes, val_bytes = train_bytes + int(batch.sizes.sum()) - held, val_bytes + held
        number += len(batch) - int(batch.is_tail.sum())
        if not batch.is_tail.any():
            whole += zip(key_words(batch.keys)[:, 0].tolist(), batch.sizes.tolist(), strict=True)
        for is_val in (False, True):
            prompts[is_val] = prompts[is_val] or _prompt(batch.select(batch.is_val == is_val))
    survey = TextSurvey(train_bytes, val_bytes, number, fraction, documents, prompts[1] or prompts[0], counts)
    return _Split(survey, whole)


def _prompt(batch: DocumentBatch) -> str:
    """The first words of a paragraph, or of a sentence where a text has no paragraphs, in the middle of the longest
    document: titles and lists of contents are at its start. Empty for an empty batch."""
    text = max(batch.texts, key=len, default="")[:SEARCHED]
    passages = [part.strip() for part in re.split(r"\n\s*\n", text)]
    prose = [part for part in passages if len(part) >= PASSAGE and part[0].isalpha()]
    if len(prose) < 3:
        sentences = re.split(r"(?:(?<=[.!?…])[\"'”’»]?\s+|(?<=[。！？]))(?=\w)", " ".join(text.split()))
        prose = [part for part in sentences[1:-1] if len(part) >= SENTENCE and not part[0].islower()] or prose or [text]
    return " ".join(prose[len(prose) // 2].split()[:PROMPT_WORDS])[:PROMPT_CHARS]


def plan_new_model(names: list[str], folder: Path, deadline: float, seconds: float) -> Plan:
    """Plans a model of its own. `deadline`: when training has to end, by time.monotonic(); `seconds`: the time that
    was given."""
    survey = survey_texts(names)
    on_gpu = expected_device(Config().train) == "gpu"
    speed = measure_speed(on_gpu)
    left = deadline - time.monotonic() - _preparation_seconds(survey)
    settings = choose_settings(survey.train_bytes, max(1.0, left), speed)
    flops = speed.flops(settings.width)
    step = settings.flops_per_step / flops
    if left < MIN_STEPS * step:
        raise _too_short(seconds, seconds - left, MIN_STEPS, step)
    sections = _with_files(settings.sections(), survey, names, folder)
    table = [
        ("text", str(survey)),
        ("vocabulary", f"{settings.vocab_size:,} tokens"),
        (
            "model",
            f"{settings.parameters / 1e6:,.1f} million parameters: {settings.layers} layers of width {settings.width}",
        ),
        (
            "step",
            f"{count(settings.sequences, 'sequence')} of {settings.seq_len} tokens, about {1000 * step:,.0f} ms on the "
            f"{'GPU' if on_gpu else 'CPU'}; learning rate {settings.lr:g}, weight decay {settings.weight_decay:g}, "
            f"dropout {settings.dropout:g}",
        ),
        ("run", f"about {count(settings.steps, 'step')}, {settings.tokens:,} tokens, {settings.epochs:.1f} epochs"),
        ("time", f"{duration(settings.seconds)} of training in {duration(seconds)}"),
    ]
    notes = []
    if settings.seconds < 0.8 * left:
        notes.append(
            f"more than {settings.epochs:.0f} epochs of this text would not help: training takes "
            f"{duration(settings.seconds)} of the {duration(left)} left"
        )
    return _plan(sections, table, step, survey, notes)


def measure_speed(on_gpu: bool) -> Speed:
    """Measures training steps of two shapes on this machine."""
    min_batch = GPU_BATCH if on_gpu else min(GPU_BATCH, SEQUENCE * 2 ** math.ceil(math.log2(available_cores())))
    assumed = Speed(1 / (GPU_RATE if on_gpu else CPU_RATE), 0.0, min_batch)
    measured = {}
    for layers, width in MEASURED_SHAPES:
        settings = settings_for_shape(10**8, 60.0, assumed, layers, width)
        measured[width] = settings.flops_per_step / measure(load_config(None, overrides(settings.sections())), None)
    return Speed.fit(measured, min_batch)


def plan_adapters(model: str, names: list[str], folder: Path, deadline: float, seconds: float) -> Plan:
    """Plans LoRA adapters for a model, trained on documents. Raises UserError if its weights are quantized."""
    survey, base = survey_texts(names), load_pretrained(model)
    seq_len = min(512, base.model.max_seq_len)
    settings: Sections = {
        "model": base.model.model_dump(),
        "data": {"seq_len": seq_len},
        "lora": {"r": 8, "alpha": 16.0},
        "train": {
            "init_from": base.name, "total_steps": 1, "micro_batch_size": "auto", "grad_accum_steps": 8,
            "optimizer": "adamw", "lr": 2e-4, "min_lr": 0.0, "weight_decay": 0.0, "warmup_steps": 10,
            "schedule": "wsd", "decay_fraction": 0.7,
        },
    }  # fmt: skip
    loaded = load_config(None, overrides(settings))
    initial_weights(loaded, base)
    step = measure(loaded, base)
    left = deadline - time.monotonic() - _preparation_seconds(survey)
    if left < MIN_ADAPTER_STEPS * step:
        raise _too_short(seconds, seconds - left, MIN_ADAPTER_STEPS, step)
    sequence_bytes = seq_len * bytes_per_token(base.model.vocab_size)
    most = math.ceil(ADAPTER_EPOCHS * survey.train_bytes / (8 * sequence_bytes))
    steps = max(1, min(most, int(left / step)))
    settings["train"]["total_steps"] = steps
    table = [
        ("text", str(survey)),
        ("model", f"{base.name}, adapters of rank 8"),
        ("step", f"8 sequences of {seq_len} tokens, {step:.3g} s; learning rate 0.0002"),
        ("run", f"about {count(steps, 'step')}, {ADAPTER_EPOCHS * steps / most:.1f} epochs"),
        ("time", f"{duration(steps * step)} of training in {duration(seconds)}"),
    ]
    return _plan(_with_files(settings, survey, names, folder, base), table, step, survey, [])


def _plan(sections: Sections, table: list[tuple[str, str]], step: float, survey: TextSurvey, notes: list[str]) -> Plan:
    counts = survey.counts
    return Plan(sections, table, [*notes, *counts.details()], step, files.describe_unread(counts.unread))


def measure(loaded: LoadedConfig, base: PretrainedModel | None) -> float:
    """Seconds per training step on this machine, with random tokens."""
    config = resolve_micro_batch(loaded).loaded.config
    rate = GPU_RATE if expected_device(config.train) == "gpu" else CPU_RATE
    return step_seconds(config, base, config.train.micro_batch_size, rate, MEASURE_SECONDS)[0]


def _with_files(
    settings: Sections, survey: TextSurvey, names: list[str], folder: Path, base: PretrainedModel | None = None
) -> Sections:
    """Adds what does not depend on the model: files, validation, checkpoints and samples."""
    steps, shards = settings["train"]["total_steps"], folder / "shards"
    tokenizer = shards / "tokenizer.model" if base is None else base.tokenizer.files[0]
    data = {
        "dataset": names,
        "documents": survey.documents,
        "clean": True,
        "val_fraction": survey.val_fraction,
        "shard_dir": str(shards),
    }
    train = {
        "log_interval": max(1, min(25, steps // 40)),
        "eval_interval": max(1, steps // VALIDATIONS),
        "eval_batches": max(4, steps // 100),
        "ckpt_minutes": 5.0,
        "ckpt_interval": 10**6,
        "ckpt_keep": 1,
        "tokenizer_path": str(tokenizer),
        "save_dir": str(folder),
    }
    return {
        **settings,
        "data": settings["data"] | data,
        "train": settings["train"] | train,
        "generation": {"prompt": survey.prompt},
    }


def _preparation_seconds(survey: TextSurvey) -> float:
    """A guess of the time for tokenizer and shards. The number of steps becomes final after they exist."""
    return 2 + 2e-6 * survey.train_bytes


def _too_short(seconds: float, preparation: float, steps: int, step: float) -> UserError:
    """`preparation`: seconds for everything but training; `step`: seconds of a training step."""
    needed = math.ceil((preparation + steps * step) / 30 * 1.2) * 30
    return UserError(
        f"--time {seconds:.0f}s: too short: preparation takes {preparation:.0f} s and {steps} training steps "
        f"{steps * step:.0f} s on this machine: give at least --time {needed}s"
    )


def overrides(sections: Sections) -> list[str | tuple[str, Any]]:
    """For `load_config`."""
    return [(f"{section}.{key}", value) for section, values in sections.items() for key, value in values.items()]


def size(number: int) -> str:
    """`1.2 MB`, `340.0 kB`."""
    return f"{number / 1e6:,.1f} MB" if number >= 1e6 else f"{number / 1e3:,.1f} kB"
