"""Preference tuning on pairs of answers, with the losses of model/preference.py."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.config.schema import Config, PreferenceConfig
from anarchobot.data.batches import Prefetcher, TrainBatches, ValBatches
from anarchobot.data.conversations.labeled_answers import LabeledDataset, tokenize_labeled
from anarchobot.data.conversations.preference_pairs import PairDataset, tokenize_pairs
from anarchobot.data.conversations.reading import RowCounts, read_labeled, read_pairs
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.optim.schedule import total_steps
from anarchobot.storage.durable import read_checksummed, write_checksummed
from anarchobot.system.micro_batch import resolve_micro_batch
from anarchobot.tasks.engines import open_preference_engine, open_ranks
from anarchobot.tasks.finetuning import check_settings, finetune, generate_reply, resume_identity
from anarchobot.tasks.resume import find_start, validation_sequences
from anarchobot.tasks.run import OutputMode
from anarchobot.tasks.technique import resolve_technique
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import load_template
from anarchobot.tokenizers.conversation import Message
from anarchobot.training.display import count_bar
from anarchobot.training.loop import Run
from anarchobot.training.ranks import SINGLE_PROCESS, Ranks, detect_launcher

if TYPE_CHECKING:  # it imports MLX
    from anarchobot.training.preference_engine import PreferenceEngine

REF_FILE = "reference.json"
SAVE_SECONDS = 60.0  # between saves of reference log-probabilities
# The largest recommended ratio of the weights of all desirable to those of all undesirable answers; the smallest is 1
# (Ethayarajh et al., 2024).
KTO_RATIO = 4 / 3

LogProbs = npt.NDArray[np.float32]


def dpo(loaded: LoadedConfig, *, show: OutputMode = "progress") -> dict[str, Any]:
    """Fine-tunes the model in train.init_from on pairs or, for KTO, labeled answers; otherwise like `sft`.
    train.micro_batch_size counts these.

    The reference model is the initial model. Its log-probabilities of all answers are computed once, before training,
    and cached in the run folder, so only one model is ever in memory.
    """
    check_settings(loaded, "dpo")
    loaded, fit_messages = resolve_micro_batch(loaded, pairs=True, several_ranks=detect_launcher() is not None)
    config = loaded.config
    chat, train = config.chat, config.train
    ranks = open_ranks(config)
    base, start = load_pretrained(str(train.init_from)), find_start(loaded, ranks)
    config, technique_messages = resolve_technique(config, "dpo", start.checkpoint, ranks)
    val_sequences = validation_sequences(config, start.checkpoint, ranks)
    encoder, counts = ChatEncoder(base.tokenizer, load_template(base.tokenizer, chat.template), "answer"), RowCounts()
    splits = _tokenize(config, encoder, counts)
    train_set, val_set = splits
    handle, engine = open_preference_engine(config, base.weights, ranks)
    run = Run(
        config=config,
        steps=total_steps(train, 2 * config.data.seq_len, train_set.count, ranks.size),  # two sequences each
        identity=resume_identity([split.digest() for split in splits], base, handle, val_sequences),
        train=Prefetcher(TrainBatches([train_set], train.seed), ranks.rank, ranks.size),
        val=ValBatches(val_set, train.micro_batch_size, val_sequences),
        bytes_per_token=None,
        folder=start.folder,
        sample=lambda: generate_reply(handle, encoder, (Message("user", config.generation.prompt),), config),
        val_metrics=engine.eval_metrics,
        ranks=ranks,
    )

    def set_ref_log_probs(folder: Path) -> None:
        if not config.preference.needs_reference:
            return
        quiet = show not in ("progress", "brief") or ranks.rank > 0

        def log(text: str) -> None:
            if not quiet:
                print(text, file=sys.stderr, flush=True)

        model_key = f"{base.digest} {handle.precision} {config.lora}"
        with count_bar("reference", sum(split.count for split in splits), quiet=quiet) as done:
            values = compute_ref_log_probs(engine, splits, folder, model_key, train.micro_batch_size, log, done, ranks)
        for split, log_probs in zip(splits, values, strict=True):
            split.ref_log_probs = log_probs

    notes = [
        *counts.summary(),
        f"{train_set.count:,} training {train_set.unit}, {val_set.count:,} held out; {train_set.describe()}",
        *_weight_notes(train_set, config.preference),
    ]
    return finetune(
        run,
        start,
        handle,
        base,
        encoder,
        details=[*fit_messages, *technique_messages],
        notes=notes,
        unit=train_set.unit,
        on_every_rank=set_ref_log_probs,
        show=show,
    )


def _tokenize(config: Config, encoder: ChatEncoder, counts: RowCounts) -> tuple[PairDataset, PairDataset]:
    """The training and the validation split."""
    data, chat = config.data, config.chat
    limits: dict[str, Any] = {
        "seq_len": data.seq_len, "too_long": chat.too_long, "val_fraction": data.val_fraction
    }  # fmt: skip
    if config.preference.loss == "kto":
        return tokenize_labeled(read_labeled(data, counts, chat.language), encoder, counts, **limits)
    return tokenize_pairs(read_pairs(data, counts, chat.language), encoder, counts, **limits)


def _weight_notes(train_set: PairDataset, settings: PreferenceConfig) -> list[str]:
    """A warning if the sums of the weights of KTO's answers are not in the ratio that its paper recommends."""
    desirable = int(train_set.labels.sum()) if isinstance(train_set, LabeledDataset) else 0
    undesirable = settings.undesirable_weight * (train_set.count - desirable)
    if not desirable or not undesirable:
        return []
    lowest = undesirable / desirable
    if lowest <= settings.desirable_weight <= KTO_RATIO * lowest:
        return []
    return [
        f"warning: the weights of desirable and undesirable answers are {settings.desirable_weight / lowest:.2f} to 1: "
        f"set preference.desirable_weight between {lowest:.3g} and {KTO_RATIO * lowest:.3g}"
    ]


