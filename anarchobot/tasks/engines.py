"""The engine that the config names, MLX's or PyTorch's, and what a run wants of it besides training."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config, GenerationConfig
from anarchobot.system.blas import load_fast_blas, no_blas_message
from anarchobot.system.peak_flops import apple_gpu_cores, peak_tflops
from anarchobot.tokenizers.tokenizer import Tokenizer
from anarchobot.training.engine import Engine
from anarchobot.training.ranks import ALONE, Ranks, detect_launcher, join_ranks

if TYPE_CHECKING:
    from anarchobot.training.mlx_engine import MLXEngine
    from anarchobot.training.preference_engine import PreferenceEngine

Weights = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class OpenEngine:
    """`place` says precision and device for people; `sample` is a text of the weights as they are, by the config's
    generation section; `draw` gives the ids behind those of a context, up to one of those that stop it; `warnings` say
    what is slow here, or not to be had; `peak_tflops` is what the GPU could do at most, where that is known."""

    engine: Engine
    precision: str
    place: str
    sample: Callable[[Tokenizer], str]
    draw: Callable[[list[int], GenerationConfig, Collection[int]], list[int]]
    warnings: list[str] = field(default_factory=list)
    peak_tflops: float | None = None


def open_ranks(config: Config) -> Ranks:
    """This process among those that mlx.launch or mpirun started for one run. Raises UserError for an engine that
    trains in one process, and when the ranks can't be joined."""
    if detect_launcher() is None:
        return ALONE
    if config.train.backend == "torch":
        raise UserError("train.backend: torch trains in one process: set train.backend: mlx, or start it by itself")
    load_fast_blas()  # before MLX
    return join_ranks()


def open_engine(config: Config, weights: Weights | None = None, ranks: Ranks = ALONE) -> OpenEngine:
    """`weights`: the model's first ones (None: new ones). Only what the chosen engine is made of is imported. Raises
    UserError when its device or package is missing."""
    return _torch(config, weights) if config.train.backend == "torch" else _mlx(config, weights, ranks)


def open_preference_engine(config: Config, weights: Weights) -> "tuple[OpenEngine, PreferenceEngine]":
    """The engine for pairs of answers, which is MLX's alone. Raises UserError for another."""
    if config.train.backend == "torch":
        raise UserError("train.backend: torch has no preference tuning: set train.backend: mlx")
    blas = load_fast_blas()  # before MLX, which the next line imports
    from anarchobot.training.preference_engine import PreferenceEngine

    engine = PreferenceEngine(config, weights)
    return _opened(engine, config, blas is None), engine


def _mlx(config: Config, weights: Weights | None, ranks: Ranks) -> OpenEngine:
    blas = load_fast_blas()  # before MLX, which the next line imports
    from anarchobot.training.mlx_engine import MLXEngine

    return _opened(MLXEngine(config, weights, ranks), config, blas is None)


def _opened(engine: "MLXEngine", config: Config, slow_products: bool) -> OpenEngine:
    import mlx.core as mx

    from anarchobot.inference.generation import generate, stream_token_ids
    from anarchobot.inference.model import Model

    on_gpu = engine.device.type == mx.DeviceType.gpu
    slow = slow_products and not on_gpu
    return OpenEngine(
        engine,
        engine.precision,
        f"{engine.precision} on {engine.device}",
        lambda tokenizer: generate(Model(engine.weights, config.model, tokenizer), config.generation),
        lambda context, settings, stop: list(stream_token_ids(engine.weights, config.model, context, settings, stop)),
        [no_blas_message()] if slow else [],
        peak_tflops(str(mx.device_info()["device_name"]), apple_gpu_cores(), engine.precision) if on_gpu else None,
    )


def _torch(config: Config, weights: Weights | None) -> OpenEngine:
    from anarchobot.torch_backend.engine import TorchEngine
    from anarchobot.torch_backend.generation import generate, stream_token_ids

    if config.lora.r is not None:
        raise UserError("train.backend: torch trains whole weights: leave lora.r out, or set train.backend: mlx")
    if config.train.trainable != "all":
        raise UserError("train.backend: torch trains all weights: set train.trainable: all, or train.backend: mlx")
    engine = TorchEngine(config, weights)
    return OpenEngine(
        engine,
        engine.precision,
        f"{engine.precision} on {engine.device.type}, by PyTorch",
        lambda tokenizer: generate(engine.weights, config.model, tokenizer, config.generation),
        lambda context, settings, stop: list(stream_token_ids(engine.weights, config.model, context, settings, stop)),
        engine.notes,
    )
