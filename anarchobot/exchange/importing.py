"""Reads Hugging Face model folders (Llama, Mistral, Qwen2, Qwen3) and imports them as run folders."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.loading import config_from_dict
from anarchobot.config.schema import Config, DataConfig, ModelConfig
from anarchobot.config.validation import conflicts
from anarchobot.exchange import safetensors_file
from anarchobot.exchange.atomic_folder import atomic_folder
from anarchobot.exchange.chat_format import copy_chat_template
from anarchobot.exchange.dtypes import Float32
from anarchobot.exchange.hub import model_name, resolve_model
from anarchobot.exchange.safetensors_file import StoredTensor
from anarchobot.model.architecture import Shape, TensorSource, architecture, architecture_names
from anarchobot.model.parameters import parameter_count, parameter_shapes
from anarchobot.model.quantization import Array, Dequantized, Packing, find_packing, parts_of, to_setting
from anarchobot.runs.write_model import write_model
from anarchobot.tokenizers.tokenizer import ChatTokenizer, load_tokenizer

INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class HFModel(NamedTuple):
    """The contents of a Hugging Face folder. `weights` loads each tensor when it is accessed, in float32; a quantized
    matrix is three entries (model/quantization.py). An embedding may have more rows than there are tokens."""

    architecture: str
    model: ModelConfig
    tokenizer: ChatTokenizer
    weights: Mapping[str, Array]
    files: list[Path]
    warnings: list[str]


def load_hf_folder(folder: Path) -> HFModel:
    """Reads the folder with an own architecture or, where they do not support the model, with mlx-lm. Raises UserError
    if a file is missing or damaged, or neither supports the model."""
    try:
        found = _load_own(folder)
    except UserError as error:
        if (other := _load_with_mlx_lm(folder, str(error))) is None:
            raise
        found = other
    if len(start := found.tokenizer.start_ids() or []) > 1:
        found.warnings.append(f"a text starts with {len(start)} tokens in transformers: here only with the last")
    return found


def _load_with_mlx_lm(folder: Path, reason: str) -> HFModel | None:
    """None if mlx-lm has no such model, or one of an own architecture does not fit it either. `reason`: why no own
    architecture supports it."""
    if not (folder / "config.json").is_file():
        return None
    from anarchobot.model.mlx_lm import architecture as mlx_lm
    from anarchobot.model.mlx_lm.folder import FolderWeights

    values, own = read_json(folder / "config.json"), architecture("llama").HF_MODEL_TYPES
    if values.get("model_file") is not None:
        raise UserError(f"{folder / 'config.json'}: model_file: {values['model_file']}: code of a model is never run")
    if not mlx_lm.supports(values):
        if isinstance(values.get("model_type"), str) and values["model_type"] not in own:
            raise UserError(f"{reason}; mlx-lm has no such model either")
        return None
    stored = _stored_tensors(folder, any_dtype=True)
    for file in folder.glob("model*.safetensors"):  # mlx-lm reads all of them, also those that the index does not list
        safetensors_file.read(file, any_dtype=True)
    _check_scales(stored)
    files = sorted({tensor.path for tensor in stored.values()})
    try:
        fields = mlx_lm.from_hf(values, str(folder / "config.json"), len(stored))
        weights = FolderWeights(folder)
        model = weights.note(ModelConfig(architecture="mlx_lm", **fields))
    except UserError:
        if values["model_type"] in own:
            return None
        raise
    tokenizer = _load_tokenizer(folder, model.vocab_size)
    # The module keeps rows without a token; they are not sampled.
    model = model.model_copy(update={"vocab_size": tokenizer.vocab_size, "bos_id": _bos_id(tokenizer, values)})
    warnings = mlx_lm.describe_support(values, model, reason.removeprefix(f"{folder / 'config.json'}: "))
    return HFModel(values["model_type"], model, tokenizer, cast("Mapping[str, Array]", weights), files, warnings)


def _load_own(folder: Path) -> HFModel:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: expected config.json, safetensors files and a tokenizer in it")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file: expected a Hugging Face model folder")
    values = read_json(file)
    try:
        model = model_config_from_hf(values, str(file))
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{file}: not a model config ({error})") from error
    tokenizer = _load_tokenizer(folder, model.vocab_size)
    everything = _stored_tensors(folder)
    stored = _language_model(everything)
    model = model.model_copy(update=architecture(model.architecture).infer_from_weights(stored))
    warnings = []
    if len(stored) < len(everything):
        warnings.append(f"dropping {len(everything) - len(stored)} tensors for images, which are not supported")
    if tokenizer.vocab_size != model.vocab_size:
        warnings.append(
            f"embedding rows without a token: the model has {model.vocab_size:,} rows, its tokenizer "
            f"{tokenizer.vocab_size:,} tokens: the rest is never generated, and dropped unless the weights stay frozen"
        )
    _check_blocks(folder, stored, model)
    sources = architecture(model.architecture).tensor_sources(model, values["model_type"])
    packings = _check_tensors(folder, stored, sources, model)
    entries: dict[str, TensorSource] = {}
    for name, source in sources.items():
        entries[name] = source
        if name in packings:
            entries |= {
                part: TensorSource(stored_part, source.rows)
                for part, stored_part in zip(parts_of(name)[1:], parts_of(source.name)[1:], strict=True)
            }

    def load(name: str) -> Array:
        return _load_entry(stored[entries[name].name], entries[name], packings.get(name))

    weights = LazyWeights(entries, load)
    quantization = to_setting(packings, model)
    model = model.model_copy(
        update={
            "vocab_size": tokenizer.vocab_size, "bos_id": _bos_id(tokenizer, values), "quantization": quantization,
        }
    )  # fmt: skip
    files = sorted({tensor.path for tensor in stored.values()})
    return HFModel(values["model_type"], model, tokenizer, weights, files, warnings)


def model_config_from_hf(values: dict[str, Any], file: str) -> ModelConfig:
    """Converts the contents of a config.json. Raises UserError for an unsupported model type or setting."""
    model_type = values.get("model_type")
    names = {model_type: name for name in architecture_names() for model_type in architecture(name).HF_MODEL_TYPES}
    if model_type not in names:
        problem = f"unsupported model_type {model_type!r}" if model_type else "missing model_type"
        raise UserError(f"{file}: {problem}: expected one of {', '.join(names)}")
    name = names[model_type]
    fields = {"architecture": name} | architecture(name).from_hf(values, file)
    config = config_from_dict({"model": fields, "data": {"seq_len": 1}}, file)
    for _, problem in conflicts(config, []):
        raise UserError(f"{file}: {problem}")
    return config.model


def import_model(folder: str | Path, output: str | Path) -> dict[str, Any]:
    """Writes the Hugging Face model in `folder` as the run folder `output`; returns a summary with warnings.

    `folder` may be a name on the Hub.

    Raises UserError like `load_hf_folder`, and if a value is not finite. In both cases nothing is written.
    """
    folder, output = resolve_model(folder), Path(output)
    source = load_hf_folder(folder)
    weights = dict(float_weights(source.weights, source.model))
    with atomic_folder(output) as temporary:
        config = default_config(source.model.model_copy(update={"quantization": None}))
        config = write_model(temporary, config, source.tokenizer, weights, {"imported": model_name(folder)}, output)
        warnings = [*source.warnings, *copy_chat_template(source.tokenizer, temporary)]
        if source.model.quantization is not None:
            warnings.append("quantized weights were dequantized to float32; every command also reads the folder itself")
    assert config.train.tokenizer_path is not None
    return {
        "output": str(output),
        "architecture": source.architecture,
        "parameters": parameter_count(source.model),
        "vocab_size": source.model.vocab_size,
        "max_seq_len": source.model.max_seq_len,
        "tokenizer": Path(config.train.tokenizer_path).name,
        "warnings": warnings,
    }


def float_weights(weights: Mapping[str, Array], model: ModelConfig) -> Mapping[str, Float32]:
    """All parameters in float32, converted when they are accessed; an embedding without rows that have no token."""
    if model.architecture == "mlx_lm":
        from anarchobot.model.mlx_lm import frozen

        return frozen.Dequantized(weights, model)
    arrays, shapes = Dequantized(weights), parameter_shapes(model)
    return LazyWeights(shapes, lambda name: arrays[name][: shapes[name][0]])


def default_config(model: ModelConfig) -> Config:
    """Default settings, with data.seq_len limited to the model's max_seq_len."""
    return Config(model=model, data=DataConfig(seq_len=min(DataConfig().seq_len, model.max_seq_len)))


