"""Pretraining: builds data, model and engine from the config and runs the training loop."""

from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.loading import WEIGHT_INDEPENDENT_KEYS, LoadedConfig
from anarchobot.config.paths import find_path
from anarchobot.data.batches import Prefetcher, TrainBatches, ValBatches
from anarchobot.data.shards import BackgroundVerifier, TokenStream
from anarchobot.data.windows import ConcatWindows, StreamWindows, open_windows
from anarchobot.exchange.pretrained import PretrainedModel, load_pretrained
from anarchobot.model.lora import trained_count, trained_shapes
from anarchobot.model.parameters import parameter_count
from anarchobot.optim.param_groups import describe_groups, select_trainable
from anarchobot.optim.schedule import describe_length, total_steps
from anarchobot.system.micro_batch import resolve_micro_batch
from anarchobot.tasks.distillation import Distillation, open_teacher
from anarchobot.tasks.engines import Weights, open_engine, open_ranks
from anarchobot.tasks.finetuning import pin_models
from anarchobot.tasks.resume import find_start, validation_sequences
from anarchobot.tasks.run import OutputMode, execute_run
from anarchobot.tasks.technique import resolve_technique
from anarchobot.tokenizers.tokenizer import ChatTokenizer, copy_tokenizer, digest, load_tokenizer
from anarchobot.training.loop import Run
from anarchobot.training.ranks import detect_launcher


def pretrain(loaded: LoadedConfig, *, show: OutputMode = "progress") -> dict[str, Any]:
    """Trains a model and returns the run's summary; `finished` is False if the run was stopped.

    Raises UserError, before writing anything, if shards, tokenizer, checkpoint and config do not match.
    """
    loaded, fit_messages = resolve_micro_batch(loaded, several_ranks=detect_launcher() is not None)
    config = loaded.config
    train, data = config.train, config.data
    use_lora = config.lora.r is not None
    if use_lora and train.init_from is None:
        raise UserError(f"{loaded.where('lora.r')}: LoRA requires a base model: set train.init_from, or use sft")

    ranks = open_ranks(config)
    streams = [TokenStream(folder, "train") for folder in data.shard_dirs]
    tokenizer = check_tokenizers(loaded, streams)
    train_sets = [open_windows(stream, data.seq_len, data.pack, data.document_mask) for stream in streams]
    shards = [stream.manifest.digest() for stream in streams]
    teacher = open_teacher(loaded, tokenizer)
    distillation = Distillation(loaded, teacher, train_sets, [*shards, data.seq_len, data.pack, data.document_mask])
    batches = TrainBatches(distillation.sets, train.seed, data.shard_weights)
    val_set = ConcatWindows(
        [StreamWindows(TokenStream(folder, "val"), data.seq_len, data.document_mask) for folder in data.shard_dirs]
    )
    val_shards = [shard for stream in streams for shard in stream.manifest.shards_in("val")]

    start = find_start(loaded, ranks)
    config, technique_messages = resolve_technique(config, "pretrain", start.checkpoint, ranks)
    val_sequences = validation_sequences(config, start.checkpoint, ranks)
    # LoRA always needs the frozen base. Otherwise a checkpoint has all weights, and other ranks get them from rank 0.
    load_base = train.init_from is not None and (use_lora or (start.checkpoint is None and ranks.rank == 0))
    base = load_pretrained(str(train.init_from)) if load_base else None
    config = pin_models(config, ["teacher", *([] if base is None else ["init_from"])])
    handle = open_engine(config, initial_weights(loaded, base) if base is not None else None, ranks)

    verifier = BackgroundVerifier(data.shard_dirs)
    run = Run(
        config=config,
        steps=total_steps(train, data.seq_len, batches.windows, ranks.size),
        identity={
            "val_sequences": val_sequences,
            "shards": shards,
            "tokenizer": digest(tokenizer),
            **({"base": base.digest, "precision": handle.precision} if use_lora and base is not None else {}),
            **distillation.identity,
        },
        train=Prefetcher(batches, ranks.rank, ranks.size),
        val=ValBatches(val_set, train.micro_batch_size, val_sequences),
        bytes_per_token=sum(s.bytes for s in val_shards) / max(1, sum(s.tokens for s in val_shards)),
        folder=start.folder,
        sample=lambda: handle.sample(tokenizer),
        data_error=lambda: verifier.problem,
        ranks=ranks,
    )
    return execute_run(
        run,
        start,
        handle,
        before_training=lambda folder: copy_tokenizer(tokenizer, folder),
        on_every_rank=lambda folder: distillation.prepare(run, start.checkpoint, batches, handle.precision, show),
        description=[*fit_messages, *technique_messages, *_describe(run, streams, handle.device, base)],
        trained_parameters=trained_count(config.model, config.lora),
        show=show,
    )


