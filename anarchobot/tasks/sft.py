"""Supervised fine-tuning on conversations."""

from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.config.schema import Config
from anarchobot.data.batches import Prefetcher, TrainBatches, ValBatches
from anarchobot.data.conversations.reading import RowCounts, read_conversations
from anarchobot.data.conversations.tokenized import ConversationWindows, tokenize_conversations
from anarchobot.evaluation.rouge import rouge, rouge_package
from anarchobot.exchange.pretrained import PretrainedModel, load_pretrained
from anarchobot.optim.schedule import total_steps
from anarchobot.system.micro_batch import resolve_micro_batch
from anarchobot.tasks.distillation import Distillation, open_teacher
from anarchobot.tasks.engines import EngineHandle, open_engine, open_ranks
from anarchobot.tasks.finetuning import check_settings, finetune, generate_reply, resume_identity
from anarchobot.tasks.resume import find_start, validation_sequences
from anarchobot.tasks.run import OutputMode
from anarchobot.tasks.technique import resolve_technique
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import TRAINING_DAY, load_template
from anarchobot.tokenizers.conversation import Conversation, Message
from anarchobot.training.loop import Run
from anarchobot.training.ranks import detect_launcher


def sft(loaded: LoadedConfig, *, show: OutputMode = "progress") -> dict[str, Any]:
    """Fine-tunes the model in train.init_from and returns the run summary. The config comes from `load_tuning_config`.

    Raises UserError, before anything is written, if data, model, checkpoint and config do not match.
    """
    check_settings(loaded, "sft")
    base = load_pretrained(str(loaded.config.train.init_from))
    teacher = open_teacher(loaded, base.tokenizer)
    loaded, pack_notes = without_packing(loaded, teacher)
    loaded, fit_messages = resolve_micro_batch(loaded, several_ranks=detect_launcher() is not None)
    config = loaded.config
    data, chat, train = config.data, config.chat, config.train
    ranks = open_ranks(config)
    start = find_start(loaded, ranks)
    config, technique_messages = resolve_technique(config, "sft", start.checkpoint, ranks)
    val_sequences = validation_sequences(config, start.checkpoint, ranks)
    encoder = ChatEncoder(base.tokenizer, load_template(base.tokenizer, chat.template), chat.train_on)
    counts = RowCounts()
    tokenized = tokenize_conversations(
        read_conversations(data, counts, chat.format, chat.language),
        encoder,
        counts,
        seq_len=data.seq_len,
        too_long=chat.too_long,
        val_fraction=data.val_fraction,
        samples=chat.rouge_samples,
    )
    train_windows, val_windows = (
        ConversationWindows(table, data.seq_len, chat.pack, base.tokenizer.eod_id)
        for table in (tokenized.train, tokenized.val)
    )
    samples, sample_notes = _rouge_samples(tokenized.samples, encoder, config)
    distillation = Distillation(loaded, teacher, [train_windows], [train_windows.digest()])
    batches = TrainBatches(distillation.sets, train.seed)
    handle = open_engine(config, base.weights, ranks)
    run = Run(
        config=config,
        steps=total_steps(train, data.seq_len, train_windows.count, ranks.size),
        identity={
            **resume_identity([train_windows.digest(), val_windows.digest()], base, handle, val_sequences),
            **distillation.identity,
        },
        train=Prefetcher(batches, ranks.rank, ranks.size),
        val=ValBatches(val_windows, train.micro_batch_size, val_sequences),
        bytes_per_token=tokenized.val.bytes_per_loss_token(base.tokenizer) if tokenized.val.count else 1.0,
        folder=start.folder,
        sample=lambda: generate_reply(handle, encoder, (Message("user", config.generation.prompt),), config),
        val_metrics=lambda: _rouge(handle, encoder, samples, config),
        ranks=ranks,
    )
    notes = [
        *pack_notes,
        *counts.summary(),
        f"{tokenized.train.count:,} training conversations, {tokenized.val.count:,} held out; "
        f"{tokenized.train.loss_tokens:,} loss tokens; sequences of {data.seq_len} are {train_windows.fill:.0%} full",
        *sample_notes,
    ]
    return finetune(
        run,
        start,
        handle,
        base,
        encoder,
        details=[*fit_messages, *technique_messages],
        notes=notes,
        unit="sequences",
        on_every_rank=lambda folder: distillation.prepare(run, start.checkpoint, batches, handle.precision, show),
        show=show,
    )


def without_packing(loaded: LoadedConfig, teacher: PretrainedModel | None = None) -> tuple[LoadedConfig, list[str]]:
    """Turns chat.pack off for models and teachers that mlx-lm computes, whose conversations would see each other."""
    config = loaded.config
    models = [config.model, *([] if teacher is None else [teacher.model])]
    if all(model.architecture != "mlx_lm" for model in models) or not config.chat.pack:
        return loaded, []
    config = config.model_copy(update={"chat": config.chat.model_copy(update={"pack": False})})
    return LoadedConfig(config, loaded.sources), [
        "chat.pack is off: mlx-lm's models can't mask conversations from each other; each has a sequence of its own"
    ]


def _rouge(handle: EngineHandle, encoder: ChatEncoder, samples: list[Conversation], config: Config) -> dict[str, float]:
    """ROUGE between the last answers of `samples` and those that the model generates greedily."""
    greedy = config.model_copy(update={"generation": config.generation.model_copy(update={"method": "greedy"})})
    if not samples:
        return {}
    return rouge((s[-1].content, generate_reply(handle, encoder, s[:-1], greedy)) for s in samples)


def _rouge_samples(
    samples: list[Conversation], encoder: ChatEncoder, config: Config
) -> tuple[list[Conversation], list[str]]:
    """The samples whose prompts leave room for an answer, and a note about the others. None, with a warning, without
    the package."""
    limit = config.model.max_seq_len
    usable = [s for s in samples if len(encoder.encode_prompt(s[:-1], TRAINING_DAY)) < limit]
    if config.chat.rouge_samples:
        try:
            rouge_package()
        except UserError as error:
            return [], [f"warning: no ROUGE (chat.rouge_samples): {error}"]
    if config.chat.rouge_samples and not samples:
        return [], ["no ROUGE (chat.rouge_samples): no held-out conversation ends with an answer"]
    if skipped := len(samples) - len(usable):
        return usable, [f"ROUGE on {len(usable)} answers; {skipped} skipped: prompt longer than max_seq_len ({limit})"]
    return usable, []
