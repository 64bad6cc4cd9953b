"""Peak FLOP/s of known devices, and training FLOPs per token."""

import json

import pytest

from anarchobot.config.schema import ModelConfig
from anarchobot.model.parameters import parameter_shapes
from anarchobot.system.peak_flops import parse_gpu_cores, peak_tflops, training_flops_per_token


@pytest.mark.parametrize(
    ("name", "cores", "published"),
    [
        ("Apple M1", 8, 2.6),
        ("Apple M1 Max", 32, 10.6),
        ("Apple M2", 10, 3.6),
        ("Apple M2 Ultra", 76, 27.2),
        ("Apple M4", 10, 4.0),
    ],
)
def test_peak_matches_published_figures(name: str, cores: int, published: float) -> None:
    """Apple announced 2.6 (M1) and 3.6 TFLOPS (M2); the others are from philipturner/metal-benchmarks."""
    assert peak_tflops(name, cores, "float32") == pytest.approx(published, rel=0.01)


def test_unknown_devices_have_no_peak() -> None:
    assert peak_tflops("Apple M9 Pro", 20, "bfloat16") is None
    assert peak_tflops("Apple M1", None, "bfloat16") is None
    assert peak_tflops("NVIDIA A100-SXM4-80GB", None, "bfloat16") == 312
    assert peak_tflops("NVIDIA A100-SXM4-80GB", None, "float32") is None
    assert peak_tflops("NVIDIA L40", None, "bfloat16") is None


def test_gpu_cores_from_system_profiler() -> None:
    report = {"SPDisplaysDataType": [{"_name": "Apple M3 Pro", "sppci_cores": "18", "sppci_model": "Apple M3 Pro"}]}
    assert parse_gpu_cores(json.dumps(report)) == 18
    assert [parse_gpu_cores(text) for text in ("", "{}", '{"SPDisplaysDataType": []}', "[1]")] == [None] * 4


def test_flops_per_token_counted_by_hand() -> None:
    """6 per matrix weight, and 12 D for each of the (L + 1) / 2 keys that a token attends to on average."""
    model = ModelConfig(vocab_size=50, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, mlp_multiple=2.5)
    matrices = sum(r * c for name, (r, c) in two_dimensional(model) if "layers" in name or "embed" in name)
    assert training_flops_per_token(model, 16) == 6 * matrices + 3 * 12 * 32 * (16 + 1) / 2


def two_dimensional(model: ModelConfig) -> list[tuple[str, tuple[int, int]]]:
    return [(name, (shape[0], shape[1])) for name, shape in parameter_shapes(model).items() if len(shape) == 2]
