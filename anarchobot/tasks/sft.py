"""Supervised fine-tuning: a model learns to answer, from conversations."""

import shutil
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.config.schema import Config, DataConfig
from anarchobot.data.batches import Prefetched, TrainBatches, ValBatches
from anarchobot.data.conversations.conversation import Conversation, Message
from anarchobot.data.conversations.masks import ChatEncoder
from anarchobot.data.conversations.reading import conversations
from anarchobot.data.conversations.sequences import ConversationWindows
from anarchobot.data.conversations.tally import Tally
from anarchobot.data.conversations.template import load_template
from anarchobot.data.conversations.tokenising import Tokenised, tokenised
from anarchobot.data.tokenizer import copy_beside
from anarchobot.evaluation.rouge import rouge
from anarchobot.exchange.adapters import read_adapter, write_adapter
from anarchobot.model.lora import trained_count
from anarchobot.model.shapes import parameter_count
from anarchobot.optim.schedule import total_steps
from anarchobot.tasks.bases import Base, open_base
from anarchobot.tasks.engines import OpenEngine, open_engine
from anarchobot.tasks.running import carry_out, where_to_start
from anarchobot.training import checkpoint
from anarchobot.training.loop import Run

# Of the data section, what is done to documents and shards, and not to conversations.
NOT_OF_CHATS = (
    *("weights", "score_field", "score_min", "documents", "clean", "min_chars", "max_chars", "dedup", "near_dedup"),
    *("shard_dir", "shard_weights", "pack", "document_mask", "fallback"),
)


def sft(loaded: LoadedConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Tunes the model in train.init_from as the config says (its model section is that model's: tasks/bases.py);
    returns the summary that it also writes.

    Raises UserError when data, model, checkpoint and config do not belong together, before anything is written.
    """
    check_settings(loaded)
    config = loaded.config
    data, chat, train = config.data, config.chat, config.train
    base, start = open_base(str(train.init_from)), where_to_start(loaded)
    encoder = ChatEncoder(base.tokenizer, load_template(base.tokenizer, chat.template), chat.train_on)
    made, tally = read_conversations(config, encoder)
    sets = [ConversationWindows(t, data.seq_len, chat.pack, base.tokenizer.eod_id) for t in (made.train, made.val)]
    learnt, held_out = sets
    opened = open_engine(config, base.weights)
    run = Run(
        config=config,
        steps=total_steps(train, data.seq_len, learnt.count),
        identity=identity([part.digest() for part in sets], base, opened),
        train=Prefetched(TrainBatches([learnt], train.seed)),
        val=ValBatches(held_out, train.micro_batch_size, train.eval_batches),
        bytes_per_token=made.val.bytes_per_target(base.tokenizer) if made.val.count else 1.0,
        folder=start.folder,
        sample=lambda: answer(opened, encoder, (Message("user", config.generation.prompt),), config),
        judge=lambda: _rouge(opened, encoder, made.samples, config),
    )
    rows = (
        f"{made.train.count:,} conversations to learn from, {made.val.count:,} held out; {made.train.targets:,} tokens"
    )
    per_step = train.micro_batch_size * train.grad_accum_steps
    summary = carry_out(
        run,
        start,
        opened,
        first_weights=lambda: [f"warning: {text}" for text in base.warnings],
        beside=lambda folder: write_beside(base, encoder, folder),
        opening=[
            *opening(config, base, opened),
            *tally.lines(),
            f"{rows} count; sequences of {data.seq_len} are {learnt.fill:.0%} full",
            f"{run.steps:,} steps of {per_step} sequences = {run.steps * per_step / learnt.count:.2f} epochs",
            *(f"warning: {text}" for text in encoder.warnings()),
        ],
        trained=trained_count(config.model, config.lora),
        quiet=quiet,
    )
    return summary | write_adapters(run, base)


def check_settings(loaded: LoadedConfig) -> None:
    """Raises UserError for a setting that tuning would pass over in silence, and when there is no dataset."""
    plain, data = DataConfig(), loaded.config.data
    for key in NOT_OF_CHATS:
        if getattr(data, key) != getattr(plain, key):
            raise UserError(f"{loaded.where(f'data.{key}')}: is about documents, not conversations: leave it out")
    if data.dataset is None:
        raise UserError(
            f"{loaded.where('data.dataset')}: expected what to learn from: JSONL or Parquet files, or a dataset's name"
        )


def read_conversations(config: Config, encoder: ChatEncoder) -> tuple[Tokenised, Tally]:
    data, chat, tally = config.data, config.chat, Tally()
    found = conversations(data, tally, chat.format, chat.language)
    made = tokenised(
        found, encoder, tally, seq_len=data.seq_len, too_long=chat.too_long, val_fraction=data.val_fraction,
        samples=chat.rouge_samples,
    )  # fmt: skip
    return made, tally


def identity(digests: list[str], base: Base, opened: OpenEngine) -> dict[str, Any]:
    """What a run must find again to be resumed; and what packed weights were unpacked into (exchange/adapters.py)."""
    return {"conversations": digests, "base": base.digest, "precision": opened.precision}


def opening(config: Config, base: Base, opened: OpenEngine) -> list[str]:
    """What is tuned, and how much of it."""
    trained, whole = trained_count(config.model, config.lora), parameter_count(config.model)
    adapters = f"adapters of rank {config.lora.r}" if config.lora.r is not None else "all weights"
    packed = f", the rest in {config.lora.quantize} bits" if config.lora.quantize else ""
    return [
        f"{base.folder}: {whole:,} parameters, {opened.place}",
        f"trained: {adapters}, {trained:,} parameters ({trained / whole:.2%} of the model's){packed}",
    ]


def write_beside(base: Base, encoder: ChatEncoder, folder: Path) -> None:
    """The tokenizer and its chat template: `generate`, `export` and other programs find them there."""
    copy_beside(base.tokenizer, folder)
    encoder.template.save(folder)


def write_adapters(run: Run, base: Base) -> dict[str, str]:
    """Puts the best step's adapters (the newest's, where none was validated) into RUN/adapters, for other programs;
    returns what to add to the summary."""
    lora = run.config.lora
    if lora.r is None:
        return {}
    best = run.folder / "best.json"
    found = checkpoint.find(best if checkpoint.named_step(best) is not None else run.folder)
    folder = run.folder / "adapters"
    shutil.rmtree(folder, ignore_errors=True)
    write_adapter(folder, read_adapter(found.folder, run.config.model), run.config.model, lora.adapter_format,
                  str(base.folder))  # fmt: skip
    return {"adapters": str(folder)}


def answer(opened: OpenEngine, encoder: ChatEncoder, conversation: Conversation, config: Config) -> str:
    """What the model says next, as text."""
    end = encoder.end_of_turn()
    stop = {encoder.tokenizer.eod_id} | ({end} if end is not None else set())
    ids = opened.draw(encoder.prompt(conversation).tolist(), config.generation, stop)
    return encoder.tokenizer.decode(ids).strip()


def _rouge(opened: OpenEngine, encoder: ChatEncoder, samples: list[Conversation], config: Config) -> dict[str, float]:
    """ROUGE of the last answers of held-out conversations, each drawn anew by the likeliest tokens."""
    greedy = config.model_copy(update={"generation": config.generation.model_copy(update={"method": "greedy"})})
    fitting = [s for s in samples if len(encoder.prompt(s[:-1])) < config.model.max_seq_len]
    if not fitting:
        return {}
    return rouge((s[-1].content, answer(opened, encoder, s[:-1], greedy)) for s in fitting)
