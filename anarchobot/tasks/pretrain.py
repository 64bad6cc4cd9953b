"""Pretraining: shards, model, loss and loop put together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.config.yaml_tree import dump
from anarchobot.data.batches import Prefetched, TrainBatches, ValBatches
from anarchobot.data.content_check import ContentCheck
from anarchobot.data.shards import TokenStream
from anarchobot.data.tokenizer import Tokenizer, copy_beside, digest, load_tokenizer
from anarchobot.data.windows import Joined, StreamWindows, open_windows
from anarchobot.model.shapes import parameter_count, parameter_shapes
from anarchobot.optim.routes import describe_routes
from anarchobot.optim.schedule import total_steps
from anarchobot.storage.durable import write_whole
from anarchobot.storage.lock import FolderLock
from anarchobot.tasks.engines import open_engine
from anarchobot.tasks.resuming import begin_with, changes, checkpoint_to_resume, resume, room_for, tidy
from anarchobot.training import checkpoint
from anarchobot.training.display import TerminalDisplay, duration
from anarchobot.training.loop import Engine, Run, run_training
from anarchobot.training.metrics import MetricsLog
from anarchobot.training.progress import Progress


def pretrain(loaded: LoadedConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Trains as the config says and returns the summary that it also writes; `finished` is False when it was stopped.

    Raises UserError when shards, tokenizer, checkpoint and config do not belong together, before anything is written.
    """
    config = loaded.config
    train, data = config.train, config.data
    folders = [data.shard_dir] if isinstance(data.shard_dir, str) else data.shard_dir
    streams = [TokenStream(folder, "train") for folder in folders]
    tokenizer = _check_tokenizers(loaded, streams)
    sets = [open_windows(stream, data.seq_len, data.pack, data.document_mask) for stream in streams]
    batches = TrainBatches(sets, train.seed, data.shard_weights)
    held_out = Joined([StreamWindows(TokenStream(f, "val"), data.seq_len, data.document_mask) for f in folders])
    val_shards = [shard for stream in streams for shard in stream.manifest.of("val")]
    run_folder = Path(train.save_dir)
    steps_before = checkpoint.saved_steps(run_folder)
    start = checkpoint_to_resume(loaded, run_folder)
    opened = open_engine(config)
    engine = opened.engine
    check = ContentCheck(folders)
    run = Run(
        config=config,
        steps=total_steps(train, data.seq_len, batches.windows),
        identity={"shards": [stream.manifest.digest() for stream in streams]},
        train=Prefetched(batches),
        val=ValBatches(held_out, train.micro_batch_size, train.eval_batches),
        bytes_per_token=sum(s.bytes for s in val_shards) / max(1, sum(s.tokens for s in val_shards)),
        folder=run_folder,
        sample=lambda: opened.sample(tokenizer),
        problem=lambda: check.problem,
    )
    progress = Progress() if start is None else resume(engine, run, start)
    told: list[str] = []
    if start is None and train.init_from is not None:
        told = begin_with(engine, loaded, train.init_from)

    with FolderLock(run_folder):
        if sorted(checkpoint.saved_steps(run_folder)) != sorted(steps_before):
            raise UserError(f"{run_folder}: another run has written here just now: begin again")
        told += tidy(run_folder, start)
        write_whole(run_folder / "config.yaml", dump(config.model_dump()))
        copy_beside(tokenizer, run_folder)
        with (
            run.train,
            MetricsLog(Path(train.log_path or run_folder / "logs")) as log,
            TerminalDisplay(run.steps, progress.step, quiet) as display,
        ):
            for line in [*told, *_opening(run, streams, opened.place, start)]:
                display.note(line)
            if start is not None:
                changed = {key: list(values) for key, values in changes(start.config, config).items()}
                for key, (old, new) in changed.items():
                    display.note(f"changed: {key} was {old}, is now {new}")
                log.event("resume", progress.step, folder=str(start.folder), changed=changed)
            for text in (*opened.warnings, *_warnings(run)):
                display.note(f"warning: {text}")
                log.event("warning", progress.step, text=text)
            finished = run_training(engine, run, progress, log, display)
            summary = _summary(run, progress, engine, finished)
            log.event("end", progress.step, finished=finished)
            log.summary(summary)
            if log.lost:
                display.note(f"warning: {log.lost} lines of {log.folder}/metrics.jsonl could not be written")
    return summary