def _bos_id(tokenizer: ChatTokenizer, config: dict[str, Any]) -> int | None:
    """The token that transformers puts before a text: -1 for none, None for the end of a document. If the tokenizer's
    files don't say, bos_token_id of config.json."""
    start, bos = tokenizer.start_ids(), config.get("bos_token_id")
    if start is None:
        return bos if type(bos) is int and 0 <= bos < tokenizer.vocab_size and bos != tokenizer.eod_id else None
    if not start:
        return -1
    return start[-1] if start[-1] != tokenizer.eod_id else None


def _load_tokenizer(folder: Path, vocab_size: int) -> ChatTokenizer:
    """Prefers the tokenizer with as many tokens as the model has rows, then tokenizer.json, as transformers does."""
    files = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    tokenizers, errors = [], []
    for file in files:
        try:
            tokenizers.append(load_tokenizer(file))
        except UserError as error:  # for example a tokenizer.model in tiktoken's format
            errors.append(error)
            continue
        if tokenizers[-1].vocab_size == vocab_size:
            return tokenizers[-1]
    if not tokenizers:
        raise errors[0] if errors else UserError(f"{folder}: no tokenizer: expected one of {', '.join(TOKENIZERS)}")
    best = min(tokenizers, key=lambda tokenizer: tokenizer.files[0].name != "tokenizer.json")
    if best.vocab_size > vocab_size:
        raise UserError(
            f"{best.files[0]}: {best.vocab_size} tokens, but the model has {vocab_size} rows (vocab_size in "
            "config.json): use the tokenizer of this model"
        )
    return best


