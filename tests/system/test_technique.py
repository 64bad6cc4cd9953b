"""The technique of a step: defaults of each device, and measurements."""

import pytest

from anarchobot.config.schema import Config
from anarchobot.system import technique
from anarchobot.system.technique import StepSettings, cache_key, default_settings, read_measured, write_measured


def config(**train: object) -> Config:
    return Config.model_validate({"train": train, "data": {"seq_len": 2048}})


@pytest.mark.parametrize(
    "kind, precision, expected",
    [
        ("cpu", "float32", StepSettings("blocked", 256, False)),
        ("metal", "bfloat16", StepSettings("fused", 1024, True)),
        ("cuda", "bfloat16", StepSettings("sdpa", 1024, True)),
        ("cuda", "float32", StepSettings("fused", 1024, True)),  # cuDNN's attention has no float32
    ],
)
def test_each_device_has_its_default(kind: technique.DeviceKind, precision: str, expected: StepSettings) -> None:
    assert default_settings(config(), kind, precision) == expected


def test_cudnn_needs_a_length_that_is_a_multiple_of_its_tile() -> None:
    odd = Config.model_validate({"data": {"seq_len": 1000}})
    assert default_settings(odd, "cuda", "bfloat16").technique == "fused"


def test_a_technique_in_the_configuration_is_used() -> None:
    given = config(technique="autodiff", loss_chunk=64, compile=False)
    assert default_settings(given, "metal", "bfloat16") == StepSettings("autodiff", 64, False)


def test_measured_settings_are_kept_by_device_version_and_shape(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = cache_key(config(), "pretrain", "Apple M3 Pro, metal", "0.32.4", "bfloat16")
    assert read_measured(key) is None
    write_measured(key, StepSettings("autodiff", 512, True))
    write_measured("other", StepSettings("blocked", 256, False))
    assert read_measured(key) == StepSettings("autodiff", 512, True)
    technique.cache_file().write_text("not JSON")
    assert read_measured(key) is None


def test_a_key_is_of_one_device_version_precision_and_shape() -> None:
    """Settings that don't change the work of a micro-batch share a key."""
    given = "Apple M3 Pro, metal", "0.32.4", "bfloat16"
    masked = Config.model_validate({"data": {"seq_len": 2048, "document_mask": True}})
    adapters = Config.model_validate({"data": {"seq_len": 2048}, "lora": {"r": 8}})
    keys = [
        cache_key(config(), "pretrain", *given),
        cache_key(config(), "pretrain", "Apple M3 Pro, cpu", *given[1:]),
        cache_key(config(), "pretrain", given[0], "0.32.5", given[2]),
        cache_key(config(), "pretrain", *given[:2], "float32"),
        cache_key(config(micro_batch_size=2), "pretrain", *given),
        cache_key(config(gradient_checkpointing=True), "pretrain", *given),
        cache_key(config(), "sft", *given),
        cache_key(config(), "dpo", *given),
        cache_key(adapters, "sft", *given),
    ]
    assert len(set(keys)) == len(keys)
    assert cache_key(config(lr=1.0, technique="sdpa", loss_chunk=7), "pretrain", *given) == keys[0]
    assert cache_key(masked, "pretrain", *given) == cache_key(
        config(), "sft", *given
    )  # several documents in a sequence
