"""`train.trainable: embeddings`: which parameters are trained, and what a checkpoint holds."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config
from anarchobot.model.parameters import init_parameters, parameter_shapes
from anarchobot.tasks.engines import open_engine
from anarchobot.training.mlx_engine import MLXEngine
from tests.training.test_mlx_engine import random_batch

TRAINED = ("model.embed_tokens.weight", "lm_head.weight")


def config(tied: bool, **train: Any) -> Config:
    shape = {"vocab_size": 61, "n_layers": 2, "d_model": 64, "n_heads": 4, "dropout": 0.0, "tie_embeddings": tied}
    plain = {"device": "cpu", "optimizer": "adamw", "max_grad_norm": None, "trainable": "embeddings"}
    return Config.model_validate({"model": shape, "train": {**plain, **train}})


@pytest.mark.parametrize("tied", [True, False])
def test_trained_parameters_get_the_full_update_and_others_none(tied: bool) -> None:
    """Without clipping, a parameter's first step does not depend on other parameters."""
    part, whole = (MLXEngine(config(tied, trainable=which)) for which in ("embeddings", "all"))
    before = init_parameters(part._config.model, 0)
    for engine in (part, whole):
        engine.train_step(random_batch(2, 2), 1, 0.01, 0.9)
    for name in parameter_shapes(part._config.model):
        ours, theirs = np.array(part.weights[name]), np.array(whole.weights[name])
        if name in TRAINED:
            assert np.allclose(ours, theirs, atol=1e-6)
            assert np.abs(ours - before[name]).max() > 1e-3
        else:
            assert np.array_equal(ours, before[name])
            assert not np.array_equal(theirs, before[name])


def test_state_holds_all_weights_and_the_moments_of_trained_ones() -> None:
    settings = config(tied=False)
    engine = MLXEngine(settings)
    engine.train_step(random_batch(1, 2), 1, 0.01, 0.9)
    state = {name: np.array(array) for name, array in engine.state().items()}
    assert {n.removeprefix("params/") for n in state if n.startswith("params/")} == set(
        parameter_shapes(settings.model)
    )
    moments = {n.split("/", 2)[2] for n in state if n.startswith("optimizer/")}
    assert moments == set(TRAINED)
    again = MLXEngine(settings, {n: 0 * p for n, p in init_parameters(settings.model, 5).items()})
    again.load_state(state)
    for one in (engine, again):
        one.train_step(random_batch(1, 2, seed=2), 2, 0.01, 0.9)
    assert all(mx.array_equal(engine.weights[name], again.weights[name]) for name in engine.weights)


def test_checkpoints_of_full_training_and_the_torch_backend_are_rejected() -> None:
    whole = MLXEngine(config(tied=True, trainable="all"))
    with pytest.raises(UserError, match=r"set train\.optimizer"):
        MLXEngine(config(tied=True)).load_state(whole.state())
    pytest.importorskip("torch")
    with pytest.raises(UserError, match=r"set train.trainable: all, or train.backend: mlx"):
        open_engine(config(tied=True, backend="torch"))
