"""Distances between tokens that no training sequence has: shipped configurations and those of `train` exclude them by a
sliding window; others get a warning."""

import itertools
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.loading import load_config
from anarchobot.config.schema import Config
from anarchobot.config.templates import shipped_configs
from anarchobot.config.validation import untrained_distances
from anarchobot.tasks.training_rule import Speed, choose_settings

LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "n_layers": 2}


@pytest.mark.parametrize(
    ("model", "train", "warned"),
    [
        ({"max_seq_len": 512}, {}, True),
        ({"max_seq_len": 128}, {}, False),
        ({"max_seq_len": 512, "sliding_window": 128}, {}, False),
        ({"max_seq_len": 512, "sliding_window": 129}, {}, True),
        ({"max_seq_len": 512, "sliding_window": 128, **LAYERS}, {}, True),
        ({"max_seq_len": 512}, {"init_from": "runs/base"}, False),  # which has learned them, or not, already
    ],
)
def test_which_configurations_are_warned_about(model: dict[str, Any], train: dict[str, Any], warned: bool) -> None:
    config = Config.model_validate({"model": model, "data": {"seq_len": 128}, "train": train})
    text = untrained_distances(config)
    assert (text is not None) == warned
    if text is not None and not model.get("layer_types"):
        problem, _, remedy = text.partition("; ")
        assert "128" in problem and "model.sliding_window: 128" in remedy


def test_no_shipped_configuration_has_untrained_distances() -> None:
    checked = 0
    for path in shipped_configs().values():
        try:
            config = load_config(str(path)).config
        except UserError:  # of adapt-vocab
            assert path.name.startswith("adapt_")
            continue
        if config.train.init_from is None and "tuning" not in path.parts:
            assert untrained_distances(config) is None, path
            checked += 1
    assert checked == 7


def test_train_never_chooses_untrained_distances() -> None:
    for size, seconds, speed in itertools.product((5e4, 3e6, 5e8), (60.0, 3600.0, 86400.0), (3e-13, 1e-11)):
        settings = choose_settings(int(size), seconds, Speed(speed, 100 * speed)).sections()
        config = Config.model_validate(settings)
        assert config.model.max_seq_len > config.data.seq_len
        assert untrained_distances(config) is None
