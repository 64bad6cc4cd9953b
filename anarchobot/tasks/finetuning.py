"""Shared by sft, dpo and grpo: config checks, the run itself, and adapters written at its end."""

import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig, leaf_keys, load_config
from anarchobot.config.schema import Config, GRPOConfig, PreferenceConfig
from anarchobot.exchange.adapters import read_adapter, write_adapter
from anarchobot.exchange.hub import pinned_name, repo_name
from anarchobot.exchange.pretrained import PretrainedModel, load_pretrained
from anarchobot.model.lora import is_quantized, trained_count
from anarchobot.model.parameters import parameter_count, parameter_shapes
from anarchobot.model.quantization import describe, packings
from anarchobot.optim.schedule import describe_length
from anarchobot.runs import checkpoint
from anarchobot.tasks.engines import EngineHandle
from anarchobot.tasks.resume import ResumePoint
from anarchobot.tasks.run import OutputMode, execute_run
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import TRAINING_DAY
from anarchobot.tokenizers.conversation import Conversation
from anarchobot.tokenizers.decoding import StopStringFilter
from anarchobot.tokenizers.tokenizer import copy_tokenizer, digest
from anarchobot.training.loop import Run

_DOCUMENT_KEYS = {
    **{
        f"data.{key}": "applies to documents, not conversations"
        for key in (
            *("weights", "score_field", "score_min", "documents", "clean", "min_chars", "max_chars", "dedup"),
            *("near_dedup", "shard_dir", "shard_weights", "pack", "document_mask", "fallback"),
        )
    },
    **{f"train.{key}": "applies only to pretrain" for key in ("trainable", "first_sequence")},
}
_PREFERENCE_KEYS = {f"preference.{key}": "applies only to dpo" for key in PreferenceConfig.model_fields}
_GRPO_KEYS = {f"grpo.{key}": "applies only to grpo" for key in GRPOConfig.model_fields}
# Settings that a command would silently ignore, and why.
UNUSED_KEYS = {
    "sft": {**_DOCUMENT_KEYS, **_PREFERENCE_KEYS, **_GRPO_KEYS},
    "dpo": {
        **_DOCUMENT_KEYS,
        **_GRPO_KEYS,
        **{f"chat.{key}": "applies only to sft" for key in ("train_on", "format", "rouge_samples", "pack")},
        "data.text_field": "applies only to sft",
        "train.teacher": "applies only to pretrain and sft",
    },
    "grpo": {
        **_DOCUMENT_KEYS,
        **_PREFERENCE_KEYS,
        **{f"chat.{key}": "applies only to sft" for key in ("train_on", "format", "rouge_samples", "pack")},
        **{f"chat.{key}": "applies only to sft and dpo" for key in ("too_long", "language")},
        "data.text_field": "applies only to sft",
        "lora.dropout": "would change the probabilities that grpo compares",
        "train.teacher": "applies only to pretrain and sft",
        "train.token_budget": "completions have no fixed length: set train.total_steps or train.epochs",
    },
}
# Settings of preference that apply only to some losses.
_LOSSES_WITH = {
    "label_smoothing": ("sigmoid", "sigmoid_norm", "simpo", "cpo"),
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("cpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


def load_tuning_config(
    path: str | None, overrides: Sequence[str | tuple[str, Any]], *, limit_lengths: bool = False
) -> LoadedConfig:
    """Loads a config whose model section is taken from the model in train.init_from; `limit_lengths` as in
    `load_config`."""
    loaded = load_config(
        path, overrides, base_model=lambda folder: load_pretrained(folder).model, limit_lengths=limit_lengths
    )
    return replace(loaded, config=pin_models(loaded.config))


def pin_models(config: Config, keys: Sequence[str] = ("init_from", "teacher")) -> Config:
    """Adds the commit to models of the Hub in `keys` of train: a run is resumed with the files it started from."""
    paths = {key: path for key in keys if (path := getattr(config.train, key)) is not None}
    train = config.train.model_copy(update={key: pinned_name(path) for key, path in paths.items()})
    return config.model_copy(update={"train": train})


def check_settings(loaded: LoadedConfig, command: Literal["sft", "dpo", "grpo"]) -> None:
    """Raises UserError for settings that the command ignores and for a missing dataset."""
    config, fields = loaded.config, leaf_keys()
    if config.model.quantization is not None and config.lora.r is None:
        raise UserError(
            f"{loaded.where('train.init_from')}: the weights of {config.train.init_from} are quantized and can't be "
            "trained themselves: set lora.r, such as lora.r=8, or import it first (anarchobot import)"
        )
    if config.model.quantization is not None and config.lora.quantize is not None:
        raise UserError(
            f"{loaded.where('lora.quantize')}: the weights of {config.train.init_from} are quantized already: remove it"
        )
    unused = dict(UNUSED_KEYS[command])
    for name, losses in _LOSSES_WITH.items() if command == "dpo" else ():
        if config.preference.loss not in losses:
            unused[f"preference.{name}"] = f"applies only to preference.loss: {', '.join(losses)}"
    for key, reason in unused.items():
        if attrgetter(key)(config) != fields[key].default:
            raise UserError(f"{loaded.where(key)}: {reason}: remove it")
    if config.data.dataset is None:
        raise UserError(
            f"{loaded.where('data.dataset')}: not set: expected JSONL or Parquet files, or a Hugging Face dataset"
        )


def resume_identity(
    data_digests: list[str], base: PretrainedModel, handle: EngineHandle, val_sequences: int | None
) -> dict[str, Any]:
    """What must match on resume. The precision also tells how a quantized base was dequantized
    (exchange/adapters.py)."""
    return {
        "conversations": data_digests,
        "base": base.digest,
        "tokenizer": digest(base.tokenizer),
        "precision": handle.precision,
        "val_sequences": val_sequences,
    }


def finetune(
    run: Run,
    start: ResumePoint,
    handle: EngineHandle,
    base: PretrainedModel,
    encoder: ChatEncoder,
    *,
    details: Sequence[str],
    notes: Sequence[str],
    unit: str,
    on_every_rank: Callable[[Path], object] = lambda folder: None,
    show: OutputMode,
) -> dict[str, Any]:
    """Trains `base`, already loaded into the engine, and returns the run summary.

    `details` describe the step, `notes` the data; `unit` is what a batch consists of. `on_every_rank` is called with
    the run folder once that is locked. Raises UserError as `execute_run` does.
    """

    def prepare_folder(folder: Path) -> None:
        copy_tokenizer(base.tokenizer, folder)  # for `generate`, `export` and other programs
        encoder.template.save(folder)

    config, trained = run.config, trained_count(run.config.model, run.config.lora)
    warnings = [f"warning: {text}" for text in (*base.warnings, *encoder.warnings())]
    description = [
        f"{base.name}: {parameter_count(config.model):,} parameters, {handle.device}{run.ranks}",
        _trained_parameters(config, trained),
        *details,
        describe_length(config.train, run.steps, run.train.windows, unit, run.ranks.size),
    ]
    summary = execute_run(
        run,
        start,
        handle,
        before_training=prepare_folder,
        on_every_rank=on_every_rank,
        description=description,
        notes=[*notes, *warnings],
        trained_parameters=trained,
        show=show,
    )
    if run.ranks.rank > 0:
        return summary
    summary |= _write_adapters(run, base)
    initial_loss = summary["best_val_loss"]
    is_worse = summary["finished"] and summary["best_step"] is None and initial_loss is not None
    if is_worse and show in ("progress", "brief"):
        saved = f"; adapters are from step {summary['adapters_step']}" if "adapters" in summary else ""
        print(f"warning: no step improved on the initial validation loss ({initial_loss:.4f}){saved}", file=sys.stderr)
    return summary


def generate_reply(handle: EngineHandle, encoder: ChatEncoder, conversation: Conversation, config: Config) -> str:
    """The model's next turn. The template's date is TRAINING_DAY, so that a resumed run generates the same text."""
    ids = handle.generate_ids(
        encoder.encode_prompt(conversation, TRAINING_DAY).tolist(), config.generation, encoder.stop_ids()
    )
    text = StopStringFilter(config.generation.stop)
    return (text.add(encoder.tokenizer.decode(ids)) + text.finish()).strip()


def _trained_parameters(config: Config, trained: int) -> str:
    total = parameter_count(config.model)
    shapes = parameter_shapes(config.model)
    if config.lora.quantize is not None:
        packed, bits = {name for name, shape in shapes.items() if is_quantized(shape)}, f"{config.lora.quantize} bits"
    elif config.model.quantization is not None:
        packed, bits = set(packings(config.model)), describe(config.model.quantization)
    else:
        packed, bits = set(), ""
    what = f"adapters of rank {config.lora.r}" if config.lora.r is not None else "all weights"
    share = sum(math.prod(shapes[name]) for name in packed) / total
    frozen = f", {share:.1%} of the rest in {bits}" if packed else ""
    return f"training {what}: {trained:,} parameters ({trained / total:.2%} of the model){frozen}"


def _write_adapters(run: Run, base: PretrainedModel) -> dict[str, Any]:
    """Exports the best step's adapters, or the newest if no step improved, to RUN/adapters; returns the summary
    entries."""
    model, lora, folder = run.config.model, run.config.lora, run.folder / "adapters"
    if lora.r is None or not checkpoint.saved_steps(run.folder):  # stopped before the first checkpoint
        return {}
    adapter = read_adapter(run.folder, model)
    shutil.rmtree(folder, ignore_errors=True)
    write_adapter(folder, adapter, model, lora.adapter_format, repo_name(base.folder))
    return {"adapters": str(folder), "adapters_step": adapter.step}