def compute_ref_log_probs(
    engine: "PreferenceEngine",
    splits: Sequence[PairDataset],
    folder: Path,
    model_key: str,
    batch_size: int,
    log: Callable[[str], object] = lambda text: None,
    progress: Callable[[int], object] = lambda pairs: None,
    ranks: Ranks = SINGLE_PROCESS,
) -> list[LogProbs]:
    """float32 [pairs, 2] for each split, under the engine's current weights, which must be the initial weights.

    Values cached in `folder`, which must be locked, are reused if the pairs and `model_key` match. The rest are
    computed, longest first, in batches of `batch_size` pairs, or fewer if memory runs out, by all ranks in turn, and
    saved there by rank 0. `progress` receives the number of pairs of each batch. Raises UserError if not even one pair
    fits into memory.
    """
    key = hashlib.sha256(
        " ".join(["longest first", model_key, *(split.digest() for split in splits)]).encode()
    ).hexdigest()
    file, total, unit = folder / REF_FILE, sum(split.count for split in splits), splits[0].unit
    cached = [] if ranks.rank > 0 else _read_log_probs(file, key) or [[]] * len(splits)
    values = [
        np.array(log_probs, np.float32).reshape(-1, 2)
        for log_probs in json.loads(ranks.broadcast(json.dumps(cached).encode()))
    ]
    orders = [split.longest_first() for split in splits]
    if (done := sum(map(len, values))) == total:
        return _in_data_order(values, orders)
    log(f"computing reference log-probabilities of {total - done:,} {unit}")
    progress(done)
    saved = time.monotonic()
    for i, split in enumerate(splits):
        while (first := len(values[i])) < split.count:
            own = np.full(batch_size, split.count)  # past the end is padding
            part = orders[i][first + ranks.rank * batch_size :][:batch_size]
            own[: len(part)] = part
            try:
                log_probs = engine.log_probs(split.rows(own).micro_batches(1, batch_size))[0]
            except MemoryError:
                log_probs = None
            if ranks.any(log_probs is None):
                if batch_size == 1:
                    one = unit.removesuffix("s")
                    raise UserError(
                        f"out of memory computing reference log-probabilities of one {one}: lower data.seq_len or use "
                        "a smaller model"
                    )
                batch_size = -(-batch_size // 2)
                log(f"out of memory: continuing with batches of {batch_size} {unit}")
                continue
            assert log_probs is not None
            values[i] = np.concatenate([values[i], ranks.all_gather_rows(log_probs)])[: split.count]
            progress(len(values[i]) - first)
            if ranks.rank == 0 and time.monotonic() - saved >= SAVE_SECONDS:
                _write_log_probs(file, key, values)
                log(f"{sum(map(len, values)):,} of {total:,} {unit}")
                saved = time.monotonic()
    if ranks.rank == 0:
        _write_log_probs(file, key, values)
    return _in_data_order(values, orders)


def _in_data_order(values: Sequence[LogProbs], orders: Sequence[npt.NDArray[np.int64]]) -> list[LogProbs]:
    """Values of each split at the indices `orders`."""
    return [log_probs[np.argsort(order)] for log_probs, order in zip(values, orders, strict=True)]


def _write_log_probs(file: Path, key: str, values: list[LogProbs]) -> None:
    write_checksummed(file, {"of": key, "log_probs": [log_probs.tolist() for log_probs in values]})


def _read_log_probs(file: Path, key: str) -> list[list[list[float]]] | None:
    """The log-probabilities of the longest pairs of each split; None if the file is missing, damaged or has another
    key."""
    try:
        cached = read_checksummed(file)
        return cached["log_probs"] if cached["of"] == key else None
    except (OSError, ValueError, KeyError):
        return None
