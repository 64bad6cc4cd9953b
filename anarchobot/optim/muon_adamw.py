"""Updates all parameters, each with its optimizer (optim/param_groups.py)."""

import mlx.core as mx

from anarchobot.config.schema import TrainConfig
from anarchobot.numerics.eval_order import EvalOrder, depend
from anarchobot.numerics.profiling import NO_PROFILE, Profile
from anarchobot.optim.adamw import adamw
from anarchobot.optim.muon import muon
from anarchobot.optim.param_groups import adamw_lr_ratio, state_shapes

Arrays = dict[str, mx.array]
State = dict[str, Arrays]  # "muon.momentum", "muon.second", "adamw.first", "adamw.second": arrays by parameter name


def init_state(params: Arrays, train: TrainConfig) -> State:
    """Zeros for every moment, float32."""
    shapes = state_shapes({name: p.shape for name, p in params.items()}, train)
    return {kind: {name: mx.zeros(shape) for name, shape in by_name.items()} for kind, by_name in shapes.items()}


def update(
    params: Arrays,
    grads: Arrays,
    state: State,
    lr: mx.array,
    momentum: mx.array,
    count: mx.array,
    train: TrainConfig,
    head_size: int,
    wait: EvalOrder = depend,
    directions: Arrays | None = None,
    profile: Profile = NO_PROFILE,
    factor: mx.array | float = 1.0,
) -> tuple[Arrays, State]:
    """One step of Muon and AdamW by `factor` times the gradients. `lr`, `momentum`, `count` and `factor` are float32
    scalars (Python numbers would be compiled in as constants). The state determines which optimizer owns a parameter;
    `head_size` and the optional precomputed `directions` are for Muon. All dicts are consumed, so that new arrays can
    reuse the memory of the old ones. Returns the new (params, state)."""
    names = list(params)
    matrices = {name: params.pop(name) for name in state["muon.momentum"]}
    matrices, buffers, second_moments = muon(
        matrices,
        grads,
        state["muon.momentum"],
        state["muon.second"],
        lr,
        momentum,
        train,
        head_size,
        wait,
        directions,
        factor,
    )
    profile.end("update by Muon", *matrices.values())
    lr = lr * adamw_lr_ratio(train)
    rest, first, second = adamw(
        params, grads, state["adamw.first"], state["adamw.second"], lr, count, train, wait, factor
    )
    profile.end("update by AdamW", *rest.values())
    new = matrices | rest
    return (
        {name: new[name] for name in names},
        {"muon.momentum": buffers, "muon.second": second_moments, "adamw.first": first, "adamw.second": second},
    )
