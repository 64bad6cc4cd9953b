"""Loads a full model for inference or further training: an AnarchoBot run, or a Hugging Face model folder or name."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

from anarchobot.config.errors import UserError
from anarchobot.config.loading import WEIGHT_INDEPENDENT_KEYS
from anarchobot.config.schema import Config, LoraConfig, ModelConfig
from anarchobot.exchange.adapters import CONFIG as ADAPTER_CONFIG
from anarchobot.exchange.adapters import OR_HUGGING_FACE, Adapter, check_base, read_adapter, recorded_base
from anarchobot.exchange.hub import model_name, resolve_model
from anarchobot.exchange.importing import LazyWeights, default_config, float_weights, load_hf_folder
from anarchobot.model.parameters import parameter_shapes
from anarchobot.model.quantization import Array, describe
from anarchobot.runs import checkpoint
from anarchobot.storage.durable import sha256_file
from anarchobot.tokenizers import chat_template
from anarchobot.tokenizers.tokenizer import ChatTokenizer, load_tokenizer
from anarchobot.tokenizers.tokenizer import digest as tokenizer_digest


@dataclass(frozen=True)
class PretrainedModel:
    """`weights` loads each parameter when it is accessed, in float32; a quantized matrix is three entries
    (model/quantization.py). `config` is the training configuration; for a Hugging Face model, only its model section is
    meaningful. Only `load_with_adapter` sets `adapter`."""

    folder: Path
    config: Config
    tokenizer: ChatTokenizer
    weights: Mapping[str, Array]
    compute_digest: Callable[[], str]
    warnings: list[str] = field(default_factory=list)
    adapter: Adapter | None = None

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def name(self) -> str:
        """The path of the folder, or ORG/NAME@COMMIT of a model from the Hub."""
        return model_name(self.folder)

    @cached_property
    def digest(self) -> str:
        """Two SHA-256 digests: of the weights, and of the model settings and the tokenizer. Compare them with
        `same_base`."""
        settings = self.model.model_dump(exclude={*WEIGHT_INDEPENDENT_KEYS, "quantization"}, exclude_defaults=True)
        others = json.dumps([settings, tokenizer_digest(self.tokenizer)], sort_keys=True)
        return f"{self.compute_digest()}:{hashlib.sha256(others.encode()).hexdigest()}"

    def dequantized(self) -> "PretrainedModel":
        """The model with all weights in float32 and a row for each token; with a warning, if some were quantized."""
        if self.model.quantization is None:
            return replace(self, weights=float_weights(self.weights, self.model))
        config = self.config.model_copy(update={"model": self.model.model_copy(update={"quantization": None})})
        warning = f"{self.folder}: weights of {describe(self.model.quantization)} are dequantized to float32"
        return replace(
            self, config=config, weights=float_weights(self.weights, self.model), warnings=[*self.warnings, warning]
        )


@lru_cache(maxsize=1)
def load_pretrained(path: str) -> PretrainedModel:
    """Raises UserError if there is no model, it is damaged, or it has an unsupported feature."""
    folder = resolve_model(path)
    if (folder / ADAPTER_CONFIG).is_file():
        raise _only_adapters(folder, ADAPTER_CONFIG)
    if (folder / "config.json").is_file():
        hf = load_hf_folder(folder)
        config, tokenizer = default_config(hf.model), load_tokenizer(hf.tokenizer.files[0])
        return PretrainedModel(folder, config, tokenizer, hf.weights, lambda: _digest(hf.files), hf.warnings)
    run = checkpoint.find(folder, files=(checkpoint.MODEL_FILE,), also_expected=OR_HUGGING_FACE)
    if run.config.lora.r is not None:
        raise _only_adapters(run.folder, f"lora.r: {run.config.lora.r}")
    tokenizer = load_run_tokenizer(run)
    if tokenizer.vocab_size != run.config.model.vocab_size:  # a larger id would read past the embedding
        raise UserError(
            f"{tokenizer.files[0]}: {tokenizer.vocab_size:,} tokens, but the model in {run.folder} has "
            f"{run.config.model.vocab_size:,} rows: put the tokenizer that it was trained with into the run folder"
        )
    shapes = parameter_shapes(run.config.model)
    checkpoint.check_parameters(run, shapes)
    return PretrainedModel(
        run.folder,
        run.config,
        tokenizer,
        LazyWeights(shapes, lambda name: checkpoint.load_parameter(run, name)),
        lambda: str(run.state["sha256"][checkpoint.MODEL_FILE]),
        list(run.skipped),
    )


def load_run_tokenizer(run: checkpoint.Checkpoint) -> ChatTokenizer:
    """Loads the tokenizer in the folder of a run. Raises UserError if state.json, except of early versions, says that
    the model was trained with another one."""
    tokenizer = load_tokenizer(run.folder.parent)
    expected = run.state.get("tokenizer")
    if expected is not None and (actual := tokenizer_digest(tokenizer)) != expected:
        raise UserError(
            f"{tokenizer.files[0]}: not the tokenizer that the model in {run.folder} was trained with (SHA-256 "
            f"{actual[:12]}…, expected {expected[:12]}…): put that one, and the files beside it, into "
            f"{run.folder.parent}"
        )
    return tokenizer


def load_with_adapter(path: str, base_model: str | None = None) -> PretrainedModel:
    """Like `load_pretrained`, but `path` may also be a run with lora.r (its best step), one of its steps, or an adapter
    folder of mlx-lm or PEFT: the result is their base model, with `adapter` to apply to it.

    The base is `base_model` or, by default, the one recorded with the adapters. A run's configuration, tokenizer and
    chat template are used. Raises UserError if there is no base, or the adapters are for another model.
    """
    folder = resolve_model(path)
    recorded = recorded_base(folder)
    if recorded is None:
        if base_model is not None:
            raise UserError(f"--model {base_model}: {path} is a whole model, which needs no base model: remove --model")
        return load_pretrained(path)
    if (name := base_model or recorded.model) is None:
        raise UserError(
            f"{recorded.where}: names no base model: pass the one that the adapters were trained on (--model)"
        )
    try:
        base = load_pretrained(name)
    except UserError as error:
        hint = (
            "" if base_model else f" (the base model, according to {recorded.where}; pass it with --model if it moved)"
        )
        raise UserError(f"{error}{hint}") from error
    adapter = read_adapter(folder, base.model)
    check_base(adapter, path, base.model, lambda: base.digest, base.name)
    config, tokenizer, warnings = base.config, base.tokenizer, list(base.warnings)
    run = folder.parent if recorded.saved is None else recorded.saved.folder.parent
    if recorded.saved is not None:
        config = recorded.saved.config.model_copy(update={"model": base.model, "lora": LoraConfig()})
    if recorded.saved is not None:
        tokenizer = load_run_tokenizer(recorded.saved)
    elif checkpoint.saved_steps(run):
        tokenizer = load_tokenizer(run)
    elif (folder / chat_template.FILE).is_file():
        warnings.append(f"{folder / chat_template.FILE}: not used: the chat template is that of {base.folder}")
    return replace(base, config=config, tokenizer=tokenizer, adapter=adapter, warnings=warnings)


def _only_adapters(folder: Path, evidence: str) -> UserError:
    return UserError(
        f"{folder}: adapters ({evidence}), not a whole model: fuse them with their model first: anarchobot fuse "
        f"--model MODEL --adapter {folder} --output NEW_FOLDER"
    )


def _digest(files: list[Path]) -> str:
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()
