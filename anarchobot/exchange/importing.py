"""A Hugging Face folder (Llama, Mistral, Qwen2, Qwen3): to be read, or as a run's folder with one checkpoint."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from anarchobot.config.strict_yaml import dump
from anarchobot.exchange import safetensors_file
from anarchobot.exchange.chat_format import save_foreign_template
from anarchobot.exchange.hf_config import from_hf
from anarchobot.exchange.dtypes import Float32
from anarchobot.storage.new_folder import NewFolder
from anarchobot.exchange.safetensors_file import Stored
from anarchobot.model.parameters import parameter_count, parameter_shapes
from anarchobot.runs import checkpoint
from anarchobot.tokenizers.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer

INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.model", "tokenizer.json", "vocab.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")  # a row a token


class ForeignModel(NamedTuple):
    """A Hugging Face folder's model in our terms. `weights` are read from its files as they are asked for."""

    kind: str
    model: ModelConfig
    tokenizer: Tokenizer
    weights: Mapping[str, Float32]
    files: list[Path]
    warnings: list[str]


def open_foreign(folder: Path) -> ForeignModel:
    """Raises UserError when a file is missing or damaged, or has what a model here can't be."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: expected config.json, safetensors files and a tokenizer in one")
    values = _json(folder / "config.json")
    try:
        model = from_hf(values, str(folder / "config.json"))
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder / 'config.json'}: not a model's config ({error})") from error
    tokenizer = _tokenizer(folder, model.vocab_size)
    stored = _stored(folder)
    biased = any(name.endswith(".self_attn.q_proj.bias") for name in stored)
    model = model.model_copy(update={"attention_bias": biased})
    warnings = []
    if tokenizer.vocab_size != model.vocab_size:
        warnings.append(
            f"the model has rows for {model.vocab_size:,} tokens and its tokenizer has {tokenizer.vocab_size:,}: the "
            "rows behind the last token are left out"
        )
    weights = _Weights(folder, stored, model, tokenizer.vocab_size)
    begins = values.get("bos_token_id")
    other = isinstance(begins, int) and 0 <= begins < tokenizer.vocab_size and begins != tokenizer.eod_id
    model = model.model_copy(update={"vocab_size": tokenizer.vocab_size, "bos_id": begins if other else None})
    files = sorted({tensor.path for tensor in stored.values()})
    return ForeignModel(values["model_type"], model, tokenizer, weights, files, warnings)


def import_model(folder: str | Path, output: str | Path) -> dict[str, Any]:
    """Writes the run folder `output` from the model in `folder`; returns what it is, and warnings.

    Raises UserError as `open_foreign`, before anything is written, and for a value that is not finite.
    """
    folder, output = Path(folder), Path(output)
    kind, model, tokenizer, weights, _, warnings = open_foreign(folder)
    params = dict(weights)
    with NewFolder(output) as beside:
        file_name = copy_tokenizer(tokenizer, beside)
        warnings = [*warnings, *save_foreign_template(tokenizer, beside)]
        config = Config(
            model=model,
            data=DataConfig(seq_len=min(DataConfig().seq_len, model.max_seq_len)),
            train=TrainConfig(save_dir=str(output), tokenizer_path=str(output / file_name)),
        )
        (beside / "config.yaml").write_text(dump(config.model_dump()), encoding="utf-8")
        arrays = {f"{checkpoint.PARAMS}{name}": array for name, array in params.items()}
        state = {"tokens": 0, "imported": str(folder), "config": config.model_dump()}
        checkpoint.save(beside, 0, arrays, state)
    return {
        "output": str(output),
        "architecture": kind,
        "parameters": parameter_count(model),
        "vocab_size": model.vocab_size,
        "max_seq_len": model.max_seq_len,
        "tokenizer": file_name,
        "warnings": warnings,
    }


def _tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer with as many tokens as the model has rows; else tokenizer.json, which has tokens added later."""
    there = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    found, problems = [], []
    for file in there:
        try:
            found.append(load_tokenizer(file))
        except UserError as error:  # such as a tokenizer.model that is tiktoken's
            problems.append(error)
            continue
        if found[-1].vocab_size == vocab_size:
            return found[-1]
    if not found:
        raise problems[0] if problems else UserError(f"{folder}: no tokenizer: expected one of {', '.join(TOKENIZERS)}")
    best = min(found, key=lambda tokenizer: tokenizer.files[0].name != "tokenizer.json")
    if best.vocab_size > vocab_size:
        raise UserError(
            f"{best.files[0]}: {best.vocab_size} tokens, and the model has rows for {vocab_size} (vocab_size in "
            "config.json): not of one model"
        )
    return best


def _stored(folder: Path) -> dict[str, Stored]:
    """All tensors of the folder's safetensors files, one or several."""
    if (folder / INDEX).is_file():
        places = _json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(p, str) and Path(p).name == p for p in places.values()):
            raise UserError(f"{folder / INDEX}: expected weight_map: the file of each tensor, by name")
        files = [folder / name for name in sorted(set(places.values()))]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise UserError(f"{folder / pickles[0]}: a pickle, which can run code: convert the model to safetensors")
        raise UserError(f"{folder}: no weights: expected model.safetensors, or {INDEX} and its files")
    stored: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing, and {INDEX} names it: copy the whole folder")
        stored |= safetensors_file.read(file)
    return stored


class _Weights(Mapping[str, Float32]):
    """Our parameters by name, `rows` of the embedding and the head; each is loaded when it is asked for."""

    def __init__(self, folder: Path, stored: dict[str, Stored], model: ModelConfig, rows: int) -> None:
        """Raises UserError for a tensor that is missing, of another shape, or that a model here has no place for: any
        but a bias of nothing but zeros."""
        blocks = len({name.split(".")[2] for name in stored if name.startswith("model.layers.")})
        if blocks != model.n_layers:  # first: the list of names of 200 million blocks would fill the memory
            raise UserError(
                f"{folder}: its safetensors files hold {blocks} blocks (model.layers.…), and config.json says "
                f"num_hidden_layers: {model.n_layers}"
            )
        shapes = parameter_shapes(model)
        for name, shape in shapes.items():
            if name not in stored:
                raise UserError(f"{folder}: {name} is in none of its safetensors files: config.json asks for it")
            if stored[name].shape != shape:
                raise UserError(
                    f"{stored[name].path}: {name} is {list(stored[name].shape)}, and config.json asks for {list(shape)}"
                )
        for name, tensor in stored.items():
            # A tied head is the embedding, whatever the file says; old files have the rotary frequencies.
            if name in shapes or name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
                continue
            if not name.endswith(".bias"):
                raise UserError(f"{tensor.path}: {name}: a model here has no such parameter")
            if tensor.load().any():
                raise UserError(
                    f"{tensor.path}: {name} is not zero: a model here has biases on queries, keys and values alone, so "
                    "it can't be carried"
                )
        self._stored, self._rows = {name: stored[name] for name in shapes}, rows

    def __getitem__(self, name: str) -> Float32:
        """Raises UserError when a value is not finite."""
        tensor = self._stored[name]
        array = tensor.load()
        if not np.isfinite(array).all():
            raise UserError(f"{tensor.path}: {name} holds a value that is not finite")
        return array[: self._rows] if name in _VOCABULARY else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file: expected a Hugging Face model's folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object")
    return values
