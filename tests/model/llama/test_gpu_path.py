"""The code of a GPU, run on the CPU: MLX's fused attention and loss with hand-written gradients, whole steps."""

from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import ModelConfig, Technique
from anarchobot.model.llama.attention import BlockedAttention
from anarchobot.model.llama.fused_attention import FusedTrainingAttention
from anarchobot.model.llama.gradients import loss_and_gradients
from anarchobot.model.parameters import init_parameters
from anarchobot.model.step_options import MicroBatch, StepOptions
from anarchobot.numerics.device import gpu_path
from tests.model.llama.test_forward import SHAPES, as_mlx, parameters, tiny

WINDOWS = {  # longer than a block, and of a head width that the kernel takes
    "long windows": {"n_kv_heads": 2, "sliding_window": 30},
    "kernel's heads": {"head_dim": 64, "sliding_window": 41, "rope_scaling": {"type": "linear", "factor": 2.0}},
}
DOCUMENTS = np.stack([np.repeat(np.arange(4), 16), np.repeat([0, 1], 32)]).astype(np.int32)
Segments = Literal["one document", "documents"]


def gradients(
    model: ModelConfig, params: dict[str, mx.array], segments: Segments, dtype: mx.Dtype, **options: Any
) -> dict[str, mx.array]:
    """Of two rows of 64 tokens, with the loss under "loss"."""
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (2, 65)).astype(np.int32)
    targets = tokens[:, 1:].copy()
    targets[0, :5] = -1
    documents = mx.array(DOCUMENTS) if segments == "documents" else None
    batch = MicroBatch(mx.array(tokens[:, :-1]), mx.array(targets), mx.array(1 / 128), documents)
    settings = StepOptions(**{"attention_block": 24, "loss_chunk": 48, **options})
    loss, grads = loss_and_gradients(params, batch, model, dtype=dtype, options=settings)
    mx.eval(loss, grads)
    return {**grads, "loss": loss}


def largest_error(actual: dict[str, mx.array], expected: dict[str, mx.array]) -> float:
    """Relative to the norm of each parameter's gradient."""
    assert actual.keys() == expected.keys()
    return max(
        float(mx.linalg.norm((actual[name] - expected[name]).reshape(-1)) / mx.linalg.norm(expected[name].reshape(-1)))
        for name in expected
    )


@pytest.mark.parametrize("technique", ["fused", "sdpa"])
@pytest.mark.parametrize("segments", ["one document", "documents"])
@pytest.mark.parametrize("shape", [*SHAPES, *WINDOWS])
def test_gradients_equal_those_of_the_cpu_path(shape: str, segments: Segments, technique: Technique) -> None:
    """Which are tested against finite differences. tiny's heads are narrower than those of Metal's kernel."""
    model = tiny(**{**SHAPES, **WINDOWS}[shape])  # type: ignore[arg-type]
    params = as_mlx(parameters(model))
    expected = gradients(model, params, segments, mx.float32)
    with gpu_path():
        for recompute in (False, True):
            actual = gradients(model, params, segments, mx.float32, technique=technique, recompute=recompute)
            assert largest_error(actual, expected) < 8e-6  # 5e-6 with a fast BLAS, which rounds less


@pytest.mark.parametrize("technique", ["fused", "sdpa"])
@pytest.mark.parametrize("heads", [{"n_heads": 2}, {"n_heads": 4, "n_kv_heads": 2, "head_dim": 64}])
def test_gradients_of_heads_that_metals_kernel_takes(heads: dict[str, int], technique: Technique) -> None:
    """All queries at once."""
    model = tiny(d_model=128, **heads)
    params = as_mlx(init_parameters(model, 0))
    expected = gradients(model, params, "one document", mx.float32)
    with gpu_path():
        actual = gradients(model, params, "one document", mx.float32, technique=technique)
    assert largest_error(actual, expected) < 5e-6


@pytest.mark.parametrize("technique", ["fused", "sdpa"])
def test_a_steps_bfloat16_gradients_are_as_accurate_as_on_the_cpu_path(technique: Technique) -> None:
    model = tiny(d_model=128, n_heads=2, vocab_size=512)
    params = as_mlx(init_parameters(model, 0))
    exact = gradients(model, params, "one document", mx.float32)
    cpu = largest_error(gradients(model, params, "one document", mx.bfloat16), exact)
    with gpu_path():
        gpu = largest_error(gradients(model, params, "one document", mx.bfloat16, technique=technique), exact)
    assert gpu < 1.1 * cpu < 0.02


@pytest.mark.parametrize("kernel_gradient", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attentions_bfloat16_gradients_have_an_error_of_three_quarters_of_a_percent(
    kv_heads: int, kernel_gradient: bool
) -> None:
    """Of normally distributed queries, keys and values; bfloat16's rounding is 0.4 percent."""
    model = tiny(d_model=256, n_heads=4, n_kv_heads=kv_heads, max_seq_len=512)
    mx.random.seed(0)
    q, k, v, dout = (mx.random.normal((2 * 256, heads * 64)) for heads in (4, kv_heads, kv_heads, 4))

    def attention_gradients(
        attention: BlockedAttention | FusedTrainingAttention, dtype: mx.Dtype
    ) -> tuple[mx.array, mx.array, mx.array]:
        inputs = [x.astype(dtype) for x in (q, k, v)]
        attended = attention.forward(inputs[0], inputs[1], inputs[2], None)
        return attention.backward(inputs[0], inputs[1], inputs[2], None, attended, dout.astype(dtype))[:3]

    expected = attention_gradients(BlockedAttention(model, 2, 256), mx.float32)
    for dtype, bound in ((mx.float32, 5e-6), (mx.bfloat16, 0.0079 if kernel_gradient else 0.0076)):
        fused = FusedTrainingAttention(model, 2, 256, dtype, block=96, kernel_gradient=kernel_gradient)
        for actual, truth in zip(attention_gradients(fused, dtype), expected, strict=True):
            assert float(mx.linalg.norm(actual - truth) / mx.linalg.norm(truth)) < bound