def _stored_tensors(folder: Path, any_dtype: bool = False) -> dict[str, StoredTensor]:
    """Returns the tensors of all safetensors files in the folder. `any_dtype`: also those that only mlx-lm reads."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in weight_map.values()
        ):
            raise UserError(f"{folder / INDEX}: expected weight_map, a mapping from tensor names to file names")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise UserError(f"{folder / pickles[0]}: a pickle, which can run code: convert the model to safetensors")
        raise UserError(f"{folder}: no weights: expected model.safetensors, or {INDEX} and its files")
    stored: dict[str, StoredTensor] = {}
    for file in files:
        if not _is_file(file):
            raise UserError(f"{file}: missing, but listed in {INDEX}: copy the whole folder")
        stored |= safetensors_file.read(file, any_dtype)
    return stored


def _check_scales(stored: dict[str, StoredTensor]) -> None:
    """Raises UserError for scales that don't fit their quantized matrix: mlx-lm infers a group size from them, and MLX
    ends the process for one of zero."""
    for name, scales in stored.items():
        weight = stored.get(f"{name.removesuffix('scales')}weight") if name.endswith(".scales") else None
        if weight is not None and not (
            scales.shape[:-1] == weight.shape[:-1] and 0 < scales.shape[-1] <= weight.shape[-1]
        ):
            raise UserError(f"{scales.path}: {name} {list(scales.shape)} does not fit its matrix {list(weight.shape)}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


def _language_model(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns the tensors of the language model, by their names in a model without images (Gemma 3)."""
    prefix = "language_model."
    found = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    return found or stored


