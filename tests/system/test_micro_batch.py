"""`train.micro_batch_size: auto`."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig, load_config
from anarchobot.system import micro_batch
from anarchobot.system.memory import estimate
from anarchobot.system.micro_batch import memory_budget, resolve_micro_batch

SETTINGS = [
    *("model.vocab_size=2000", "model.n_layers=3", "model.d_model=128", "model.n_heads=4", "data.seq_len=128"),
    *("train.device=cpu", "train.cpu_threads=1", "train.micro_batch_size=auto", "train.grad_accum_steps=12"),
    "train.optimizer=adamw",  # with Muon, the update sets the same peak for one and two sequences
]


def auto(*settings: str) -> LoadedConfig:
    return load_config(None, [*SETTINGS, *settings])


def peak(rows: int) -> int:
    return estimate(auto().config, micro_batch_size=rows).peak


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 12])
def test_largest_fitting_micro_batch_keeps_the_step(rows: int) -> None:
    for budget in (peak(rows), peak(rows) + 100):
        train = resolve_micro_batch(auto(f"train.memory_budget_gb={budget / 1e9!r}")).loaded.config.train
        assert (train.micro_batch_size, train.grad_accum_steps) == (rows, 12 // rows)
        assert not train.auto_micro_batch


@pytest.mark.parametrize(
    ("platform", "device", "gib", "expected"),
    [
        ("darwin", "gpu", 18, 12 * 2**30),  # the GPU's working set, 2/3 of the memory
        ("darwin", "gpu", 64, 48 * 2**30),
        ("darwin", "cpu", 18, 13.5 * 2**30),
        ("linux", "gpu", 18, 13.5 * 2**30),
    ],
)
def test_default_budget(
    platform: str, device: str, gib: int, expected: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sysctl = tmp_path / "sysctl"
    sysctl.write_text("#!/bin/sh\necho 0\n")
    sysctl.chmod(0o755)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(micro_batch, "system_memory", lambda: SimpleNamespace(total=gib * 2**30))
    assert memory_budget(load_config(None, [f"train.device={device}"]).config) == expected
    assert memory_budget(load_config(None, [f"train.device={device}", "train.memory_budget_gb=99"]).config) == 99e9


def test_resolved_configuration_has_numbers_and_loads(tmp_path: Path) -> None:
    from anarchobot.config.strict_yaml import dump

    found = resolve_micro_batch(auto("train.epochs=2"))
    (tmp_path / "c.yaml").write_text(dump(found.loaded.config.model_dump()))
    again = load_config(tmp_path / "c.yaml").config
    assert again == found.loaded.config
    assert again.train.micro_batch_size * again.train.grad_accum_steps == 12
    assert found.messages[0].startswith("micro_batch_size auto: 12 x 1 sequences per step")


def test_numbers_are_unchanged() -> None:
    plain = load_config(None, ["train.micro_batch_size=3", "train.memory_budget_gb=1e-6"])
    assert resolve_micro_batch(plain) == (plain, [])


def test_too_little_memory_is_an_error_with_a_remedy() -> None:
    saving = auto("train.gradient_checkpointing=true", "data.seq_len=1024")
    least = estimate(saving.config, micro_batch_size=1).peak
    with pytest.raises(UserError, match=r"micro_batch_size.*set train\.gradient_checkpointing: true"):
        resolve_micro_batch(auto("data.seq_len=1024", f"train.memory_budget_gb={least / 1e9!r}"))
    with pytest.raises(UserError, match=r"budget is 0\.00 GB .*make the model or data\.seq_len smaller"):
        resolve_micro_batch(auto("data.seq_len=1024", "train.memory_budget_gb=0.001"))


def test_unresolved_auto_is_one_sequence_per_micro_batch() -> None:
    train = auto().config.train
    assert (train.auto_micro_batch, train.micro_batch_size, train.grad_accum_steps) == (True, 1, 12)
    assert type(train).model_validate(train.model_dump()) == train


@pytest.mark.parametrize("value", ["many", "0", "-1", "1.5"])
def test_invalid_values_are_rejected(value: Any) -> None:
    with pytest.raises(UserError, match='expected an integer >= 1, or "auto"'):
        auto(f"train.micro_batch_size={value}")
