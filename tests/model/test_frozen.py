"""Memory of weights that are read for inference."""

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import ModelConfig
from anarchobot.model.frozen import inference_weights

COUNT, ELEMENTS = 16, 2**18


class Weights(Mapping[str, Any]):
    """Made when they are read, as those of a file."""

    def __getitem__(self, name: str) -> Any:
        return np.full(ELEMENTS, float(name), np.float32)

    def __iter__(self) -> Iterator[str]:
        return map(str, range(COUNT))

    def __len__(self) -> int:
        return COUNT


@pytest.mark.usefixtures("without_garbage")
def test_one_float32_weight_is_in_memory_at_a_time() -> None:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    params = inference_weights(Weights(), ModelConfig(vocab_size=16, n_layers=1, d_model=8, n_heads=1), mx.bfloat16)
    assert mx.get_peak_memory() - before < 2 * COUNT * ELEMENTS + 3 * 4 * ELEMENTS
    assert [params[str(i)][0].item() for i in range(COUNT)] == list(range(COUNT))
