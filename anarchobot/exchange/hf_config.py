"""The model section from and to Hugging Face's config.json, for any architecture (model/architecture.py)."""

from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.loading import config_from_dict
from anarchobot.config.schema import ModelConfig
from anarchobot.config.validation import conflicts
from anarchobot.exchange.dtypes import Dtype
from anarchobot.model.architecture import architecture, architecture_names


def to_hf(model: ModelConfig, bos_id: int, stop_ids: int | list[int], dtype: Dtype) -> dict[str, Any]:
    """config.json for a model that can be exported. `bos_id` starts a text; any of `stop_ids` ends generation."""
    values = architecture(model.architecture).to_hf(model)
    return values | {"bos_token_id": bos_id, "eos_token_id": stop_ids, "torch_dtype": dtype}


def from_hf(values: dict[str, Any], file: str) -> ModelConfig:
    """The model section for a config.json. Raises UserError, naming `file`, for a model type or a setting that is not
    supported."""
    kind = values.get("model_type")
    known = {model_type: name for name in architecture_names() for model_type in architecture(name).HF_MODEL_TYPES}
    if kind not in known:
        problem = f"unsupported model_type {kind!r}" if kind else "missing model_type"
        raise UserError(f"{file}: {problem}: expected one of {', '.join(known)}")
    fields = {"architecture": known[kind]} | architecture(known[kind]).from_hf(values, file)
    config = config_from_dict({"model": fields, "data": {"seq_len": 1}}, file)
    for _, problem in conflicts(config, []):
        raise UserError(f"{file}: {problem}")
    return config.model
