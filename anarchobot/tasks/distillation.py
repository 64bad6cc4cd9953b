"""The teacher of a run: its checks, and its predictions for the training sequences, cached before training."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.config.wording import count
from anarchobot.data.batches import TrainBatches
from anarchobot.data.teacher_cache import TeacherCache, TeacherWindows, record_bytes
from anarchobot.data.windows import IGNORE, Batch, ConcatWindows, Ints, Windows
from anarchobot.exchange.pretrained import PretrainedModel, load_pretrained
from anarchobot.model.parameters import parameter_count
from anarchobot.optim.schedule import sequences_per_step
from anarchobot.runs.checkpoint import Checkpoint
from anarchobot.runs.progress import Progress
from anarchobot.storage.durable import write_atomic
from anarchobot.storage.free_space import require_space
from anarchobot.storage.lock import FolderLock
from anarchobot.tasks.resume import resumed_steps
from anarchobot.tasks.run import OutputMode
from anarchobot.tokenizers.tokenizer import Tokenizer, digest
from anarchobot.training.display import count_bar, duration
from anarchobot.training.loop import Run
from anarchobot.training.ranks import detect_launcher

if TYPE_CHECKING:  # it imports MLX
    from anarchobot.training.distillation_engine import Teacher

DESCRIPTION = "teacher.json"
SAVE_SECONDS = 60.0  # between saves of the checksums, which make windows valid


def open_teacher(loaded: LoadedConfig, tokenizer: Tokenizer) -> PretrainedModel | None:
    """The model in train.teacher, if set. Raises UserError if it can't teach a model with this tokenizer."""
    config, where = loaded.config, loaded.where("train.teacher")
    if config.train.teacher is None:
        return None
    if detect_launcher() is not None:
        raise UserError(f"{where}: a run with a teacher is a single process: start it without launch, or remove it")
    teacher = load_pretrained(config.train.teacher)
    if digest(teacher.tokenizer) != digest(tokenizer):
        raise UserError(
            f"{where}: the tokenizer of {teacher.name} is not that of the model ({tokenizer.files[0]}): choose a "
            "teacher with the same tokenizer"
        )
    if teacher.model.max_seq_len < config.data.seq_len:
        raise UserError(
            f"{loaded.where('data.seq_len')}: {config.data.seq_len}, but {teacher.name} (train.teacher) reads at most "
            f"{teacher.model.max_seq_len} tokens: lower it"
        )
    if teacher.model.architecture == "mlx_lm" and config.data.document_mask:
        raise UserError(
            f"{loaded.where('data.document_mask')}: mlx-lm computes {teacher.name} (train.teacher), without a mask of "
            "documents: set it to false"
        )
    return teacher


def describe_teacher(loaded: LoadedConfig, teacher: PretrainedModel | None) -> str:
    """For `verify`, after other findings."""
    if teacher is None:
        return ""
    per_token = record_bytes(loaded.config.distillation.top_k, loaded.config.model.vocab_size)
    return (
        f"; teacher {teacher.name}: {parameter_count(teacher.model):,} parameters, {per_token:,} bytes per token "
        "cached; memory and time for computing its predictions are not estimated"
    )


