"""An architecture without hand-written gradients trains with the same engine: its gradients match transformers', and
runs resume exactly."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import Config, GenerationConfig, ModelConfig
from anarchobot.data.windows import Batch
from anarchobot.inference.generation import stream_token_ids
from anarchobot.model import autodiff
from anarchobot.model.architecture import gradients
from anarchobot.model.parameters import init_parameters, parameter_shapes
from anarchobot.training.mlx_engine import MLXEngine
from tests.model import stablelm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NAME = "anarchobot.model.stablelm"


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = ModuleType(NAME)
    package.__path__ = []
    for name, module in {NAME: package, f"{NAME}.architecture": stablelm, f"{NAME}.forward": stablelm}.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield


def config(**train: Any) -> Config:
    shape = {"vocab_size": 61, "n_layers": 2, "d_model": 64, "n_heads": 2, "mlp_multiple": 2.0, "dropout": 0.0}
    settings = {"device": "cpu", "lr": 0.01, "min_lr": 0.0, "micro_batch_size": 2, **train}
    own = Config.model_validate({"model": shape, "data": {"seq_len": 12}, "train": settings})
    return own.model_copy(update={"model": own.model.model_copy(update={"architecture": "stablelm"})})


def batch(seed: int) -> Batch:
    ids = np.random.default_rng(seed).integers(0, 61, (2, 2, 13)).astype(np.int32)
    return Batch(ids[..., :-1].copy(), ids[..., 1:].copy())


def transformers_model(model: ModelConfig) -> Any:
    settings = transformers.StableLmConfig(
        vocab_size=61, hidden_size=64, intermediate_size=model.mlp_size, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, layer_norm_eps=model.norm_eps, use_qkv_bias=False, attention_dropout=0.0,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": stablelm.ROTARY},
    )  # fmt: skip
    expected = transformers.StableLmForCausalLM(settings).double()
    expected.load_state_dict({name: torch.tensor(p) for name, p in weights(model).items()})
    return expected


def weights(model: ModelConfig) -> dict[str, np.ndarray]:
    """Larger than the initial weights, with norms and biases away from their initial values."""
    rng = np.random.default_rng(0)
    return {
        name: p * np.float32(5) if p.ndim == 2 else p + 0.2 * rng.standard_normal(p.shape).astype(np.float32)
        for name, p in init_parameters(model, 0).items()
    }


@pytest.mark.parametrize("how", [{}, {"gradient_checkpointing": True}], ids=["whole", "checkpointed"])
def test_loss_and_gradients_match_transformers(how: dict[str, Any]) -> None:
    settings = config(optimizer="adamw", cpu_threads=1, **how)
    assert gradients(settings.model) is autodiff.loss_and_gradients
    expected, rows, engine = transformers_model(settings.model), batch(1), MLXEngine(settings, weights(settings.model))
    _, grads = engine._accumulate_gradients(rows, 1, 1 / 48)
    inputs, targets = (torch.tensor(x.reshape(4, 12)).long() for x in (rows.inputs, rows.targets))
    loss = torch.nn.functional.cross_entropy(expected(inputs).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    assert engine.train_step(rows, 1, 0.01, 0.9).loss == pytest.approx(loss.item(), rel=1e-6)
    assert set(grads) == set(parameter_shapes(settings.model)) == {name for name, _ in expected.named_parameters()}
    for name, p in expected.named_parameters():
        wanted = p.grad.numpy()
        assert np.linalg.norm(np.array(grads[name]) - wanted) < 1e-5 * np.linalg.norm(wanted), name


def test_evaluation_and_the_next_token_match_transformers() -> None:
    """Evaluation and generation use this architecture's forward pass, not Llama's on the same parameter names."""
    model, rows = config().model, batch(1)
    inputs, targets = (torch.tensor(x.reshape(4, 12)).long() for x in (rows.inputs, rows.targets))
    with torch.no_grad():
        logits = transformers_model(model)(inputs).logits
    total, count = MLXEngine(config(), weights(model)).eval_step(rows)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert total / count == pytest.approx(expected.item(), rel=1e-6)
    params = {name: mx.array(p) for name, p in weights(model).items()}
    greedy = GenerationConfig(method="greedy", max_new_tokens=1)
    next_ids = [list(stream_token_ids(params, model, row, greedy, ())) for row in inputs.tolist()]
    assert next_ids == logits[:, -1:].argmax(-1).tolist()


@pytest.mark.parametrize(
    "how",
    [{}, {"gradient_checkpointing": True, "ema_decay": 0.9}, {"compile": True, "precision": "bfloat16"}],
    ids=["threads", "checkpointed", "compiled bfloat16"],
)
def test_training_learns_and_resumes_bit_for_bit(how: dict[str, Any]) -> None:
    straight, resumed = MLXEngine(config(**how)), MLXEngine(config(**how))
    losses = [straight.train_step(batch(0), step, 0.01, 0.9).loss for step in range(1, 41)]
    assert losses[0] == pytest.approx(np.log(61), rel=0.05)
    assert losses[-1] < 0.5 * losses[0]
    middle = {name: a.copy() for name, a in straight.state().items()}
    resumed.load_state(middle)
    for step in range(41, 44):
        assert straight.train_step(batch(0), step, 0.01, 0.9) == resumed.train_step(batch(0), step, 0.01, 0.9)
    total, count = straight.eval_step(batch(0))
    assert total / count < 0.5 * losses[0]
    for name, a in straight.state().items():
        np.testing.assert_array_equal(a, resumed.state()[name], err_msg=name)
