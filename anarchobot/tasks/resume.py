"""Where a run starts: from scratch or from a checkpoint, which must belong to the same run."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.config.paths import is_same_folder
from anarchobot.config.schema import Config, GRPOConfig, PreferenceConfig
from anarchobot.exchange.adapters import same_base
from anarchobot.optim.schedule import sequences_per_step
from anarchobot.runs import checkpoint
from anarchobot.runs.progress import Progress
from anarchobot.training.engine import Engine
from anarchobot.training.loop import Run
from anarchobot.training.ranks import SINGLE_PROCESS, Ranks

# Settings that a run can't change on resume, in addition to the model's shape.
FIXED = (
    *("train.seed", "train.trainable", "train.optimizer", "train.normuon", "train.muon_split_heads"),
    *("data.seq_len", "data.pack", "data.document_mask", "data.shard_weights"),
    *("lora.r", "lora.alpha", "lora.target_modules", "lora.num_layers", "lora.dora", "lora.rslora", "lora.quantize"),
    *(f"distillation.{name}" for name in ("loss", "weight", "temperature", "top_k")),
    *(f"preference.{name}" for name in PreferenceConfig.model_fields),
    *(f"grpo.{name}" for name in GRPOConfig.model_fields),
)
# Keys of Run.identity: the setting each comes from, and its name in messages.
IDENTITY = {
    "shards": ("data.shard_dir", "shards"),
    "conversations": ("data.dataset", "conversations"),
    "base": ("train.init_from", "weights"),
    "tokenizer": ("train.init_from", "tokens"),
    "teacher": ("train.teacher", "teacher"),
}
MUTABLE_MODEL_KEYS = ("dropout", "max_seq_len", "bos_id")
# Settings of how a run is started and where its files are, which don't affect training.
UNTRACKED = (
    *("train.checkpoint_path", "train.save_dir", "train.log_path", "train.supervise", "train.init_from"),
    *("train.teacher", "distillation.cache_dir"),
)
# Settings that may differ between the machines of several ranks.
PER_MACHINE = ("data.shard_dir", "data.dataset", "train.tokenizer_path", "train.cpu_threads")


class ResumePoint(NamedTuple):
    """`steps` are the checkpoints in the run folder when the program started; without a `checkpoint` the run is new."""

    folder: Path
    steps: list[int]
    checkpoint: checkpoint.Checkpoint | None


def find_start(loaded: LoadedConfig, ranks: Ranks = SINGLE_PROCESS) -> ResumePoint:
    """Finds the checkpoint to resume from; ranks other than 0 get theirs from rank 0. Raises UserError if a given
    checkpoint does not exist, or the folder holds another run or later steps."""
    folder = Path(loaded.config.train.save_dir)
    if ranks.rank > 0:
        return ResumePoint(folder, [], None)
    steps = checkpoint.saved_steps(folder)
    return ResumePoint(folder, steps, _find_checkpoint(loaded, folder, steps))


def _find_checkpoint(loaded: LoadedConfig, folder: Path, steps: list[int]) -> checkpoint.Checkpoint | None:
    path, where = loaded.config.train.checkpoint_path, loaded.where("train.save_dir")
    if path == "auto":
        return checkpoint.find(folder) if steps else None
    if path is not None:
        saved = checkpoint.find(path)
        if steps and not is_same_folder(saved.folder.parent, folder):
            raise UserError(f"{where}: {folder} contains a different run than {path}: choose another folder")
        if steps and max(steps) > saved.step and not saved.skipped:
            raise UserError(
                f"{where}: {folder} contains later steps, up to {max(steps)}: to go back to step {saved.step}, choose "
                "another folder"
            )
        return saved
    if steps:
        raise UserError(
            f"{where}: {folder} already contains a run, at step {max(steps)}: resume it with --resume-from auto, or "
            "choose another folder with --checkpoint-dir"
        )
    return None


def validation_sequences(
    config: Config, saved: checkpoint.Checkpoint | None, ranks: Ranks = SINGLE_PROCESS
) -> int | None:
    """The number of sequences to validate on (None: all): train.eval_batches micro-batches of the size that the run
    started with, because `best` and train.patience compare all validations of a run."""
    wanted = _eval_sequences(config)
    if saved is not None:
        before = saved.config.train.eval_batches, _eval_sequences(saved.config)
        if config.train.eval_batches == before[0] or wanted == before[1]:
            wanted = saved.state.get("val_sequences", before[1])
    result: int | None = json.loads(ranks.broadcast(json.dumps(wanted).encode()))
    return result


def _eval_sequences(config: Config) -> int | None:
    batches = config.train.eval_batches
    return None if batches is None else batches * config.train.micro_batch_size


def check_same_run(saved: checkpoint.Checkpoint, config: Config, identity: Mapping[str, Any]) -> None:
    """Raises UserError if the checkpoint can't be resumed with this configuration and Run.identity."""
    if "tokens" not in saved.state or "norms" not in saved.state:
        raise UserError(
            f"{saved.folder}: holds weights but no training state (as written by `import`): to train them further, "
            f"start a new run with train.init_from={saved.folder.parent} train.save_dir=..."
        )
    for name, (key, what) in IDENTITY.items():
        if name == "tokenizer" and not (name in identity and name in saved.state):
            continue  # early versions did not record it
        if name == "teacher" and name in identity and name not in saved.state:
            raise UserError(f"{saved.folder}: this run was started without a teacher: remove {key}, or start a new run")
        if name in identity and name not in saved.state:
            raise UserError(f"{saved.folder}: this run was started by another command: start a new run elsewhere")
        before, now = saved.state.get(name), identity.get(name)
        if before != now and not (name == "base" and before and now and same_base(before, now)):
            if name == "base" and str(before).partition(":")[0] == str(now).partition(":")[0]:
                what = "model settings or tokens"
            given, original = attrgetter(key)(config), attrgetter(key)(saved.config)
            raise UserError(
                f"{saved.folder}: this run was started with different {what} from those in {given}: set {key} to the "
                f"original {what}{f' ({original})' if original != given else ''}, or start a new run"
            )
    shape = [f"model.{key}" for key in type(config.model).model_fields if key not in MUTABLE_MODEL_KEYS]
    for key, (old, new) in changed_settings(saved.config, config).items():
        if key in (*shape, *FIXED):
            raise UserError(f"{saved.folder}: {key} was {old} and is now {new}: it can't change within a run")


