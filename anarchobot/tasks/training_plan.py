"""Decides what `train` does: reads the text, measures this machine, and writes the settings of the run as sections of a
configuration."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig, load_config
from anarchobot.config.schema import Config, DataConfig
from anarchobot.data.document_batches import batch_documents, key_words
from anarchobot.data.sources.documents import Document, DocumentCounts, from_files
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
GPU_BATCH, SEQUENCE = 4096, 256  # tokens per step that keep a GPU busy, and each core of a CPU


@dataclass(frozen=True)
class TextSurvey:
    """`documents`: what counts as a document in text files (data.documents). Bytes are of UTF-8."""

    train_bytes: int
    val_bytes: int
    number: int
    val_fraction: float
    documents: str
    prompt: str  # the first words
    counts: DocumentCounts

    def __str__(self) -> str:
        unit = {"file": "document", "paragraphs": "paragraph"}[self.documents] + ("" if self.number == 1 else "s")
        text = f"{size(self.train_bytes)} in {self.number:,} {unit}"
        if not self.val_bytes:
            return f"{text}; no validation: a single document can't be divided"
        held_out = f"{size(self.val_bytes)} held out for validation"
        if self.documents == "paragraphs":
            held_out += " (each paragraph is a document, because no file could be held out)"
        return f"{text}; {held_out}"


@dataclass(frozen=True)
class Plan:
    """`sections` are the configuration; `table` describes it in rows of name and value."""

    sections: Sections
    table: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)


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
    counts, prompt = DocumentCounts(), ""
    config = DataConfig.model_validate({"documents": documents, "clean": True})

    def read() -> Iterator[Document]:
        nonlocal prompt
        for document in from_files(names, config, counts):
            prompt = prompt or " ".join(document.text[:1000].split()[:3])
            yield document

    train_bytes = val_bytes = number = 0
    whole: list[tuple[int, int]] = []
    for batch in batch_documents(read(), counts, True, fraction):
        held = int(batch.sizes[batch.is_val].sum())
        train_bytes, val_bytes = train_bytes + int(batch.sizes.sum()) - held, val_bytes + held
        number += len(batch) - int(batch.is_tail.sum())
        if not batch.is_tail.any():
            whole += zip(key_words(batch.keys)[:, 0].tolist(), batch.sizes.tolist(), strict=True)
    return _Split(TextSurvey(train_bytes, val_bytes, number, fraction, documents, prompt, counts), whole)


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
        ("machine", f"{'GPU' if on_gpu else 'CPU'}, {flops / 1e9:,.3g} GFLOP/s in training steps of this model"),
        ("vocabulary", f"{settings.vocab_size:,} tokens"),
        (
            "model",
            f"{settings.parameters / 1e6:,.1f} million parameters: {settings.layers} layers of width {settings.width}",
        ),
        (
            "step",
            f"{settings.sequences} sequences of {settings.seq_len} tokens; learning rate {settings.lr:g}, weight decay "
            f"{settings.weight_decay:g}, dropout {settings.dropout:g}",
        ),
        ("run", f"about {settings.steps:,} steps, {settings.tokens:,} tokens, {settings.epochs:.1f} epochs"),
        ("time", f"{duration(settings.seconds)} of training in {duration(seconds)}"),
    ]
    notes = []
    if settings.seconds < 0.8 * left:
        notes.append(
            f"more than {settings.epochs:.0f} epochs of this text would not help: training takes "
            f"{duration(settings.seconds)} of the {duration(left)} left"
        )
    return Plan(sections, table, [*notes, *survey.counts.details()])


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
        ("run", f"about {steps:,} steps, {ADAPTER_EPOCHS * steps / most:.1f} epochs"),
        ("time", f"{duration(steps * step)} of training in {duration(seconds)}"),
    ]
    return Plan(_with_files(settings, survey, names, folder, base), table, survey.counts.details())


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
