"""Run folders with random weights, large enough that greedy decoding has no near ties."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import Config, DataConfig, ModelConfig
from anarchobot.config.strict_yaml import dump
from anarchobot.model.llama.forward import hidden_states
from anarchobot.model.loss import logits
from anarchobot.model.parameters import parameter_shapes
from anarchobot.runs import checkpoint
from anarchobot.tokenizers.tokenizer import copy_tokenizer, load_tokenizer

ROOT = Path(__file__).parents[2]
STORIES = Path("artifacts") / "stories260K"


def random_parameters(model: ModelConfig, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * 0.08 + (len(shape) == 1)).astype(np.float32)
        for name, shape in parameter_shapes(model).items()
    }


def make_run(folder: Path, tokenizer: Path, params: dict[str, Any] | None = None, **shape: Any) -> Path:
    """Writes a run folder with a checkpoint of step 40; the vocabulary size is the tokenizer's."""
    loaded = load_tokenizer(tokenizer)
    small = {"n_layers": 2, "d_model": 48, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 1024, "mlp_multiple": 2.5}
    model = ModelConfig(**{"vocab_size": loaded.vocab_size, **small, **shape})
    config = Config(model=model, data=DataConfig(seq_len=512))
    folder.mkdir(parents=True)
    copy_tokenizer(loaded, folder)
    (folder / "config.yaml").write_text(dump(config.model_dump()))
    arrays = {f"params/{name}": array for name, array in (params or random_parameters(model)).items()}
    state = {"tokens": 1234567, "loss": 2.5, "best_val_loss": 2.25, "best_val_bpb": 1.125, "wall_seconds": 3600.0}
    checkpoint.save(folder, 40, arrays, {**state, "shards": ["d" * 64], "config": config.model_dump()})
    return folder


def our_logits(run: Path, ids: list[int]) -> npt.NDArray[np.float32]:
    """Returns [L, V] for one sequence, computed by our forward pass."""
    found = checkpoint.find(run)
    arrays = checkpoint.load_arrays(found, found.config.model, optimizer=False)
    params = {n.removeprefix("params/"): mx.array(a) for n, a in arrays.items() if n.startswith("params/")}
    hidden = hidden_states(params, mx.array([ids]), found.config.model)
    return np.array(logits(hidden, params, found.config.model))[0]


def real_ids(run: Path, count: int = 1000) -> list[int]:
    """Ids of real text after an end-of-document token."""
    tokenizer = load_tokenizer(run)
    text = (ROOT / "README.md").read_text(encoding="utf-8") * 3
    return [tokenizer.eod_id, *tokenizer.encode_batch([text])[0].tolist()][:count]