def check_tokenizers(loaded: LoadedConfig, streams: list[TokenStream]) -> ChatTokenizer:
    """Returns the tokenizer of the shards. Raises UserError if the shards were made with different tokenizers, or it
    does not match the model's vocabulary or the configured tokenizer."""
    config = loaded.config
    for stream in streams:
        folder, manifest = stream.folder, stream.manifest
        if manifest.vocab_size != config.model.vocab_size:
            raise UserError(
                f"{loaded.where('model.vocab_size')}: {config.model.vocab_size}, but the shards in {folder} were made "
                f"with a tokenizer of {manifest.vocab_size} tokens: set model.vocab_size: {manifest.vocab_size}"
            )
        tokenizer = load_tokenizer(find_path(str(folder / manifest.tokenizer["file"])))
        if digest(tokenizer) != manifest.tokenizer["sha256"]:
            raise UserError(
                f"{tokenizer.files[0]}: not the tokenizer that the shards next to it were made with: pretokenize again"
            )
        if manifest.tokenizer["sha256"] != streams[0].manifest.tokenizer["sha256"]:
            raise UserError(
                f"{loaded.where('data.shard_dir')}: {folder} and {streams[0].folder} were made with different "
                "tokenizers: pretokenize one of them again"
            )
    path = config.train.tokenizer_path
    if path is not None and digest(load_tokenizer(path)) != streams[0].manifest.tokenizer["sha256"]:
        raise UserError(
            f"{loaded.where('train.tokenizer_path')}: {path} is not the tokenizer of the shards in "
            f"{streams[0].folder} ({streams[0].manifest.tokenizer['name']}): pretokenize again, or remove this setting"
        )
    return tokenizer


def initial_weights(loaded: LoadedConfig, base: PretrainedModel) -> Weights:
    """Returns the base model's weights. Raises UserError if they are quantized, or its model settings differ from the
    config's."""
    if base.model.quantization is not None:
        raise UserError(
            f"{loaded.where('train.init_from')}: the weights of {base.name} are quantized: import the model first "
            "(anarchobot import), or train adapters for it (anarchobot sft with lora.r)"
        )
    for key in type(base.model).model_fields:
        old, new = getattr(base.model, key), getattr(loaded.config.model, key)
        if old != new and key not in WEIGHT_INDEPENDENT_KEYS:
            raise UserError(f"{loaded.where(f'model.{key}')}: {new}, but {base.name} has {old}: set it to {old}")
    return base.weights


def _describe(run: Run, streams: list[TokenStream], device: str, base: PretrainedModel | None) -> list[str]:
    config, train = run.config, run.config.train
    shapes = trained_shapes(config.model, config.lora)
    tokens, folders = sum(s.tokens for s in streams), ", ".join(str(s.folder) for s in streams)
    length = describe_length(train, run.steps, run.train.windows, f"x {config.data.seq_len} tokens", run.ranks.size)
    lines = [
        f"{parameter_count(config.model):,} parameters, {device}{run.ranks}",
        *describe_groups({name: shapes[name] for name in select_trainable(shapes, train.trainable)}, train.optimizer),
        f"{tokens:,} training tokens in {folders}; {length}",
    ]
    if base is not None:
        lines += [f"initialized from {base.name}", *(f"warning: {text}" for text in base.warnings)]
    return lines
