"""Exports a checkpoint for other programs: as a Hugging Face folder, an mlx-lm folder or a GGUF file."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from anarchobot.config.errors import UserError
from anarchobot.config.paths import model_name_of
from anarchobot.config.schema import ModelConfig
from anarchobot.exchange import gguf_file, gguf_types, ollama
from anarchobot.exchange.atomic_folder import atomic_folder
from anarchobot.exchange.chat_format import load_chat_format, stop_ids
from anarchobot.exchange.dtypes import Dtype, Float32
from anarchobot.exchange.mlx_quantization import MlxQuantization
from anarchobot.exchange.model_card import model_card
from anarchobot.exchange.pretrained import PretrainedModel, load_pretrained, load_run_tokenizer
from anarchobot.exchange.stored_weights import Weights, approximate_bits, weights_in_gguf, write_safetensors
from anarchobot.exchange.tokenizer_json import UNIGRAM_WARNING, find_mismatch, tokenizer_files
from anarchobot.model.architecture import ExportTarget, architecture
from anarchobot.model.parameters import parameter_count
from anarchobot.model.quantization import Array
from anarchobot.runs import checkpoint
from anarchobot.storage.free_space import require_space
from anarchobot.tokenizers.tokenizer import text_start

Program = Literal["hf", "mlx", "gguf", "ollama", "lmstudio"]
FORMATS: dict[Program, ExportTarget] = {
    "hf": "hf", "mlx": "mlx", "gguf": "gguf", "ollama": "gguf", "lmstudio": "gguf"
}  # fmt: skip


class HeldOut(NamedTuple):
    """Text that was not trained on: `bits_per_byte` is the loss of a model on it. `name` describes it."""

    name: str
    bits_per_byte: Callable[[PretrainedModel], float]


def export(
    path: str | Path,
    program: Program,
    output: str | Path,
    dtype: Dtype = "float32",
    *,
    quantization: MlxQuantization | None = None,
    gguf_type: str | None = None,
    held_out: HeldOut | None = None,
) -> dict[str, Any]:
    """Writes the checkpoint at `path` for `program` to the new or empty folder `output`; returns a summary with
    warnings.

    `quantization` is for program mlx. `gguf_type` is one of gguf_types.TYPES; by default, that of `dtype`. With
    `held_out`, the loss of the model is measured before and after.

    Raises UserError, before anything is written, if there is no checkpoint, the format does not support the model or
    its tokenizer, or `output` is not empty.
    """
    saved = checkpoint.find(path, files=(checkpoint.MODEL_FILE,))
    model, target = saved.config.model, FORMATS[program]
    arch = architecture(model.architecture)
    for problem in arch.unsupported_for_export(model, target):
        raise UserError(f"{saved.folder}: can't be exported to {target}: {problem}")
    if quantization is not None and model.architecture == "mlx_lm":
        raise UserError(
            f"{saved.folder}: can't be quantized: model.architecture: mlx_lm: export it without --bits, and quantize "
            "the folder with mlx_lm.convert"
        )
    tokenizer = load_run_tokenizer(saved)
    chat = load_chat_format(tokenizer)
    bos_id = next(iter(text_start(tokenizer, model.bos_id)), None)
    warnings = list(arch.export_warnings(model, target))
    model = model.model_copy(update={"max_seq_len": arch.exported_length(model, target)})
    if target == "gguf":
        gguf_file.gguf_package()
        gguf_type = gguf_type or gguf_types.DTYPES[dtype]
        if gguf_type in gguf_types.K_QUANTS:
            gguf_types.llama_cpp()
        fields = gguf_file.tokenizer_fields(tokenizer, bos_id, chat)
        gguf_name = f"{Path(output).name}-{gguf_type}.gguf" if program == "lmstudio" else gguf_file.FILE_NAME
        files = {}
        if program == "ollama":
            text, differences = ollama.modelfile(
                gguf_name, tokenizer, chat, saved.config.model_copy(update={"model": model})
            )
            files[ollama.FILE] = text.encode()
            warnings += differences
    else:
        files = tokenizer_files(tokenizer, model.max_seq_len, bos_id, chat)
        if json.loads(files["tokenizer.json"])["model"]["type"] == "Unigram":
            warnings.append(UNIGRAM_WARNING)
        if mismatch := find_mismatch(tokenizer, files["tokenizer.json"]):
            warnings.append(mismatch)
    params = _load_parameters(saved)
    name = model_name_of(saved.folder)
    bits = approximate_bits(gguf_type or gguf_types.DTYPES[dtype], quantization)
    require_space(Path(output), bits * sum(array.size for array in params.values()) // 8)
    with atomic_folder(Path(output)) as folder:
        if gguf_type is not None:
            gguf_file.write(folder / gguf_name, name, params, model, fields, gguf_type)
            weights = weights_in_gguf(folder / gguf_name, params, gguf_type)
        else:
            weights = write_safetensors(folder, params, target, dtype, quantization, model.n_layers)
            ends = stop_ids(tokenizer) if chat is None else chat.stop_ids
            files["config.json"] = _to_bytes(hf_config(model, bos_id, ends, dtype) | weights.config)
            files["generation_config.json"] = _to_bytes(_end_tokens(bos_id, ends))
        for file_name, content in files.items():
            (folder / file_name).write_bytes(content)
        del params  # frees them before the model is computed
        warnings += weights.warnings
        losses = None if held_out is None else _measure(saved, folder, held_out)
        card = model_card(
            name, saved, program, target, weights.precision, tokenizer, chat, warnings, _stored(weights, losses)
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    return {
        "output": str(output),
        "format": program,
        "dtype": weights.precision,
        "bits_per_weight": weights.bits_per_weight,
        "types": weights.types,
        "bits_per_byte": losses,
        "step": saved.step,
        "parameters": parameter_count(model),
        "files": sizes,
        "warnings": [*saved.skipped, *warnings],
    }


def _load_parameters(saved: checkpoint.Checkpoint) -> dict[str, Float32]:
    """The parameters in the form that other libraries expect."""
    model, prefix = saved.config.model, checkpoint.PARAMS
    arrays = checkpoint.load_arrays(saved, model, optimizer=False)
    params = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return architecture(model.architecture).export_parameters(params, model)


def _measure(saved: checkpoint.Checkpoint, folder: Path, held_out: HeldOut) -> dict[str, Any]:
    """The loss of the checkpoint and of the exported model in `folder`."""
    original = load_pretrained(str(saved.folder))
    if files := list(folder.glob("*.gguf")):
        model = original.model.model_copy(update={"embedding_scale": None})  # multiplied into the embedding
        weights: Mapping[str, Array] = gguf_file.read_parameters(files[0], original.model)
    else:
        read = load_pretrained(str(folder))
        model, weights = read.model.model_copy(update={"bos_id": original.model.bos_id}), read.weights
    exported = replace(original, config=original.config.model_copy(update={"model": model}), weights=weights)
    before, after = (held_out.bits_per_byte(version) for version in (original, exported))
    return {"text": held_out.name, "before": before, "after": after}


def _stored(weights: Weights, losses: dict[str, Any] | None) -> dict[str, str]:
    """Rows of the model card."""
    rows = {"bits per weight": f"{weights.bits_per_weight:.2f}"}
    if weights.types:
        rows["types"] = ", ".join(f"{count} {kind}" for kind, count in weights.types.items())
    if losses is not None:
        rows[f"bits per byte of the checkpoint, on {losses['text']}"] = f"{losses['before']:.4f}"
        rows[f"bits per byte of these files, on {losses['text']}"] = f"{losses['after']:.4f}"
    return rows


def hf_config(model: ModelConfig, bos_id: int | None, stop_ids: list[int], dtype: Dtype) -> dict[str, Any]:
    """Returns the contents of config.json. `bos_id` starts a text, if any; each of `stop_ids` ends generation."""
    values = architecture(model.architecture).to_hf(model)
    return values | _end_tokens(bos_id, stop_ids) | {"torch_dtype": dtype}


def _end_tokens(bos_id: int | None, stop_ids: list[int]) -> dict[str, Any]:
    return {"bos_token_id": bos_id, "eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0]}


def _to_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
