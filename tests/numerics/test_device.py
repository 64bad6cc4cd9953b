"""Questions about the default device. Tests run on a CPU, so a GPU is simulated."""

from types import SimpleNamespace

import mlx.core as mx
import pytest

from anarchobot.numerics import device


def test_a_gpus_float32_products_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not device.reduced_float32()
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))
    for rounds in (True, False):
        monkeypatch.setattr(device, "_rounds_operands", lambda rounds=rounds: rounds)
        assert device.reduced_float32() is rounds
