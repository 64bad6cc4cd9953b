"""The two engines produce the same loss curves, and each resumes from checkpoints of the other."""

from typing import Any

import pytest

from anarchobot.training.mlx_engine import MLXEngine
from tests.torch_backend.settings import config, train

torch = pytest.importorskip("torch")

from anarchobot.torch_backend.engine import TorchEngine  # noqa: E402

SILU = {"d_model": 16, "n_layers": 1}  # tied
GELU = {
    "d_model": 16,
    "n_layers": 1,
    "ffn_activation": "gelu",
    "tie_embeddings": False,
    "n_kv_heads": 2,
    "qk_norm": True,
}


@pytest.mark.parametrize("optimizer", ["muon_adamw", "adamw"])
@pytest.mark.parametrize("model", [SILU, GELU], ids=["silu, tied", "gelu, untied, grouped heads, qk_norm"])
def test_two_hundred_steps_have_the_same_losses(model: dict[str, Any], optimizer: str) -> None:
    """At higher learning rates Muon is chaotic: rounding of the initial weights changes the curve as much."""
    chosen = config(model, optimizer=optimizer)
    by_mlx, by_torch = (train(e(chosen), range(1, 201), lr=0.002, micro_batches=1) for e in (MLXEngine, TorchEngine))
    assert by_mlx[-1] < 0.5 * by_mlx[0]
    assert by_torch == pytest.approx(by_mlx, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "close"),
    [({}, 1e-4), ({"optimizer": "adamw", "ema_decay": 0.9}, 1e-4), ({"precision": "float16"}, 0.02)],
    ids=str,
)
def test_each_engine_resumes_checkpoints_of_the_other(settings: dict[str, Any], close: float) -> None:
    """Ten steps with each engine equal twenty steps with one. Counters are compared too: a restarted bias correction
    would be an error."""
    chosen = config(GELU, **settings)
    for before, after in ((MLXEngine, TorchEngine), (TorchEngine, MLXEngine)):
        straight, resumed = before(chosen), after(chosen)
        train(straight, range(1, 11), lr=0.003)
        resumed.load_state(straight.state())
        wanted, got = (train(engine, range(11, 21), lr=0.003) for engine in (straight, resumed))
        assert got == pytest.approx(wanted, abs=close)
        scalars = [{n: a for n, a in engine.state().items() if "/" not in n} for engine in (straight, resumed)]
        assert scalars[0] == scalars[1] and scalars[0]["updates"] == 20


def test_update_settings_have_the_same_effect() -> None:
    """All settings of the update at non-default values, in both engines."""
    chosen = config(
        SILU, lr=0.003, adamw_lr=0.006, normuon=False, muon_split_heads=False, muon_scale="keller", weight_decay=0.3,
        cautious_weight_decay=False, max_grad_norm=0.5, ema_decay=0.5,
    )  # fmt: skip
    usual = config(SILU, lr=0.003)
    by_mlx, by_torch, by_default = (
        train(engine, range(1, 31), lr=0.003) for engine in (MLXEngine(chosen), TorchEngine(chosen), TorchEngine(usual))
    )
    assert by_torch == pytest.approx(by_mlx, abs=1e-4)
    assert by_torch != pytest.approx(by_default, abs=1e-2)
