"""Going on with a run: from which step, and whether it is the same run."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.config.schema import Config
from anarchobot.runs import checkpoint
from anarchobot.runs.progress import Progress
from anarchobot.training.engine import Engine
from anarchobot.training.loop import Run

# What a run is bound to beside the model's shape: another value would make it another run.
FIXED = (
    *("train.seed", "train.trainable", "train.optimizer", "train.normuon", "train.muon_split_heads"),
    *("data.seq_len", "data.pack", "data.document_mask", "data.shard_weights"),
    *("lora.r", "lora.alpha", "lora.target_modules", "lora.num_layers", "lora.dora", "lora.rslora", "lora.quantize"),
    *("preference.loss", "preference.beta", "preference.label_smoothing"),
)
# What Run.identity may hold: the setting that leads to it, and how to speak of it.
IDENTITY = {
    "shards": ("data.shard_dir", "shards than those now in"),
    "conversations": ("data.dataset", "conversations than those now in"),
    "base": ("train.init_from", "weights than those now in"),
}
FREE_OF_MODEL = ("dropout", "max_seq_len", "bos_id")
# What says how a run is started and where its things lie, and changes nothing of it.
NOT_TOLD = ("train.checkpoint_path", "train.save_dir", "train.log_path", "train.supervise", "train.init_from")
# What each rank's machine may have in its own way: where things lie, and its cores.
OF_A_MACHINE = ("data.shard_dir", "data.dataset", "train.tokenizer_path", "train.cpu_threads")


def checkpoint_to_resume(loaded: LoadedConfig, run_folder: Path) -> checkpoint.Checkpoint | None:
    """None: the run begins anew. Raises UserError when there is none where one was named, or the folder holds another
    run, or later steps than it."""
    path = loaded.config.train.checkpoint_path
    steps = checkpoint.saved_steps(run_folder)
    if path == "auto":
        return checkpoint.find(run_folder) if steps else None
    if path is not None:
        start = checkpoint.find(path)
        if steps and start.folder.parent.resolve() != run_folder.resolve():
            raise UserError(
                f"{loaded.where('train.save_dir')}: {run_folder} holds another run than {path}: choose another folder"
            )
        if steps and max(steps) > start.step and not start.passed_over:
            raise UserError(
                f"{loaded.where('train.save_dir')}: {run_folder} holds later steps, up to {max(steps)}: to go back to "
                f"step {start.step}, choose another folder"
            )
        return start
    if steps:
        raise UserError(
            f"{loaded.where('train.save_dir')}: {run_folder} already holds a run, at step {max(steps)}: go on with it "
            "(--resume-from auto), or choose another folder"
        )
    return None


def check_same_run(start: checkpoint.Checkpoint, now: Config, identity: Mapping[str, Any]) -> None:
    """Raises UserError when the checkpoint is of another run than one of this configuration and Run.identity."""
    if "tokens" not in start.state or "norms" not in start.state:
        raise UserError(
            f"{start.folder}: weights without a run, as `import` makes them: train them further in another folder, "
            f"with train.init_from={start.folder.parent} train.save_dir=..."
        )
    for name, (key, here) in IDENTITY.items():
        if name in identity and name not in start.state:
            raise UserError(f"{start.folder}: a run of another command: begin a new run in another folder")
        if start.state.get(name) != identity.get(name):
            section, _, own = key.partition(".")
            raise UserError(
                f"{start.folder}: this run began with other {here} {getattr(getattr(now, section), own)}: point {key} "
                "at its own, or begin a new run"
            )
    shape = [f"model.{key}" for key in type(now.model).model_fields if key not in FREE_OF_MODEL]
    for key, (old, new) in changes(start.config, now).items():
        if key in (*shape, *FIXED):
            raise UserError(f"{start.folder}: {key} was {old} and is now {new}: a run can't change it")


def check_same_on_all_ranks(run: Run) -> None:
    """Raises UserError on a rank whose settings or data are not rank 0's."""
    own = {"config": run.config.model_dump(mode="json"), "identity": run.identity, "windows": run.train.windows}
    first = json.loads(run.ranks.broadcast(json.dumps(own).encode()))
    for key, (there, here) in changes(Config.model_validate(first["config"]), run.config).items():
        if key not in OF_A_MACHINE:
            raise UserError(f"rank {run.ranks.rank}: {key} is {here}, and rank 0's is {there}: give all the same")
    for name in ("identity", "windows"):
        if first[name] != json.loads(json.dumps(own[name])):
            folder = run.config.data.shard_dir if "shards" in run.identity else run.config.data.dataset
            raise UserError(
                f"rank {run.ranks.rank}: not the data, or not the base model, that rank 0 has: copy them from its "
                f"machine ({folder})"
            )


def resume(engine: Engine, config: Config, start: checkpoint.Checkpoint) -> Progress:
    """Brings the engine to where the checkpoint was. Raises UserError when that can't be read."""
    engine.load_state(checkpoint.load_arrays(start, config.model, optimizer=True))
    return Progress.of(start.state)


def changes(before: Config, now: Config) -> dict[str, tuple[object, object]]:
    """The settings that differ: the value before and the value now, under the key's dotted name."""
    old, new = before.model_dump(), now.model_dump()
    return {
        f"{section}.{key}": (old[section].get(key), new[section].get(key))
        for section in new
        for key in {**old[section], **new[section]}
        if old[section].get(key) != new[section].get(key) and f"{section}.{key}" not in NOT_TOLD
    }


def tidy(run_folder: Path, start: checkpoint.Checkpoint | None) -> list[str]:
    """Puts the folder in order behind a run that was killed or damaged; returns what is to be said about it."""
    checkpoint.tidy(run_folder)
    if start is None or start.folder.parent.resolve() != run_folder.resolve():
        return []
    moved = {path.name for path in checkpoint.set_aside(run_folder, start.step)}
    told = [f"warning: {problem}" for problem in start.passed_over]
    return [*told, *(f"warning: set aside as {name}" for name in sorted(moved))]


def room_for(run_folder: Path, parameters: int, moments: int, keep: int) -> str | None:
    """A warning when the disk is too full for the checkpoints that the run will keep, in bytes of float32."""
    one = 4 * (parameters + moments)
    free = shutil.disk_usage(run_folder).free
    wanted = (keep + 2) * one  # the best one, and the one being written
    if free >= wanted:
        return None
    return (
        f"{run_folder}: {free / 1e9:.1f} GB free, and the checkpoints will take up to {wanted / 1e9:.1f} GB: make "
        "room, or set train.ckpt_keep lower"
    )
