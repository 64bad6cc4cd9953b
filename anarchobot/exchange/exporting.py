"""A checkpoint as other programs take models: a Hugging Face folder, an mlx-lm folder, or a GGUF file."""

import json
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.exchange import gguf_file, safetensors_file
from anarchobot.exchange.chat_format import open_chat
from anarchobot.exchange.gguf_vocabulary import special_tokens, vocabulary
from anarchobot.exchange.hf_config import to_hf
from anarchobot.exchange.targets import Target, carried, limits
from anarchobot.exchange.model_card import model_card
from anarchobot.exchange.dtypes import Dtype
from anarchobot.storage.new_folder import NewFolder
from anarchobot.exchange.tokenizer_json import TIES, differences, tokenizer_files
from anarchobot.model.parameters import parameter_count
from anarchobot.runs import checkpoint
from anarchobot.tokenizers.tokenizer import Tokenizer, load_tokenizer


def export(path: str | Path, target: Target, output: str | Path, dtype: Dtype = "float32") -> dict[str, Any]:
    """Writes the folder `output` from the checkpoint at `path`; returns what was written, and warnings.

    Raises UserError, before anything is written, when there is no checkpoint, `target` can't carry the model or its
    tokenizer, or `output` holds something already.
    """
    found = checkpoint.find(path, files=(checkpoint.MODEL_FILE,))
    model = found.config.model
    for problem in limits(model, target):
        raise UserError(f"{found.folder}: can't be exported to {target}: {problem}")
    tokenizer = load_tokenizer(found.folder.parent)
    chat, eod_id = open_chat(tokenizer), tokenizer.eod_id
    bos_id = eod_id if model.bos_id is None else model.bos_id  # a text begins where another one ends, as in the shards
    notes: list[str] = []
    if target == "gguf":
        gguf_file.gguf_package()
        words = vocabulary(tokenizer)
        files = {}
    else:
        files = tokenizer_files(tokenizer, model.max_seq_len, bos_id, chat)
        notes += _notes(tokenizer, files["tokenizer.json"])
    arrays = checkpoint.load_arrays(found, model, optimizer=False)
    prefix = checkpoint.PARAMS
    params = carried({n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}, model)
    name = found.folder.resolve().parent.name
    with NewFolder(Path(output)) as folder:
        if target == "gguf":
            gguf_path = folder / gguf_file.FILE_NAME
            gguf_file.write(gguf_path, name, params, model, words, special_tokens(tokenizer, bos_id, chat), dtype)
        else:
            metadata = {"format": "mlx" if target == "mlx" else "pt"}
            safetensors_file.write(folder / "model.safetensors", params, dtype, metadata)
            ends = chat.ends if chat is not None and len(chat.ends) > 1 else eod_id
            files["config.json"] = _dumped(to_hf(model, bos_id, ends, dtype))
            files["generation_config.json"] = _dumped({"bos_token_id": bos_id, "eos_token_id": ends})
        files["README.md"] = model_card(name, found, target, dtype, tokenizer, chat, notes).encode()
        for file_name, content in files.items():
            (folder / file_name).write_bytes(content)
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    return {
        "output": str(output),
        "format": target,
        "dtype": dtype,
        "step": found.step,
        "parameters": parameter_count(model),
        "files": sizes,
        "warnings": [*found.skipped, *notes],
    }


def _notes(tokenizer: Tokenizer, written: bytes) -> list[str]:
    """What is to be said of a tokenizer.json."""
    notes = [TIES] if json.loads(written)["model"]["type"] == "Unigram" else []
    differs = differences(tokenizer, written)
    return [*notes, differs] if differs else notes


def _dumped(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
