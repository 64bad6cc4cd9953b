"""The engine that the config names, MLX's or PyTorch's, and what a run wants of it besides training."""

from collections.abc import Callable
from dataclasses import dataclass, field

from anarchobot.config.schema import Config
from anarchobot.data.tokenizer import Tokenizer
from anarchobot.system.blas import advice, load_fast_blas
from anarchobot.training.loop import Engine


@dataclass(frozen=True)
class OpenEngine:
    """`place` says precision and device; `sample` is a text of the weights as they are, by the config's generation
    section; `warnings` say what is slow here, or not to be had."""

    engine: Engine
    place: str
    sample: Callable[[Tokenizer], str]
    warnings: list[str] = field(default_factory=list)


def open_engine(config: Config) -> OpenEngine:
    """Only what the chosen engine is made of is imported. Raises UserError when its device or package is missing."""
    return _torch(config) if config.train.backend == "torch" else _mlx(config)


def _mlx(config: Config) -> OpenEngine:
    blas = load_fast_blas()  # before MLX, which the next lines import
    import mlx.core as mx

    from anarchobot.inference.generation import Model, generate
    from anarchobot.training.engine import MLXEngine

    engine = MLXEngine(config)
    slow = engine.device.type == mx.DeviceType.cpu and blas is None
    return OpenEngine(
        engine,
        f"{engine.precision} on {engine.device}",
        lambda tokenizer: generate(Model(engine.weights, config.model, tokenizer), config.generation),
        [advice()] if slow else [],
    )


def _torch(config: Config) -> OpenEngine:
    from anarchobot.torch_mps.engine import TorchEngine
    from anarchobot.torch_mps.generation import generate

    engine = TorchEngine(config)
    return OpenEngine(
        engine,
        f"{engine.precision} on {engine.device.type}, by PyTorch",
        lambda tokenizer: generate(engine.weights, config.model, tokenizer, config.generation),
        engine.notes,
    )
