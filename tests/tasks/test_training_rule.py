"""The rule of docs/train.md: a table of values, and how the settings depend on text, time and speed."""

import itertools
from dataclasses import astuple

import pytest

from anarchobot.config.schema import Config
from anarchobot.model.parameters import parameter_count
from anarchobot.system.peak_flops import training_flops_per_token
from anarchobot.tasks.training_rule import SHAPES, Settings, Speed, choose_settings, settings_for_shape

CPU = Speed(1e-11, 1.7e-9)  # two cores: 27 GFLOP/s at width 64, 60 at 256
GPU = Speed(3e-13, 1e-10, min_batch=4096)
BYTES = [50_000, 280_000, 2_700_000, 16_000_000, 500_000_000]
SECONDS = [60.0, 300.0, 1800.0, 7200.0, 86400.0]


def test_speed_is_that_of_the_two_measured_widths() -> None:
    speed = Speed.fit({64: CPU.flops(64), 256: CPU.flops(256)})
    assert astuple(speed) == pytest.approx(astuple(CPU))
    assert speed.flops(128) == pytest.approx(1 / (1e-11 + 1.7e-9 / 128))
    slower_when_wide = Speed.fit({64: 2e9, 256: 1e9})  # noise
    assert slower_when_wide.flops(512) == pytest.approx(1e9)


@pytest.mark.parametrize(("text_bytes", "seconds", "speed"), itertools.product(BYTES, SECONDS, (CPU, GPU)))
def test_parameters_flops_and_time_are_those_of_the_model(text_bytes: int, seconds: float, speed: Speed) -> None:
    settings = choose_settings(text_bytes, seconds, speed)
    config = Config.model_validate(settings.sections())
    assert parameter_count(config.model) == pytest.approx(settings.parameters, rel=0.01)
    flops = training_flops_per_token(config.model, settings.seq_len) * settings.sequences * settings.seq_len
    assert flops == pytest.approx(settings.flops_per_step, rel=0.05)
    assert settings.seconds <= 1.001 * seconds
    expected = settings.steps * settings.flops_per_step / speed.flops(settings.width)
    assert settings.seconds == pytest.approx(expected, rel=0.02)
    assert settings.vocab_size * 250 <= max(text_bytes, 512 * 250)


@pytest.mark.parametrize("speed", [CPU, GPU], ids=["cpu", "gpu"])
def test_more_time_gives_no_smaller_model_and_more_compute(speed: Speed) -> None:
    for text_bytes in BYTES:
        found = [choose_settings(text_bytes, seconds, speed) for seconds in SECONDS]
        for less, more in itertools.pairwise(found):
            assert more.width >= less.width
            assert more.steps * more.flops_per_step >= 0.99 * less.steps * less.flops_per_step
            assert more.lr <= 1.05 * less.lr


@pytest.mark.parametrize("speed", [CPU, GPU], ids=["cpu", "gpu"])
def test_more_text_gives_fewer_epochs(speed: Speed) -> None:
    for seconds in SECONDS:
        found = [choose_settings(text_bytes, seconds, speed) for text_bytes in BYTES]
        for less, more in itertools.pairwise(found):
            assert more.epochs <= less.epochs + 1e-9
            assert more.dropout <= less.dropout and more.weight_decay <= less.weight_decay


def test_a_small_text_is_not_repeated_without_end() -> None:
    day = choose_settings(50_000, 86400, CPU)
    assert day.epochs == pytest.approx(20)
    assert day.seconds < 86400 / 10
    assert day.dropout > 0


@pytest.mark.parametrize(
    ("text_bytes", "seconds", "speed", "expected"),
    [
        (280_000, 300, CPU, (1024, 4, 128, 128, 4, 4207, 0.0082, 0.2, 1.6)),
        (2_700_000, 300, CPU, (4096, 5, 160, 256, 4, 1106, 0.0079, 0.0, 0.061)),
        (16_000_000, 1800, CPU, (8192, 6, 256, 512, 4, 1292, 0.0056, 0.0, 0.02)),
        (16_000_000, 7200, GPU, (16384, 10, 512, 512, 8, 15890, 0.0027, 0.2, 1.6)),
    ],
)
def test_table_of_values(text_bytes: int, seconds: float, speed: Speed, expected: tuple[float, ...]) -> None:
    found = choose_settings(text_bytes, seconds, speed)
    assert (
        found.vocab_size, found.layers, found.width, found.seq_len, found.sequences, found.steps, found.lr,
        found.dropout, found.weight_decay,
    ) == expected  # fmt: skip


def test_the_batch_is_a_power_of_two_of_tokens() -> None:
    for shape in SHAPES:
        for seconds in (10, 1e5):
            settings: Settings = settings_for_shape(10**9, seconds, GPU, *shape)
            tokens = settings.sequences * settings.seq_len
            assert tokens.bit_count() == 1
            assert 512 <= tokens <= 2**16