def check_same_on_all_ranks(run: Run) -> None:
    """Raises UserError on a rank whose settings or data differ from rank 0's."""
    local = {"config": run.config.model_dump(mode="json"), "identity": run.identity, "windows": run.train.windows}
    rank0 = json.loads(run.ranks.broadcast(json.dumps(local).encode()))
    for key, (theirs, ours) in changed_settings(Config.model_validate(rank0["config"]), run.config).items():
        if key not in PER_MACHINE:
            raise UserError(
                f"rank {run.ranks.rank}: {key} is {ours}, but rank 0 has {theirs}: use the same settings on all ranks"
            )
    for name in ("identity", "windows"):
        if rank0[name] != json.loads(json.dumps(local[name])):
            folder = run.config.data.shard_dir if "shards" in run.identity else run.config.data.dataset
            raise UserError(
                f"rank {run.ranks.rank}: the data or the base model differ from rank 0's: copy them from its machine "
                f"({folder})"
            )


def changed_settings(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    """Returns the old and new value of each changed setting by its dotted key, except for untracked ones."""
    before, after = old.model_dump(), new.model_dump()
    return {
        f"{section}.{key}": (before[section].get(key), after[section].get(key))
        for section in after
        for key in {**before[section], **after[section]}
        if before[section].get(key) != after[section].get(key) and f"{section}.{key}" not in UNTRACKED
    }


def clean_up(folder: Path, saved: checkpoint.Checkpoint | None) -> list[str]:
    """Removes the leftovers of a killed run and quarantines damaged checkpoints; returns messages about the latter."""
    checkpoint.clean_up(folder)
    if saved is None or not is_same_folder(saved.folder.parent, folder):
        return []
    moved = {path.name for path in checkpoint.quarantine(folder, saved.step)}
    return [
        *(f"warning: {problem}" for problem in saved.skipped),
        *(f"warning: moved to {name}" for name in sorted(moved)),
    ]


def restore(engine: Engine, run: Run, saved: checkpoint.Checkpoint) -> tuple[Run, Progress]:
    """Loads a checkpoint into the engine; returns the run, with its length adapted to a changed batch size, and its
    progress. Raises UserError if the checkpoint can't be read."""
    engine.load_state(checkpoint.load_arrays(saved, run.config.model, optimizer=True))
    progress = Progress.from_state(saved.state)
    run = replace(run, steps=resumed_steps(run, saved, progress))
    if run.identity.get("val_sequences") == saved.state.get("val_sequences", _eval_sequences(saved.config)):
        _restore_best(run, progress)
    else:  # a loss on other sequences can't be compared
        progress.best_val_loss, progress.best_val_bpb, progress.stale = None, None, 0
    return run, progress


def resumed_steps(run: Run, saved: checkpoint.Checkpoint, progress: Progress) -> int:
    """The length of a resumed run in steps, from its start. If the batch size changed and the length is given in epochs
    or tokens, it applies to the remaining data."""
    train = run.config.train
    before = sequences_per_step(saved.config.train, saved.state.get("ranks", 1))
    now = sequences_per_step(train, run.ranks.size)
    if before == now or (train.epochs is None and train.token_budget is None):
        return run.steps
    if train.epochs is not None:
        sequences = train.epochs * run.train.windows
    else:
        sequences = (train.token_budget or 0) / run.train.at(0, 1, 1).inputs.size
    sequences += train.first_sequence
    return progress.step + max(0, math.ceil((sequences - progress.position) / now))


def _restore_best(run: Run, progress: Progress) -> None:
    """Updates the best validation from best.json: a checkpoint predates the validation of its step. Not needed if
    that validation is repeated."""
    repeated = progress.step % run.config.train.eval_interval == 0 or progress.step == run.steps
    best = None if repeated else checkpoint.read_best(run.folder, progress.step)
    if best is not None and (progress.best_val_loss is None or best["best_val_loss"] < progress.best_val_loss):
        progress.best_val_loss, progress.best_val_bpb = best["best_val_loss"], best.get("best_val_bpb")
        progress.stale = 0
