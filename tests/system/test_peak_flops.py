"""What a device could do at most, and what a token needs."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anarchobot.config.schema import ModelConfig
from anarchobot.model.parameters import parameter_shapes
from anarchobot.system.machine import stay_awake
from anarchobot.system.peak_flops import cores_of, operations_per_token, peak_tflops


@pytest.mark.parametrize(
    ("name", "cores", "published"),
    [("Apple M1", 8, 2.6), ("Apple M1 Max", 32, 10.6), ("Apple M2", 10, 3.6), ("Apple M2 Ultra", 76, 27.2)],
)
def test_apples_published_figures(name: str, cores: int, published: float) -> None:
    """Apple said 2.6 (M1) and 3.6 TFLOPS (M2) in its announcements; the others are philipturner/metal-benchmarks'."""
    assert peak_tflops(name, cores, "float32") == pytest.approx(published, rel=0.01)


def test_what_is_not_known_is_not_made_up() -> None:
    assert peak_tflops("Apple M9 Pro", 20, "bfloat16") is None
    assert peak_tflops("Apple M1", None, "bfloat16") is None
    assert peak_tflops("NVIDIA A100-SXM4-80GB", None, "bfloat16") == 312
    assert peak_tflops("NVIDIA A100-SXM4-80GB", None, "float32") is None
    assert peak_tflops("NVIDIA L40", None, "bfloat16") is None


def test_cores_are_read_from_macos_report() -> None:
    report = {"SPDisplaysDataType": [{"_name": "Apple M3 Pro", "sppci_cores": "18", "sppci_model": "Apple M3 Pro"}]}
    assert cores_of(json.dumps(report)) == 18
    assert [cores_of(text) for text in ("", "{}", '{"SPDisplaysDataType": []}', "[1]")] == [None] * 4


def test_operations_of_a_token_by_hand() -> None:
    """6 for each weight that multiplies, and 12 H E for each of the (L + 1) / 2 tokens that one sees on average."""
    model = ModelConfig(vocab_size=50, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, mlp_multiple=2.5)
    matrices = sum(r * c for name, (r, c) in two_dimensional(model) if "layers" in name or "embed" in name)
    assert operations_per_token(model, 16) == 6 * matrices + 3 * 12 * 32 * (16 + 1) / 2


def two_dimensional(model: ModelConfig) -> list[tuple[str, tuple[int, int]]]:
    return [(name, (shape[0], shape[1])) for name, shape in parameter_shapes(model).items() if len(shape) == 2]


def test_a_mac_is_kept_awake_as_long_as_the_process_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a caffeinate that writes down what it was told."""
    program, told = tmp_path / "caffeinate", tmp_path / "told"
    program.write_text(f'#!/bin/sh\necho "$@" > {told}.part && mv {told}.part {told}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(subprocess.Popen, "__del__", lambda process: None)  # it is left to itself, as it should be
    monkeypatch.setattr(sys, "platform", "linux")
    assert stay_awake() is None and not told.exists()
    monkeypatch.setattr(sys, "platform", "darwin")
    line = stay_awake()
    for _ in range(5000):
        if told.exists():
            break
        time.sleep(0.02)
    assert told.read_text().split() == ["-i", "-w", str(os.getpid())]
    assert line is not None and "caffeinate" in line
