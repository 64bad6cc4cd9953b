"""Checks of the configuration itself: it loads, what must be there is there, the schedule makes sense."""

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.errors import UserError
from anarchobot.config.loading import leaf_keys, load, load_config, sections
from anarchobot.config.schema import Config
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.optim.schedule import total_steps
from anarchobot.preflight.check import Answer, Question, Setup
from anarchobot.preflight.plan import is_preference_config
from anarchobot.tasks.adaptation.checks import warnings
from anarchobot.tasks.finetuning import check_settings, load_tuning

Kind = Literal["pretrain", "sft", "dpo", "adapt-vocab"]
MEND = "mend it in CONFIG; all keys: docs/configuration.md"


def kind_of(setup: Setup) -> Kind:
    """The command that the configuration is for, told by its sections."""
    try:
        given = sections(setup.path, setup.overrides)
        if given & {"models", "corpus"}:
            return "adapt-vocab"
        if given >= set(Config.model_fields):  # a run's own config.yaml
            whole = load_config(setup.path, setup.overrides)
            if whole.config.train.init_from is None:
                return "pretrain"
            return "dpo" if is_preference_config(whole) else "sft"
        if given & {"preference", "chat"}:
            return "dpo" if "preference" in given else "sft"
        if "lora" in given and "data.shard_dir" not in load_config(setup.path, setup.overrides).sources:
            return "sft"
    except UserError:  # the check of the configuration says what is wrong
        pass
    return "pretrain"


def configuration(setup: Setup) -> Answer:
    setup.loaded = load_config(setup.path, setup.overrides)
    return _own_settings(setup.loaded.sources)


def tuning_configuration(setup: Setup) -> Answer:
    setup.loaded = load_tuning(setup.path, setup.overrides)
    setup.pairs = kind_of(setup) == "dpo"
    check_settings(setup.loaded, "dpo" if setup.pairs else "sft")
    setup.base = load_pretrained(str(setup.loaded.config.train.init_from))
    return _own_settings(setup.loaded.sources)


def adapt_configuration(setup: Setup) -> Answer:
    setup.adapt = load(setup.path, setup.overrides, AdaptConfig)
    return _own_settings({key for key in setup.adapt.sources if key in leaf_keys(AdaptConfig)})


def _own_settings(keys: Collection[str]) -> Answer:
    return Answer("pass", f"{len(keys)} settings of its own")


def required(setup: Setup) -> Answer:
    """What pretraining can't do without: shards, or what they are made from."""
    loaded = setup.loaded
    data, train = loaded.config.data, loaded.config.train
    if loaded.config.lora.r is not None and train.init_from is None:
        return Answer("fail", f"{loaded.where('lora.r')}: a new model has nothing to adapt", "set train.init_from")
    if all((Path(folder) / "manifest.json").is_file() for folder in shard_folders(loaded.config)):
        return Answer("pass", "data.shard_dir")
    missing = [
        key
        for key, value in (("data.dataset", data.dataset), ("train.tokenizer_path", train.tokenizer_path))
        if value is None
    ]
    if missing:
        return Answer(
            "fail",
            f"no shards yet, and nothing to make them from: no {' and no '.join(missing)}",
            f"set {' and '.join(missing)}",
        )
    return Answer("pass", "data.dataset, train.tokenizer_path, data.shard_dir")


def shard_folders(config: Config) -> list[str]:
    folders = config.data.shard_dir
    return [folders] if isinstance(folders, str) else folders


def schedule(setup: Setup) -> Answer:
    config, train = setup.loaded.config, setup.loaded.config.train
    if train.epochs is not None and setup.windows is None:
        return Answer("skip", "needs: model and data (the run's length is given in epochs)")
    setup.steps = steps = total_steps(train, (2 if setup.pairs else 1) * config.data.seq_len, setup.windows or 0)
    end = train.lr_decay_steps
    if train.warmup_steps >= steps:
        what = f"warmup_steps ({train.warmup_steps:,}) is no less than the run's {steps:,} steps"
        return Answer(
            "warn", f"{what}: lr never reaches its peak", "lower train.warmup_steps, or raise train.total_steps"
        )
    if end is not None and end != steps and train.schedule != "constant":
        what = f"lr is at min_lr for the last {steps - end:,}" if end < steps else "lr does not come down to min_lr"
        return Answer(
            "warn",
            f"lr_decay_steps ({end:,}) is not the run's {steps:,} steps: {what}",
            "leave train.lr_decay_steps out: then it is the last step",
        )
    return Answer("pass", f"{steps:,} steps, {train.warmup_steps:,} of warm-up, lr {train.lr:g}, then {train.schedule}")


def papers_rate(setup: Setup) -> Answer:
    """TokAlign's learning rate beside its tokens a step."""
    for text in warnings(setup.adapt.config):
        return Answer(
            "warn",
            text,
            "lower vocab_adaptation.lr_stage1 (configs/adapt_stable.yaml has 2e-5), or raise "
            "vocab_adaptation.gradient_accumulation",
        )
    return Answer("pass", f"stage 1: {setup.adapt.config.vocab_adaptation.lr_stage1:g}")


CONFIGURATION = Question("configuration", configuration, advice=MEND)
TUNING_CONFIGURATION = Question("configuration", tuning_configuration, advice=MEND)
ADAPT_CONFIGURATION = Question("configuration", adapt_configuration, advice=MEND)
REQUIRED = Question("required fields", required, ("configuration",))
SCHEDULE = Question("schedule", schedule, ("configuration",))
PAPERS_RATE = Question("learning rate", papers_rate, ("configuration",))
