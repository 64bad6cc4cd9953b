"""Pretraining: shards, model, loss and loop put together."""

from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.loading import WEIGHT_INDEPENDENT_KEYS, LoadedConfig
from anarchobot.data.batches import Prefetcher, TrainBatches, ValBatches
from anarchobot.data.shards import BackgroundVerifier
from anarchobot.data.shards import TokenStream
from anarchobot.data.windows import ConcatWindows, StreamWindows, open_windows
from anarchobot.exchange.pretrained import PretrainedModel, load_pretrained
from anarchobot.model.lora import trained_count, trained_shapes
from anarchobot.model.parameters import parameter_count
from anarchobot.optim.param_groups import describe_groups, trained
from anarchobot.optim.schedule import total_steps
from anarchobot.tasks.engines import Weights, open_engine, open_ranks
from anarchobot.tasks.run import Show, execute_run, find_start, resolve_run
from anarchobot.tokenizers.tokenizer import Tokenizer, copy_tokenizer, digest, load_tokenizer
from anarchobot.training.loop import Run


def pretrain(loaded: LoadedConfig, *, show: Show = "progress") -> dict[str, Any]:
    """Trains as the config says and returns the summary that it also writes; `finished` is False when it was stopped.

    Raises UserError when shards, tokenizer, checkpoint and config do not belong together, before anything is written.
    """
    loaded, fitting = resolve_run(loaded)
    config = loaded.config
    train, data = config.train, config.data
    adapted = config.lora.r is not None
    if adapted and train.init_from is None:
        raise UserError(f"{loaded.where('lora.r')}: a new model has nothing to adapt: set train.init_from, or use sft")
    folders = [data.shard_dir] if isinstance(data.shard_dir, str) else data.shard_dir
    ranks = open_ranks(config)
    streams = [TokenStream(folder, "train") for folder in folders]
    tokenizer = check_tokenizers(loaded, streams)
    sets = [open_windows(stream, data.seq_len, data.pack, data.document_mask) for stream in streams]
    batches = TrainBatches(sets, train.seed, data.shard_weights)
    held_out = ConcatWindows([StreamWindows(TokenStream(f, "val"), data.seq_len, data.document_mask) for f in folders])
    val_shards = [shard for stream in streams for shard in stream.manifest.of("val")]
    start = find_start(loaded, ranks)
    # Adapters need it all along; a rank beside the first gets all other weights from that.
    from_base = train.init_from is not None and (adapted or (start.checkpoint is None and ranks.rank == 0))
    base = load_pretrained(str(train.init_from)) if from_base else None
    opened = open_engine(config, first_weights(loaded, base) if base is not None else None, ranks)
    check = BackgroundVerifier(folders)
    run = Run(
        config=config,
        steps=total_steps(train, data.seq_len, batches.windows, ranks.size),
        identity={
            "shards": [stream.manifest.digest() for stream in streams],
            **({"base": base.digest, "precision": opened.precision} if adapted and base is not None else {}),
        },
        train=Prefetcher(batches, ranks.rank, ranks.size),
        val=ValBatches(held_out, train.micro_batch_size, train.eval_batches),
        bytes_per_token=sum(s.bytes for s in val_shards) / max(1, sum(s.tokens for s in val_shards)),
        folder=start.folder,
        sample=lambda: opened.sample(tokenizer),
        problem=lambda: check.problem,
        ranks=ranks,
    )
    return execute_run(
        run,
        start,
        opened,
        beside=lambda folder: copy_tokenizer(tokenizer, folder),
        opening=[*fitting, *_opening(run, streams, opened.place, base)],
        trained=trained_count(config.model, config.lora),
        show=show,
    )


def check_tokenizers(loaded: LoadedConfig, streams: list[TokenStream]) -> Tokenizer:
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


def first_weights(loaded: LoadedConfig, base: PretrainedModel) -> Weights:
    """Raises UserError when the models differ."""
    for key in type(base.model).model_fields:
        old, new = getattr(base.model, key), getattr(loaded.config.model, key)
        if old != new and key not in WEIGHT_INDEPENDENT_KEYS:
            raise UserError(f"{loaded.where(f'model.{key}')}: {new}, and {base.folder}'s is {old}: set it to that")
    return base.weights


def _opening(run: Run, streams: list[TokenStream], place: str, base: PretrainedModel | None) -> list[str]:
    config = run.config
    per_step = run.ranks.size * config.train.micro_batch_size * config.train.grad_accum_steps
    shapes = trained_shapes(config.model, config.lora)
    tokens, epochs = sum(s.tokens for s in streams), run.steps * per_step / run.train.windows
    lines = [
        f"{parameter_count(config.model):,} parameters, {place}{run.ranks}",
        *describe_groups(
            {name: shapes[name] for name in trained(shapes, config.train.trainable)}, config.train.optimizer
        ),
        f"{tokens:,} training tokens in {', '.join(str(s.folder) for s in streams)}; "
        f"{run.steps:,} steps of {per_step} x {config.data.seq_len} tokens = {epochs:.2f} epochs",
    ]
    if base is not None:
        lines += [f"first weights from {base.folder}", *(f"warning: {text}" for text in base.warnings)]
    return lines
