"""Checks of the configuration itself: it loads, required fields are set, and the schedule is plausible."""

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.errors import UserError
from anarchobot.config.loading import leaf_keys, load, load_config, sections
from anarchobot.config.wording import count
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.optim.schedule import sequences_per_step, total_steps
from anarchobot.preflight.check import Context, Outcome, check
from anarchobot.preflight.plan import CONVERSATIONS_UNCOUNTED, is_preference_config, is_run_config, many_epochs
from anarchobot.tasks.adaptation.checks import warnings
from anarchobot.tasks.distillation import describe_teacher, open_teacher
from anarchobot.tasks.finetuning import check_settings, load_tuning_config

Command = Literal["pretrain", "sft", "dpo", "grpo", "adapt-vocab"]
FIX_CONFIG = "fix it in CONFIG; all keys: docs/configuration.md"


def command_for(context: Context) -> Command:
    """Infers from its sections which command a configuration is for."""
    try:
        given = sections(context.path, context.overrides)
        if given & {"models", "corpus"}:
            return "adapt-vocab"
        if is_run_config(given):
            loaded = load_config(context.path, context.overrides)
            if loaded.config.train.init_from is None:
                return "pretrain"
            if loaded.config.grpo.rewards is not None:
                return "grpo"
            return "dpo" if is_preference_config(loaded) else "sft"
        if "grpo" in given:
            return "grpo"
        if given & {"preference", "chat"}:
            return "dpo" if "preference" in given else "sft"
        if "lora" in given and "data.shard_dir" not in load_config(context.path, context.overrides).sources:
            return "sft"
    except UserError:  # the configuration check reports the error
        pass
    return "pretrain"


@check("configuration", advice=FIX_CONFIG)
def configuration(context: Context) -> Outcome:
    context.loaded = load_config(context.path, context.overrides)
    return _settings_given(context.loaded.sources)


@check("configuration", advice=FIX_CONFIG)
def tuning_configuration(context: Context) -> Outcome:
    context.loaded = load_tuning_config(context.path, context.overrides)
    command = command_for(context)
    assert command in ("sft", "dpo", "grpo")
    context.pairs = command == "dpo"
    check_settings(context.loaded, command)
    context.base = load_pretrained(str(context.loaded.config.train.init_from))
    context.teacher = open_teacher(context.loaded, context.base.tokenizer)
    return _settings_given(context.loaded.sources, describe_teacher(context.loaded, context.teacher))


@check("configuration", advice=FIX_CONFIG)
def adapt_configuration(context: Context) -> Outcome:
    context.adapt = load(context.path, context.overrides, AdaptConfig)
    return _settings_given({key for key in context.adapt.sources if key in leaf_keys(AdaptConfig)})


def _settings_given(keys: Collection[str], more: str = "") -> Outcome:
    return "pass", f"{count(len(keys), 'setting')} given{more}"


@check("required fields", ("configuration",))
def required_fields(context: Context) -> Outcome:
    """Pretraining needs shards, or the dataset and tokenizer to build them."""
    loaded = context.loaded
    data, train = loaded.config.data, loaded.config.train
    if loaded.config.lora.r is not None and train.init_from is None:
        return "fail", f"{loaded.where('lora.r')}: LoRA needs a pretrained model", "set train.init_from"
    if all((Path(folder) / "manifest.json").is_file() for folder in data.shard_dirs):
        return "pass", "data.shard_dir"
    required = {"data.dataset": data.dataset, "train.tokenizer_path": train.tokenizer_path}
    missing = [key for key, value in required.items() if value is None]
    if missing:
        return (
            "fail",
            f"data.shard_dir has no shards, and they cannot be built without {' and '.join(missing)}",
            f"set {' and '.join(missing)}",
        )
    return "pass", "data.dataset, train.tokenizer_path, data.shard_dir"


@check("schedule", ("configuration",))
def schedule(context: Context) -> Outcome:
    config, train = context.loaded.config, context.loaded.config.train
    if train.epochs is not None and context.windows is None:
        if command_for(context) in ("sft", "dpo", "grpo"):
            return "skip", CONVERSATIONS_UNCOUNTED
        return "skip", "needs: model and data (the run's length is given in epochs)"
    tokens_per_row = (2 if context.pairs else 1) * config.data.seq_len
    context.steps = steps = total_steps(train, tokens_per_row, context.windows or 0)
    end = train.lr_decay_steps
    if train.warmup_steps >= steps:
        return (
            "warn",
            f"warmup_steps ({train.warmup_steps:,}) is not below total_steps ({steps:,}): lr never reaches its peak",
            "lower train.warmup_steps, or raise train.total_steps",
        )
    if end is not None and end != steps and train.schedule != "constant":
        effect = f"lr stays at min_lr for the last {steps - end:,} steps" if end < steps else "lr never reaches min_lr"
        return (
            "warn",
            f"lr_decay_steps ({end:,}) differs from total_steps ({steps:,}): {effect}",
            "remove train.lr_decay_steps; its default is the last step",
        )
    found = f"{count(steps, 'step')}, {train.warmup_steps:,} of warmup, lr {train.lr:g}, then {train.schedule}"
    if context.windows is None:
        return "pass", found
    epochs = steps * sequences_per_step(train) / context.windows
    if warning := many_epochs(epochs):
        steps_per_epoch = max(1, round(steps / epochs))
        return (
            "warn",
            f"{found}; {warning}",
            f"add text, or lower train.total_steps ({steps_per_epoch:,} steps are one epoch); the best step is kept",
        )
    return "pass", f"{found}; {epochs:.2f} epochs"


@check("learning rate", ("configuration",))
def learning_rate(context: Context) -> Outcome:
    """TokAlign's learning rate against its tokens per step."""
    for text in warnings(context.adapt.config):
        return (
            "warn",
            text,
            "lower vocab_adaptation.stage1_lr (configs/adapt_stable.yaml has 2e-5), or raise "
            "vocab_adaptation.grad_accum_steps",
        )
    return "pass", f"stage 1: {context.adapt.config.vocab_adaptation.stage1_lr:g}"
