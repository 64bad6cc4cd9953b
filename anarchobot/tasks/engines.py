"""Opens the engine that the config selects, MLX or PyTorch, with everything else that a run needs from it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config, GenerationConfig
from anarchobot.system.blas import blas_warning, load_fast_blas
from anarchobot.system.peak_flops import apple_gpu_cores, peak_tflops
from anarchobot.tokenizers.tokenizer import ChatTokenizer
from anarchobot.training.engine import Engine
from anarchobot.training.ranks import SINGLE_PROCESS, Ranks, detect_launcher, init_distributed

if TYPE_CHECKING:
    from anarchobot.training.grpo_engine import GRPOEngine
    from anarchobot.training.mlx_engine import MLXEngine
    from anarchobot.training.preference_engine import PreferenceEngine

Weights = Mapping[str, npt.NDArray[Any]]  # float32, and the integers of quantized matrices


@dataclass(frozen=True)
class EngineHandle:
    """`device` names precision and device for the user. `sample` generates text by the config's generation section from
    the current weights; `generate_ids` continues a context up to one of the stop ids. `peak_tflops` is the GPU's peak,
    if known."""

    engine: Engine
    precision: str
    device: str
    sample: Callable[[ChatTokenizer], str]
    generate_ids: Callable[[list[int], GenerationConfig, Collection[int]], list[int]]
    warnings: list[str] = field(default_factory=list)
    peak_tflops: float | None = None


def open_ranks(config: Config) -> Ranks:
    """This process among those that mlx.launch or mpirun started for the run. Raises UserError for PyTorch, which
    trains in a single process, and if the ranks cannot be joined."""
    if detect_launcher() is None:
        return SINGLE_PROCESS
    if config.train.backend == "torch":
        raise UserError(
            "train.backend: torch trains in a single process: set train.backend to mlx, or start it without mlx.launch"
        )
    load_fast_blas()  # before MLX
    return init_distributed()


def open_engine(config: Config, weights: Weights | None = None, ranks: Ranks = SINGLE_PROCESS) -> EngineHandle:
    """`weights`: initial weights (None: random). Imports only the selected backend. Raises UserError if its
    device or package is missing."""
    if config.train.backend == "torch":
        return _open_torch(config, weights)
    load_fast_blas()  # before MLX, which the next lines import
    from anarchobot.training.distillation_engine import DistillationEngine
    from anarchobot.training.mlx_engine import MLXEngine

    engine = MLXEngine if config.train.teacher is None else DistillationEngine
    return _open_mlx(engine(config, weights, ranks), config)


def open_preference_engine(
    config: Config, weights: Weights, ranks: Ranks = SINGLE_PROCESS
) -> "tuple[EngineHandle, PreferenceEngine]":
    """The engine for preference pairs or labeled answers, in MLX only. Raises UserError for PyTorch."""
    if config.train.backend == "torch":
        raise UserError("train.backend: torch has no preference tuning: set train.backend to mlx")
    load_fast_blas()  # before MLX, which the next line imports
    from anarchobot.training.kto_engine import KTOEngine
    from anarchobot.training.preference_engine import PreferenceEngine

    engine = (KTOEngine if config.preference.loss == "kto" else PreferenceEngine)(config, weights, ranks)
    return _open_mlx(engine, config, pairs=True), engine


def open_grpo_engine(config: Config, weights: Weights) -> "tuple[EngineHandle, GRPOEngine]":
    """The engine for sampled completions, in MLX only. Raises UserError for PyTorch."""
    if config.train.backend == "torch":
        raise UserError("train.backend: torch has no grpo: set train.backend to mlx")
    load_fast_blas()  # before MLX, which the next line imports
    from anarchobot.training.grpo_engine import GRPOEngine

    engine = GRPOEngine(config, weights)
    return _open_mlx(engine, config), engine


def _open_mlx(engine: "MLXEngine", config: Config, *, pairs: bool = False) -> EngineHandle:
    import mlx.core as mx

    from anarchobot.inference.generation import generate, stream_token_ids
    from anarchobot.inference.model import Model
    from anarchobot.training.device import limit_memory

    limit_memory(config, pairs=pairs)
    on_gpu = engine.device.type == mx.DeviceType.gpu
    return EngineHandle(
        engine,
        engine.precision,
        f"{engine.precision} on the {'GPU' if on_gpu else 'CPU'} (MLX)",
        lambda tokenizer: generate(Model(engine.weights, config.model, tokenizer), config.generation),
        lambda context, settings, stop: list(stream_token_ids(engine.weights, config.model, context, settings, stop)),
        [warning] if not on_gpu and (warning := blas_warning()) else [],
        peak_tflops(str(mx.device_info()["device_name"]), apple_gpu_cores(), engine.precision) if on_gpu else None,
    )


def _open_torch(config: Config, weights: Weights | None) -> EngineHandle:
    from anarchobot.torch_backend.engine import TorchEngine
    from anarchobot.torch_backend.generation import generate, stream_token_ids

    if config.train.teacher is not None:
        raise UserError("train.backend: torch has no distillation: remove train.teacher, or set train.backend to mlx")
    if config.lora.r is not None:
        raise UserError("train.backend: torch has no LoRA: remove lora.r, or set train.backend to mlx")
    if config.train.trainable != "all":
        raise UserError("train.backend: torch trains all weights: set train.trainable: all, or train.backend: mlx")
    if config.model.architecture != "llama":
        raise UserError(f"train.backend: torch has no {config.model.architecture}: set train.backend to mlx")
    if config.model.attention_softcap is not None:
        raise UserError("train.backend: torch has no model.attention_softcap: set train.backend to mlx")
    engine = TorchEngine(config, weights)
    return EngineHandle(
        engine,
        engine.precision,
        f"{engine.precision} on {engine.device.type} (PyTorch)",
        lambda tokenizer: generate(engine.weights, config.model, tokenizer, config.generation),
        lambda context, settings, stop: list(stream_token_ids(engine.weights, config.model, context, settings, stop)),
        engine.warnings,
    )