class Distillation:
    """The sets of training windows, `sets`, with the teacher's predictions if there is a teacher. `data` identifies
    the windows; `identity` is for Run.identity."""

    def __init__(
        self, loaded: LoadedConfig, teacher: PretrainedModel | None, sets: Sequence[Windows], data: list[Any]
    ) -> None:
        self.sets, self.identity = sets, dict[str, Any]()
        self._settings, self._config, self._teacher = loaded.config.distillation, loaded.config, teacher
        self._data, self._windows = data, ConcatWindows(sets)
        if teacher is not None:
            starts = np.cumsum([0, *(s.count for s in sets)]).tolist()
            self.sets = [TeacherWindows(s, start) for s, start in zip(sets, starts, strict=False)]
            self.identity = {"teacher": teacher.digest}

    def prepare(
        self, run: Run, saved: Checkpoint | None, batches: TrainBatches, precision: str, show: OutputMode
    ) -> None:
        """Before training: computes the predictions for the windows that the rest of the run reads, unless they are
        cached. Raises UserError, OSError if they do not fit on the disk, and BlockingIOError if another process
        writes to the same cache."""
        if self._teacher is None:
            return
        settings, vocab_size = self._settings, self._config.model.vocab_size
        key = {
            "teacher": self._teacher.digest,
            "precision": precision,
            "data": self._data,
            "vocab_size": vocab_size,
            "top_k": settings.top_k,
            "temperature": settings.temperature,
        }
        text = json.dumps(key, indent=1) + "\n"
        parent = Path(settings.cache_dir or run.folder / "teacher")
        folder = parent / hashlib.sha256(text.encode()).hexdigest()[:16]
        needed = batches.drawn(*_positions(run, saved))
        with FolderLock(folder):
            write_atomic(folder / DESCRIPTION, text)
            cache = TeacherCache(folder, self._windows, settings.top_k, vocab_size)
            missing = cache.missing(needed)
            if missing.size:
                require_space(folder, cache.size(missing))
                self._compute(cache, missing, folder, precision, quiet=show not in ("progress", "brief"))
        for windows in self.sets:
            assert isinstance(windows, TeacherWindows)
            windows.cache = cache

    def _compute(self, cache: TeacherCache, missing: Ints, folder: Path, precision: str, quiet: bool) -> None:
        from anarchobot.training.device import without_memory_limit
        from anarchobot.training.distillation_engine import Teacher

        assert self._teacher is not None
        name = self._teacher.name

        def log(text: str) -> None:
            if not quiet:
                print(text, file=sys.stderr, flush=True)

        def announce(seconds: float) -> None:
            log(
                f"computing the predictions of {name} for {count(missing.size, 'training sequence')}: "
                f"{cache.size(missing) / 1e6:,.1f} MB in {folder}, about {duration(seconds)}"
            )

        with without_memory_limit(self._config), count_bar("teacher", missing.size, quiet=quiet) as done:
            teacher = Teacher(self._teacher.weights, self._teacher.model, self._config, precision)
            batch_size = self._config.train.micro_batch_size
            fill_cache(cache, teacher, self._windows, missing, batch_size, log, announce, done)


def fill_cache(
    cache: TeacherCache,
    teacher: "Teacher",
    windows: Windows,
    missing: Ints,
    batch_size: int,
    log: Callable[[str], object] = lambda text: None,
    announce: Callable[[float], object] = lambda seconds: None,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Computes and saves the teacher's predictions for the windows `missing`, in batches of `batch_size`, or fewer if
    memory runs out. `announce` receives the expected seconds after the first batch, `progress` the number of windows of
    each batch. Raises UserError if not even one window fits into memory."""
    first, began = 0, time.monotonic()
    saved = began
    while first < missing.size:
        part = missing[first : first + batch_size]
        try:
            ids, log_probs = teacher.top_log_probs(_padded(windows, part, batch_size))
        except MemoryError:
            if batch_size == 1:
                raise UserError(
                    "out of memory computing the teacher's predictions for one sequence: lower data.seq_len or use a "
                    "smaller train.teacher"
                ) from None
            batch_size = -(-batch_size // 2)
            log(f"out of memory: continuing with batches of {count(batch_size, 'sequence')}")
            continue
        cache.write(part, ids, log_probs)
        if first == 0:
            announce((time.monotonic() - began) * missing.size / part.size)
        first += part.size
        progress(part.size)
        if time.monotonic() - saved >= SAVE_SECONDS:
            cache.save()
            saved = time.monotonic()
    cache.save()


def _padded(windows: Windows, part: Ints, batch_size: int) -> Batch:
    """The windows in a batch of `batch_size`: products of another shape may be rounded differently."""
    batch = windows.rows(np.resize(part, batch_size))
    batch.targets[part.size :] = IGNORE
    return batch


def _positions(run: Run, saved: Checkpoint | None) -> tuple[int, int]:
    """The first position of the data order that the rest of the run reads, and the end."""
    train, progress, steps = run.config.train, Progress(position=run.config.train.first_sequence), run.steps
    if saved is not None:
        progress = Progress.from_state(saved.state)
        steps = resumed_steps(run, saved, progress)
    return progress.position, progress.position + max(0, steps - progress.step) * sequences_per_step(train)