class LazyWeights(Mapping[str, Array]):
    """Parameters by name; each is loaded when it is accessed."""

    def __init__(self, names: Iterable[str], load: Callable[[str], Array]) -> None:
        self._names, self._load = dict.fromkeys(names), load

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_blocks(folder: Path, stored: dict[str, StoredTensor], model: ModelConfig) -> None:
    """Compares the number of blocks before their names are built: those of 200 million would fill the memory."""
    blocks = len({name.split(".")[2] for name in stored if name.startswith("model.layers.")})
    if blocks != model.n_layers:
        raise UserError(
            f"{folder}: the safetensors files have {blocks} blocks (model.layers.…), but config.json says "
            f"num_hidden_layers: {model.n_layers}"
        )


def _check_tensors(
    folder: Path, stored: dict[str, StoredTensor], sources: dict[str, TensorSource], model: ModelConfig
) -> dict[str, Packing]:
    """Returns how the quantized parameters are quantized. Raises UserError if a tensor is missing, has the wrong shape,
    or is unknown and not a bias of zeros."""
    shapes: dict[str, Shape] = {}  # of the stored tensors
    for param, shape in parameter_shapes(model).items():
        name, part, _ = sources[param]
        shapes[name] = shape if part is None else (max(part[1], *shapes.get(name, (0,))[:1]), *shape[1:])
    packings: dict[str, Packing] = {}
    known = set(parts_of("lm_head.weight"))  # a tied head is the embedding: a stored one is ignored
    for name, shape in shapes.items():
        if name not in stored:
            raise UserError(f"{folder}: {name} is missing from the safetensors files: config.json requires it")
        known.add(name)
        if parts_of(name)[1] in stored:
            packings[name] = _packing(stored, name, shape)
            known |= set(parts_of(name))
        elif stored[name].code == "U32":
            raise UserError(f"{stored[name].path}: {name}: quantized, but there is no {parts_of(name)[1]}")
        elif stored[name].shape != shape:
            raise UserError(
                f"{stored[name].path}: {name} has shape {list(stored[name].shape)}, but config.json requires "
                f"{list(shape)}"
            )
    for name, tensor in stored.items():
        if name in known or name.endswith("rotary_emb.inv_freq"):  # old files include the rotary frequencies
            continue
        if not name.endswith(".bias"):
            raise UserError(f"{tensor.path}: {name}: unsupported parameter")
        if tensor.load().any():
            raise UserError(f"{tensor.path}: {name} is not zero: biases are supported only on queries, keys and values")
    return {name: packings[source.name] for name, source in sources.items() if source.name in packings}


def _packing(stored: dict[str, StoredTensor], name: str, shape: Shape) -> Packing:
    """How the stored matrix `name` of this shape is quantized, by the shapes of its parts."""
    parts = [stored[part] for part in parts_of(name) if part in stored]
    shapes, are_integers = [part.shape for part in parts], [part.code == "U32" for part in parts]
    packing = find_packing(shape, *shapes[:2])
    if packing is None or shapes[2:] != shapes[1:2] or are_integers != [True, False, False]:
        found = ", ".join(f"{part.code} {list(part.shape)}" for part in parts)
        raise UserError(
            f"{parts[0].path}: {name}: expected the weight, scales and biases of a quantized matrix {list(shape)}, got "
            f"{found}"
        )
    return packing


def _load_entry(tensor: StoredTensor, source: TensorSource, packing: Packing | None) -> Array:
    """Loads an entry of the weights: `packing` is that of a quantized matrix's integers."""
    if packing is not None:
        array = tensor.load_stored()
        array = array.reshape(len(array), -1, packing.bits)
    else:
        array = tensor.load()
        if not np.isfinite(array).all():
            raise UserError(f"{tensor.path}: {source.name} contains a value that is not finite")
    if source.rows is not None:
        array = array[slice(*source.rows)].copy()
    if source.offset:
        array += np.float32(source.offset)
    return array


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: can't be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object")
    return values
