"""Which optimizer updates which parameter, listed by hand for every kind of parameter."""

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.schema import ModelConfig, TrainConfig
from anarchobot.model.parameters import parameter_shapes
from anarchobot.optim import muon_adamw, param_groups

MODEL = ModelConfig(
    vocab_size=32, n_layers=1, d_model=8, n_heads=2, tie_embeddings=False, qk_norm=True, attention_bias=True
)
MUON = {
    f"model.layers.0.{name}.weight"
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
}  # fmt: skip


def test_muon_updates_only_matrices_of_blocks() -> None:
    shapes = parameter_shapes(MODEL)
    assert {
        name for name, s in shapes.items() if param_groups.optimizer_of(name, len(s), "muon_adamw") == "muon"
    } == MUON
    assert {name for name, s in shapes.items() if param_groups.optimizer_of(name, len(s), "adamw") == "muon"} == set()


def test_describe_groups_has_a_line_per_optimizer() -> None:
    shapes = parameter_shapes(MODEL)
    matrices, d = 4 * 8 * 8 + 3 * 8 * 32, 8
    assert param_groups.describe_groups(shapes, "muon_adamw") == [
        f"Muon: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj ({matrices:,} parameters)",
        f"AdamW: embed_tokens, input_layernorm, post_attention_layernorm, bias, q_norm, k_norm, norm, lm_head "
        f"({2 * 32 * d + 3 * d + 3 * d + 2 * 4:,} parameters)",
    ]
    assert [line.split(":")[0] for line in param_groups.describe_groups(shapes, "adamw")] == ["AdamW"]


def test_one_update_changes_every_parameter_and_keeps_their_order() -> None:
    """A parameter without an optimizer would silently stay the same."""
    for optimizer in ("muon_adamw", "adamw"):
        params = {name: mx.ones(s) for name, s in parameter_shapes(MODEL).items()}
        train = TrainConfig(optimizer=optimizer)  # type: ignore[arg-type]
        state = muon_adamw.init_state(params, train)
        grads = {
            name: mx.array(np.random.default_rng(0).standard_normal(p.shape), mx.float32) for name, p in params.items()
        }
        before, kinds = dict(params), {kind: set(a) for kind, a in state.items()}
        new, after = muon_adamw.update(
            params, grads, state, mx.array(0.01), mx.array(0.9), mx.array(1.0), train, MODEL.head_size
        )
        assert list(new) == list(before)
        assert all(float(mx.abs(new[name] - before[name]).min()) > 0 for name in before)
        assert {kind: set(a) for kind, a in after.items()} == kinds


def test_adamw_lr_applies_only_beside_muon() -> None:
    """AdamW's first step has the size of its learning rate: adamw_lr beside Muon, lr as the only optimizer."""

    def mean_change(**settings: object) -> dict[str, float]:
        params = {name: mx.ones(s) for name, s in parameter_shapes(MODEL).items()}
        train = TrainConfig(weight_decay=0.0, lr=0.1, **settings)  # type: ignore[arg-type]
        grads = {name: mx.random.normal(p.shape, key=mx.random.key(0)) for name, p in params.items()}
        scalars = mx.array(0.05), mx.array(0.9), mx.array(1.0)  # half of the peak learning rate
        state = muon_adamw.init_state(params, train)
        new, _ = muon_adamw.update(params, grads, state, *scalars, train, MODEL.head_size)
        return {name: float(mx.abs(p - 1).mean()) for name, p in new.items()}

    usual, faster = mean_change(), mean_change(adamw_lr=0.4)
    for name, distance in faster.items():
        assert distance == pytest.approx(usual[name] * (1 if name in MUON else 4), rel=1e-3), name
    alone = mean_change(optimizer="adamw", adamw_lr=0.4)
    assert all(distance == pytest.approx(0.05, rel=1e-3) for distance in alone.values())


def test_biases_do_not_decay() -> None:
    """With zero gradients, only decay could change them. The head does decay."""
    params = {name: mx.ones(s) for name, s in parameter_shapes(MODEL).items()}
    train = TrainConfig(weight_decay=0.5, cautious_weight_decay=False)
    grads = {name: mx.zeros(p.shape) for name, p in params.items()}
    state = muon_adamw.init_state(params, train)
    new, _ = muon_adamw.update(params, grads, state, *map(mx.array, (0.1, 0.9, 1.0)), train, MODEL.head_size)
    assert all(mx.array_equal(p, mx.ones(p.shape)) for name, p in new.items() if name.endswith(".bias"))
    assert float(new["lm_head.weight"][0, 0]) == pytest.approx(0.95)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_balanced_shares_partition_the_parameters(count: int) -> None:
    model = ModelConfig(vocab_size=64, n_layers=6, d_model=32, n_heads=4)
    params = {name: mx.zeros(s) for name, s in parameter_shapes(model).items()}
    state = muon_adamw.init_state(params, TrainConfig())
    shares = param_groups.balanced_shares({n: p.shape for n, p in params.items()}, state["muon.momentum"], count)
    assert sorted(name for share in shares for name in share) == sorted(params)
    sizes = [sum(params[name].size for name in share if name in state["muon.momentum"]) for share in shares]
    assert max(sizes) < 1.3 * min(sizes)