def _check_tokenizers(loaded: LoadedConfig, streams: list[TokenStream]) -> Tokenizer:
    """The tokenizer that made all the shards: one and the same, of the model's vocabulary, and the configured one."""
    config = loaded.config
    for stream in streams:
        folder, manifest = stream.folder, stream.manifest
        if manifest.vocab_size != config.model.vocab_size:
            raise UserError(
                f"{loaded.where('model.vocab_size')}: {config.model.vocab_size}, but the shards in {folder} were made "
                f"with a tokenizer of {manifest.vocab_size} tokens: set model.vocab_size: {manifest.vocab_size}"
            )
        tokenizer = load_tokenizer(folder / manifest.tokenizer["file"])
        if digest(tokenizer) != manifest.tokenizer["sha256"]:
            raise UserError(
                f"{tokenizer.files[0]}: not the tokenizer that made the shards beside it: pretokenize again"
            )
        if manifest.tokenizer["sha256"] != streams[0].manifest.tokenizer["sha256"]:
            raise UserError(
                f"{loaded.where('data.shard_dir')}: {folder} and {streams[0].folder} were made with different "
                "tokenizers: pretokenize one of them again"
            )
    path = config.train.tokenizer_path
    if path is not None and digest(load_tokenizer(path)) != streams[0].manifest.tokenizer["sha256"]:
        raise UserError(
            f"{loaded.where('train.tokenizer_path')}: {path} is not the tokenizer that made the shards in "
            f"{streams[0].folder} ({streams[0].manifest.tokenizer['name']}): pretokenize again, or leave it out"
        )
    return tokenizer


def _opening(run: Run, streams: list[TokenStream], place: str, start: checkpoint.Checkpoint | None) -> list[str]:
    config = run.config
    per_step = config.train.micro_batch_size * config.train.grad_accum_steps
    tokens, epochs = sum(s.tokens for s in streams), run.steps * per_step / run.train.windows
    lines = [
        f"{parameter_count(config.model):,} parameters, {place}",
        *describe_routes(parameter_shapes(config.model), config.train.optimizer),
        f"{tokens:,} training tokens in {', '.join(str(s.folder) for s in streams)}; "
        f"{run.steps:,} steps of {per_step} x {config.data.seq_len} tokens = {epochs:.2f} epochs",
    ]
    if start is None and config.train.init_from is not None:
        lines.append(f"first weights from {config.train.init_from}")
    if start is not None:
        lines.append(f"resuming from {start.folder} at step {start.step}")
    return lines


def _warnings(run: Run) -> Iterator[str]:
    warmup = run.config.train.warmup_steps
    if warmup >= run.steps:
        yield f"warmup_steps ({warmup}) is no less than the run's {run.steps} steps: lr never reaches its peak"
    if len(run.val) == 0:
        yield "the validation split is empty: no validation, no best checkpoint (see data.val_fraction)"
    # Two moments for each parameter is AdamW's; Muon has one and a little.
    parameters = parameter_count(run.config.model)
    if text := room_for(run.folder, parameters, 2 * parameters, run.config.train.ckpt_keep):
        yield text


def _summary(run: Run, progress: Progress, engine: Engine, finished: bool) -> dict[str, Any]:
    return {
        "finished": finished,
        "steps": progress.step,
        "tokens": progress.tokens,
        "parameters": parameter_count(run.config.model),
        "final_loss": progress.loss,
        "best_val_loss": progress.best_val_loss,
        "best_val_bpb": progress.best_val_bpb,
        "wall_seconds": round(progress.wall_seconds, 3),
        "wall_time": duration(progress.wall_seconds),
        "tokens_per_second": round(progress.tokens / max(1e-9, progress.wall_seconds), 1),
        "peak_memory_gb": round(engine.peak_memory_gb(), 4),
        "save_dir": str(run.folder),
    }
