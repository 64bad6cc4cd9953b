"""Preference tuning on pairs of answers, with the losses of model/preference.py."""

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.data.batches import Prefetcher, TrainBatches, ValBatches
from anarchobot.data.conversations.preference_pairs import PairDataset, tokenize_pairs
from anarchobot.data.conversations.reading import RowCounts, read_pairs
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.optim.schedule import total_steps
from anarchobot.storage.durable import read_checksummed, write_checksummed
from anarchobot.system.micro_batch import resolve_micro_batch
from anarchobot.tasks.engines import open_preference_engine
from anarchobot.tasks.finetuning import check_settings, finetune, generate_reply, resume_identity
from anarchobot.tasks.resume import find_start, validation_sequences
from anarchobot.tasks.run import OutputMode
from anarchobot.tasks.technique import resolve_technique
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import load_template
from anarchobot.tokenizers.conversation import Message
from anarchobot.training.display import count_bar
from anarchobot.training.loop import Run
from anarchobot.training.ranks import detect_launcher

if TYPE_CHECKING:  # it imports MLX
    from anarchobot.training.preference_engine import PreferenceEngine

REF_FILE = "reference.json"
SAVE_SECONDS = 60.0  # between saves of reference log-probabilities

LogProbs = npt.NDArray[np.float32]


def dpo(loaded: LoadedConfig, *, show: OutputMode = "progress") -> dict[str, Any]:
    """Fine-tunes the model in train.init_from on pairs; otherwise like `sft`. train.micro_batch_size counts pairs.

    The reference model is the initial model. Its log-probabilities of all answers are computed once, before training,
    and cached in the run folder, so only one model is ever in memory.
    """
    if detect_launcher() is not None:
        raise UserError("dpo does not support multiple ranks: start it without mlx.launch or mpirun")
    check_settings(loaded, "dpo")
    loaded, notes = resolve_micro_batch(loaded, pairs=True)
    config = loaded.config
    data, chat, train = config.data, config.chat, config.train
    base, start = load_pretrained(str(train.init_from)), find_start(loaded)
    config, technique_messages = resolve_technique(config, "dpo", start.checkpoint)
    val_sequences = validation_sequences(config, start.checkpoint)
    encoder, counts = ChatEncoder(base.tokenizer, load_template(base.tokenizer, chat.template), "answer"), RowCounts()
    splits = tokenize_pairs(
        read_pairs(data, counts, chat.language),
        encoder,
        counts,
        seq_len=data.seq_len,
        too_long=chat.too_long,
        val_fraction=data.val_fraction,
    )
    train_pairs, val_pairs = splits
    handle, engine = open_preference_engine(config, base.weights)
    run = Run(
        config=config,
        steps=total_steps(train, 2 * data.seq_len, train_pairs.count),  # a pair is two sequences
        identity=resume_identity([split.digest() for split in splits], base, handle, val_sequences),
        train=Prefetcher(TrainBatches([train_pairs], train.seed)),
        val=ValBatches(val_pairs, train.micro_batch_size, val_sequences),
        bytes_per_token=None,
        folder=start.folder,
        sample=lambda: generate_reply(handle, encoder, (Message("user", config.generation.prompt),), config),
        val_metrics=engine.eval_metrics,
    )

    def set_ref_log_probs(folder: Path) -> None:
        if not config.preference.needs_reference:
            return

        def log(text: str) -> None:
            if show == "progress":
                print(text, file=sys.stderr, flush=True)

        model_key = f"{base.digest} {handle.precision} {config.lora}"
        with count_bar("reference", sum(split.count for split in splits), quiet=show != "progress") as done:
            values = compute_ref_log_probs(engine, splits, folder, model_key, train.micro_batch_size, log, done)
        for split, log_probs in zip(splits, values, strict=True):
            split.ref_log_probs = log_probs

    notes = [
        *notes,
        *technique_messages,
        *counts.summary(),
        f"{train_pairs.count:,} training pairs, {val_pairs.count:,} held out; {_mean_lengths(train_pairs)}",
    ]
    return finetune(
        run, start, handle, base, encoder, notes=notes, unit="pairs", before_training=set_ref_log_probs, show=show
    )


def _mean_lengths(pairs: PairDataset) -> str:
    """Shown because a preference for long answers is learned as readily as any other."""
    rows = pairs.rows(np.arange(min(pairs.count, 1000)))
    chosen, rejected = np.count_nonzero(rows.targets >= 0, axis=2).mean(axis=0)
    return f"mean answer length: chosen {chosen:.0f} tokens, rejected {rejected:.0f}"


def compute_ref_log_probs(
    engine: "PreferenceEngine",
    splits: Sequence[PairDataset],
    folder: Path,
    model_key: str,
    batch_size: int,
    log: Callable[[str], object] = lambda text: None,
    progress: Callable[[int], object] = lambda pairs: None,
) -> list[LogProbs]:
    """float32 [pairs, 2] for each split, under the engine's current weights, which must be the initial weights.

    Values cached in `folder`, which must be locked, are reused if the pairs and `model_key` match. The rest are
    computed in batches of `batch_size` pairs, or fewer if memory runs out, and saved there. `progress` receives the
    number of pairs of each batch. Raises UserError if not even one pair fits into memory.
    """
    key = hashlib.sha256(" ".join([model_key, *(split.digest() for split in splits)]).encode()).hexdigest()
    file, total = folder / REF_FILE, sum(split.count for split in splits)
    values = _read_log_probs(file, key) or [np.zeros((0, 2), np.float32) for _ in splits]
    if (done := sum(map(len, values))) == total:
        return values
    log(f"computing reference log-probabilities of {total - done:,} pairs")
    progress(done)
    saved = time.monotonic()
    for i, split in enumerate(splits):
        while (first := len(values[i])) < split.count:
            try:
                batch = split.rows(np.arange(first, first + batch_size)).micro_batches(1, batch_size)  # may be padded
                log_probs = engine.log_probs(batch)[0]
            except MemoryError as error:
                if batch_size == 1:
                    raise UserError(
                        "out of memory computing reference log-probabilities of one pair: lower data.seq_len or use a "
                        "smaller model"
                    ) from error
                batch_size = -(-batch_size // 2)
                log(f"out of memory: continuing with batches of {batch_size} pairs")
                continue
            values[i] = np.concatenate([values[i], log_probs])[: split.count]
            progress(len(values[i]) - first)
            if time.monotonic() - saved >= SAVE_SECONDS:
                _write_log_probs(file, key, values)
                log(f"{sum(map(len, values)):,} of {total:,} pairs")
                saved = time.monotonic()
    _write_log_probs(file, key, values)
    return values


def _write_log_probs(file: Path, key: str, values: list[LogProbs]) -> None:
    write_checksummed(file, {"of": key, "log_probs": [log_probs.tolist() for log_probs in values]})


def _read_log_probs(file: Path, key: str) -> list[LogProbs] | None:
    """The first log-probabilities of each split; None if the file is missing, damaged or has another key."""
    try:
        cached = read_checksummed(file)
        if cached["of"] != key:
            return None
        return [np.array(log_probs, np.float32).reshape(-1, 2) for log_probs in cached["log_probs"]]
    except (OSError, ValueError, KeyError):
        return None
