"""Exports a checkpoint for other programs: as a Hugging Face folder, an mlx-lm folder or a GGUF file."""

import json
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.schema import ModelConfig
from anarchobot.exchange import gguf_file, safetensors_file
from anarchobot.exchange.atomic_folder import atomic_folder
from anarchobot.exchange.chat_format import load_chat_format, stop_ids
from anarchobot.exchange.dtypes import Dtype
from anarchobot.exchange.model_card import model_card
from anarchobot.exchange.pretrained import load_run_tokenizer
from anarchobot.exchange.tokenizer_json import UNIGRAM_WARNING, find_mismatch, tokenizer_files
from anarchobot.model.architecture import ExportTarget, architecture
from anarchobot.model.parameters import parameter_count
from anarchobot.runs import checkpoint
from anarchobot.storage.free_space import require_space
from anarchobot.tokenizers.tokenizer import text_start


def export(path: str | Path, target: ExportTarget, output: str | Path, dtype: Dtype = "float32") -> dict[str, Any]:
    """Writes the checkpoint at `path` to the new or empty folder `output`; returns a summary with warnings.

    Raises UserError, before anything is written, if there is no checkpoint, `target` does not support the model or its
    tokenizer, or `output` is not empty.
    """
    saved = checkpoint.find(path, files=(checkpoint.MODEL_FILE,))
    model = saved.config.model
    arch = architecture(model.architecture)
    for problem in arch.unsupported_for_export(model, target):
        raise UserError(f"{saved.folder}: can't be exported to {target}: {problem}")
    tokenizer = load_run_tokenizer(saved)
    chat = load_chat_format(tokenizer)
    bos_id = next(iter(text_start(tokenizer, model.bos_id)), None)
    warnings = list(arch.export_warnings(model, target))
    if target == "gguf":
        gguf_file.gguf_package()
        fields = gguf_file.tokenizer_fields(tokenizer, bos_id, chat)
        files = {}
    else:
        files = tokenizer_files(tokenizer, model.max_seq_len, bos_id, chat)
        if json.loads(files["tokenizer.json"])["model"]["type"] == "Unigram":
            warnings.append(UNIGRAM_WARNING)
        if mismatch := find_mismatch(tokenizer, files["tokenizer.json"]):
            warnings.append(mismatch)
    arrays = checkpoint.load_arrays(saved, model, optimizer=False)
    prefix = checkpoint.PARAMS
    params = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    params = arch.export_parameters(params, model)
    name = saved.folder.resolve().parent.name
    itemsize = 4 if dtype == "float32" else 2
    require_space(Path(output), itemsize * sum(array.size for array in params.values()))
    with atomic_folder(Path(output)) as folder:
        if target == "gguf":
            gguf_file.write(folder / gguf_file.FILE_NAME, name, params, model, fields, dtype)
        else:
            metadata = {"format": "mlx" if target == "mlx" else "pt"}
            safetensors_file.write(folder / "model.safetensors", params, dtype, metadata)
            ends = stop_ids(tokenizer) if chat is None else chat.stop_ids
            files["config.json"] = _to_bytes(hf_config(model, bos_id, ends, dtype))
            files["generation_config.json"] = _to_bytes(_end_tokens(bos_id, ends))
        files["README.md"] = model_card(name, saved, target, dtype, tokenizer, chat, warnings).encode()
        for file_name, content in files.items():
            (folder / file_name).write_bytes(content)
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    return {
        "output": str(output),
        "format": target,
        "dtype": dtype,
        "step": saved.step,
        "parameters": parameter_count(model),
        "files": sizes,
        "warnings": [*saved.skipped, *warnings],
    }


def hf_config(model: ModelConfig, bos_id: int | None, stop_ids: list[int], dtype: Dtype) -> dict[str, Any]:
    """Returns the contents of config.json. `bos_id` starts a text, if any; each of `stop_ids` ends generation."""
    values = architecture(model.architecture).to_hf(model)
    return values | _end_tokens(bos_id, stop_ids) | {"torch_dtype": dtype}


def _end_tokens(bos_id: int | None, stop_ids: list[int]) -> dict[str, Any]:
    return {"bos_token_id": bos_id, "eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0]}


def _to_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
