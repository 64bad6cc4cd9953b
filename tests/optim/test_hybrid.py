"""Which optimizer gets which parameter: named by hand for every kind there is."""

import mlx.core as mx
import numpy as np

from anarchobot.config.schema import ModelConfig, TrainConfig
from anarchobot.model.shapes import parameter_shapes
from anarchobot.optim import hybrid

MODEL = ModelConfig(vocab_size=32, n_layers=1, d_model=8, n_heads=2, tie_embeddings=False, qk_norm=True)
MUON = {
    f"model.layers.0.{name}.weight"
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
}  # fmt: skip


def test_only_the_blocks_matrices_go_to_muon() -> None:
    shapes = parameter_shapes(MODEL)
    assert {name for name, s in shapes.items() if hybrid.route(name, len(s), "muon_adamw") == "muon"} == MUON
    assert {name for name, s in shapes.items() if hybrid.route(name, len(s), "adamw") == "muon"} == set()


def test_one_update_moves_every_parameter_and_keeps_names_and_order() -> None:
    """A parameter that no optimizer takes would stay as it is, and nobody would see it."""
    for optimizer in ("muon_adamw", "adamw"):
        params = {name: mx.ones(s) for name, s in parameter_shapes(MODEL).items()}
        state = hybrid.init_state(params, TrainConfig(optimizer=optimizer))  # type: ignore[arg-type]
        grads = {
            name: mx.array(np.random.default_rng(0).standard_normal(p.shape), mx.float32) for name, p in params.items()
        }
        new, after = hybrid.update(params, grads, state, mx.array(0.01), mx.array(0.9), mx.array(1.0), 0.0)
        assert list(new) == list(params)
        assert all(float(mx.abs(new[name] - params[name]).min()) > 0 for name in params)
        assert {kind: set(a) for kind, a in after.items()} == {kind: set(a) for kind, a in state.items()}
