"""Reinforcement learning from verifiable rewards, with group-relative policy optimization (model/grpo.py)."""

import sys
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.data.conversations.questions import tokenize_questions
from anarchobot.data.conversations.reading import RowCounts, read_questions
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.optim.schedule import total_steps
from anarchobot.system.micro_batch import resolve_micro_batch
from anarchobot.tasks.engines import open_grpo_engine
from anarchobot.tasks.finetuning import check_settings, finetune, resume_identity
from anarchobot.tasks.resume import find_start, validation_sequences
from anarchobot.tasks.run import OutputMode
from anarchobot.tasks.technique import resolve_technique
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import load_template
from anarchobot.training.loop import Run
from anarchobot.training.ranks import detect_launcher
from anarchobot.training.rewards import Rewards


def grpo(loaded: LoadedConfig, *, show: OutputMode = "progress") -> dict[str, Any]:
    """Trains the model in train.init_from on its own completions of prompts; otherwise like `sft`.
    train.micro_batch_size counts completions. The validation loss is the negative mean reward.

    Raises UserError, before anything is written, if data, rewards, model, checkpoint and config do not match.
    """
    check_settings(loaded, "grpo")
    if loaded.config.grpo.rewards is None:
        raise UserError(f"{loaded.where('grpo.rewards')}: not set: name a reward, such as grpo.rewards=[number]")
    if detect_launcher() is not None:
        raise UserError("grpo trains in a single process: start it without launch")
    loaded, dropout_notes = without_dropout(loaded)
    loaded, fit_messages = resolve_micro_batch(loaded)
    config = loaded.config
    data, settings, train = config.data, config.grpo, config.train
    if settings.function is not None and show != "json":
        print(f"warning: grpo.function: running the Python code of {settings.function}", file=sys.stderr)
    rewards = Rewards(settings)
    base, start = load_pretrained(str(train.init_from)), find_start(loaded)
    config, technique_messages = resolve_technique(config, "grpo", start.checkpoint)
    val_sequences = validation_sequences(config, start.checkpoint)
    encoder = ChatEncoder(base.tokenizer, load_template(base.tokenizer, config.chat.template), "answer")
    counts = RowCounts()
    train_set, val_set = tokenize_questions(
        read_questions(data, counts, rewards.check_answer),
        encoder,
        counts,
        max_prompt=data.seq_len - settings.max_completion_length,
        val_fraction=data.val_fraction,
    )
    handle, engine = open_grpo_engine(config, base.weights)
    from anarchobot.inference.rollouts import Rollouts, ValidationRollouts  # they import MLX

    rollouts = Rollouts(engine, train_set, encoder, rewards, config)
    validation = ValidationRollouts(engine, val_set, encoder, rewards, config, val_sequences)
    run = Run(
        config=config,
        steps=total_steps(train, data.seq_len, rollouts.windows),
        identity=resume_identity([train_set.digest(), val_set.digest()], base, handle, val_sequences),
        train=rollouts,
        val=validation,
        bytes_per_token=None,
        folder=start.folder,
        sample=rollouts.sample,
        val_metrics=validation.metrics,
    )
    notes = [
        *dropout_notes,
        *counts.summary(),
        f"{train_set.count:,} training prompts, {val_set.count:,} held out; {train_set.describe()}",
        f"rewards: {', '.join(rewards.names)}; {settings.num_generations} completions of each prompt",
    ]
    details = [*fit_messages, *technique_messages]
    return finetune(run, start, handle, base, encoder, details=details, notes=notes, unit="completions", show=show)


def without_dropout(loaded: LoadedConfig) -> tuple[LoadedConfig, list[str]]:
    """Turns model.dropout off, which would change the probabilities that the loss compares."""
    config = loaded.config
    if config.model.dropout == 0:
        return loaded, []
    config = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.0})})
    return LoadedConfig(config, loaded.sources), ["model.dropout is off: it would change the probabilities compared"]
