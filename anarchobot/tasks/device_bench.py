"""`anarchobot bench --device`: is the device right, and which technique of a training step is fastest on it?

The checks are in tasks/device_checks.py. Then variants of a configuration's micro-batch and mlx-lm's take turns, so
that a busy or hot machine slows all of them. The fastest variant whose whole step is within the memory budget is stored
for `train.technique: auto`. The result names no user, machine or path, so that it can be attached to an issue.

Importing this module imports MLX: call `load_fast_blas` first.
"""

import gc
import importlib
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.utils import value_and_grad

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.config.schema import Config, Technique
from anarchobot.data.conversations.preference_pairs import PairBatch
from anarchobot.data.windows import Batch
from anarchobot.model.architecture import CPU_LOSS_CHUNK, GPU_LOSS_CHUNK, architecture
from anarchobot.model.parameters import init_parameters, parameter_count
from anarchobot.numerics.device import on_cpu
from anarchobot.system.machine import system_memory
from anarchobot.system.memory import AUTODIFF_MEMORY, estimate, expected_precision
from anarchobot.system.micro_batch import memory_budget, resolve_micro_batch
from anarchobot.system.packages import environment_info
from anarchobot.system.peak_flops import apple_gpu_cores
from anarchobot.system.technique import (
    DeviceKind,
    StepSettings,
    Task,
    default_settings,
    has_segments,
    with_settings,
    write_measured,
)
from anarchobot.tasks.device_checks import check_gradients, check_orthogonalization
from anarchobot.tasks.technique import technique_key
from anarchobot.training.device import DTYPES, choose_device, device_kind
from anarchobot.training.mlx_engine import MLXEngine
from anarchobot.training.preference_engine import PreferenceEngine

FIRST_ROUND, SECOND_ROUND, ALL_ROUNDS = 95.0, 140.0, 170.0  # seconds after the start at which no more runs begin
MARGIN = 0.03  # by which other settings must be faster than the device's default: less may be noise
MOST_TURNS = 7  # that count, of each variant in a round
LONG_RUN = 10.0  # seconds: the first run of a variant, which may compile, counts if it is longer than any compilation
DEVICE_INFO = ("architecture", "memory_size", "max_recommended_working_set_size", "max_buffer_length", "resource_limit")
VERSIONS = ("Python", "anarchobot", "mlx", "mlx-lm", "numpy")
FAILURES = (MemoryError, RuntimeError, ValueError, UserError)  # UserError: the GPU's watchdog

Weights = Mapping[str, npt.NDArray[np.float32]]
Log = Callable[[str], object]


class Variant(NamedTuple):
    """A way to compute the gradients of a micro-batch; `settings` None: mlx-lm's."""

    settings: StepSettings | None
    checkpointing: bool


@dataclass
class Measured:
    """Seconds of each run, by round and turn; peak memory above what was in use before a run; `error`: why there are no
    more runs, or why it is not chosen."""

    seconds: dict[tuple[int, int], float] = field(default_factory=dict)
    peak: int = 0
    error: str | None = None

    @property
    def last_round(self) -> list[float]:
        """The seconds in the last round that the variant took part in: times of different rounds are not comparable."""
        last = max((number for number, _ in self.seconds), default=0)
        return [seconds for (number, _), seconds in self.seconds.items() if number == last]

    @property
    def median(self) -> float | None:
        return statistics.median(self.last_round) if self.seconds else None

    @property
    def rank(self) -> tuple[int, float]:
        """Sorts by speed. The variants of the second round include the fastest of the first."""
        return -max(number for number, _ in self.seconds), statistics.median(self.last_round)

    def relative_to(self, other: "Measured") -> float | None:
        """The median ratio of the times in the same turns."""
        ratios = [t / other.seconds[turn] for turn, t in self.seconds.items() if turn in other.seconds]
        return statistics.median(ratios) if ratios else None


def device_bench(loaded: LoadedConfig, task: Task = "pretrain", log: Log = lambda text: None) -> dict[str, Any]:
    """Measures for at most three minutes, stores the fastest settings, and returns the result for the JSON file. `log`
    gets a line for each part.

    Raises UserError for the PyTorch backend and for a GPU that is missing.
    """
    began = time.perf_counter()
    loaded, _ = resolve_micro_batch(loaded, pairs=task == "dpo")
    config = loaded.config
    if config.train.backend == "torch":
        raise UserError(f"{loaded.where('train.backend')}: bench measures the MLX backend only: leave torch out")
    choose_device(config.train.device)
    kind, precision = device_kind(), expected_precision(config.train, "cpu" if on_cpu() else "gpu")
    defaults = default_settings(_open(config), kind, precision)
    result: dict[str, Any] = {"device": _device(kind), "versions": _versions(), "run": _run(config, task, precision)}

    log("gradients against the CPU's")
    precisions = ["float32"] if kind == "cpu" and precision == "float32" else ["float32", "bfloat16"]
    result["gradients"] = list(_gradients(config, _techniques(kind), precisions, has_segments(config, task)))
    log("singular values of Muon's updates")
    result["orthogonalization"] = _attempt(partial(check_orthogonalization, config))
    choose_device(config.train.device)
    result["synchronization_us"] = 1e6 * _synchronization()

    wrong = {found["technique"] for found in result["gradients"] if not found.get("right")}
    bench = _Bench(config, task, defaults, wrong, log)
    own = config.train.gradient_checkpointing
    order = sorted(_techniques(kind), key=lambda technique: technique != defaults.technique)  # the default first
    techniques = [Variant(defaults._replace(technique=technique), own) for technique in order]
    peers = [Variant(None, own), Variant(None, not own)]
    bench.take_turns([*techniques, peers[0]], began + FIRST_ROUND)
    if fastest := bench.by_speed(own):
        best = fastest[0]
        assert best.settings is not None
        others = [best._replace(settings=s) for s in _alternatives(best.settings, config)]
        turns = [best, peers[0], *others, best._replace(checkpointing=not own), peers[1]]
        bench.take_turns(turns, began + SECOND_ROUND)
    result["chosen"], result["step"] = bench.choose(own, began + ALL_ROUNDS)
    result["variants"] = bench.rows()
    if result["chosen"] is not None:
        write_measured(technique_key(config, task), StepSettings(**result["chosen"]))
    result["seconds"] = time.perf_counter() - began
    return result


def _open(config: Config) -> Config:
    """Leaves technique, loss_chunk and compile to the device."""
    open_settings = {"technique": "auto", "loss_chunk": None, "compile": None}
    return config.model_copy(update={"train": config.train.model_copy(update=open_settings)})


def _techniques(kind: DeviceKind) -> list[Technique]:
    return ["blocked", "fused", *(["sdpa"] if kind == "cuda" else []), "autodiff"]  # type: ignore[list-item]


def _alternatives(settings: StepSettings, config: Config) -> Iterator[StepSettings]:
    """Other chunks of the loss, and the other choice of compilation."""
    tokens = config.train.micro_batch_size * config.data.seq_len
    chunks = {min(chunk, tokens) for chunk in (CPU_LOSS_CHUNK, GPU_LOSS_CHUNK, tokens)}
    for chunk in sorted(chunks - {min(settings.loss_chunk, tokens)}):
        yield settings._replace(loss_chunk=chunk)
    yield settings._replace(compile=not settings.compile)


# ---- Device and configuration ----


def _device(kind: DeviceKind) -> dict[str, Any]:
    info = mx.device_info()
    return {
        "kind": kind,
        "name": info["device_name"],
        **{key: info[key] for key in DEVICE_INFO if key in info},
        "gpu_cores": apple_gpu_cores() if kind == "metal" else None,
        "cpu_cores": os.cpu_count(),
        "machine_memory": system_memory().total,
        "system": f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else platform.system(),
        "processor": platform.machine(),
    }


def _versions() -> dict[str, str]:
    info = environment_info("")
    return {name: info[name] for name in VERSIONS if name in info}


def _run(config: Config, task: Task, precision: str) -> dict[str, Any]:
    """The numbers of the configuration that decide what a step costs. No paths."""
    train = config.train
    return {
        "task": task,
        "precision": precision,
        "parameters": parameter_count(config.model),
        "model": config.model.model_dump(),
        "seq_len": config.data.seq_len,
        "segments": has_segments(config, task),
        "lora_r": config.lora.r,
        **{
            key: getattr(train, key)
            for key in ("micro_batch_size", "grad_accum_steps", "gradient_checkpointing", "optimizer", "trainable")
        },
    }


def _gradients(
    config: Config, techniques: list[Technique], precisions: list[str], segments: bool
) -> Iterator[dict[str, Any]]:
    for technique in techniques:
        found = _attempt(partial(check_gradients, config, technique, precisions, segments))
        yield from ([{"technique": technique, **found}] if isinstance(found, dict) else found)


def _attempt(work: Callable[[], Any]) -> Any:
    """The result, or {"error": why there is none}: a check that fails must not keep the others from the user."""
    try:
        return work()
    except FAILURES as error:
        return {"error": _failure(error)}


def _failure(error: Exception) -> str:
    """The first line of an error, without paths, which may contain names."""
    text = str(error).partition("\n")[0][:300]
    text = re.sub(r"(?<!\w)(~|[A-Za-z]:)?[/\\][^\s'\":,;)]+", "[path]", text)
    return f"out of memory: {text}" if isinstance(error, MemoryError) else text


def _synchronization() -> float:
    """Seconds of the smallest possible evaluation, the median of 50."""
    times = []
    for i in range(50):
        began = time.perf_counter()
        mx.eval(mx.array(float(i)) + 1)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


# ---- Variants of a step ----


class _Bench:
    """Measures variants of the configuration's micro-batch on random tokens."""

    def __init__(
        self, config: Config, task: Task, default: StepSettings, wrong: Collection[Technique], log: Log
    ) -> None:
        """`default`: the device's settings; `wrong`: techniques that are measured but not chosen."""
        self._config, self._task, self._default, self._wrong, self._log = config, task, default, wrong, log
        self._budget = memory_budget(config)
        self._weights: Weights = init_parameters(config.model, config.train.seed)
        self._shared: MLXEngine | None = None  # whose weights the others use
        self._batch = _random_batch(config, task, 1)
        self._steps: dict[Variant, Callable[[], object]] = {}
        self._round = 0
        self.measured: dict[Variant, Measured] = {}

    def take_turns(self, variants: list[Variant], stop: float) -> None:
        """Runs the variants in turn, up to MOST_TURNS times each. No run begins that would probably end after `stop`,
        a time of `perf_counter`. A variant that fails is not run again."""
        longest, self._round = 0.0, self._round + 1
        for turn in range(1 + MOST_TURNS):
            for variant in variants:
                found = self.measured.setdefault(variant, Measured())
                expected = list(found.seconds.values())[-1] if found.seconds else longest
                if found.error is None and time.perf_counter() + expected <= stop:
                    longest = max(longest, self._run(variant, found, turn))
        for variant in variants:
            found = self.measured[variant]
            if not found.seconds and found.error is None:
                found.error = "not measured: no time left"
            self._log(f"  {describe(variant)}: {found.error or f'{1e3 * (found.median or 0):,.0f} ms'}")

    def _run(self, variant: Variant, found: Measured, turn: int) -> float:
        """Returns the seconds of the run; the first of a round does not count."""
        try:
            if variant not in self._steps:
                self._steps[variant] = self._build(variant)
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            began = time.perf_counter()
            self._steps[variant]()
            seconds = time.perf_counter() - began
            if turn > 0 or seconds > LONG_RUN:
                found.seconds[self._round, turn] = seconds
                found.peak = max(found.peak, mx.get_peak_memory() - before)
            return seconds
        except FAILURES as error:
            found.error = _failure(error)
        self._steps.pop(variant, None)
        mx.clear_cache()
        return 0.0

    def _build(self, variant: Variant) -> Callable[[], object]:
        """A function that computes the gradients of a micro-batch. Raises MemoryError if the estimate is above the
        memory budget: a Mac would swap instead of failing."""
        config = self._variant_config(variant)
        need = estimate(config, pairs=self._task == "dpo")
        peak, static = need.peak, need.weights + need.optimizer
        if variant.settings is None:  # mlx-lm differentiates automatically
            peak = static + AUTODIFF_MEMORY * (peak - static)
        if peak > self._budget:
            raise MemoryError(
                f"an estimated {peak / 1e9:.2f} GB, and the budget is {self._budget / 1e9:.2f} GB: not run"
            )
        if variant.settings is None:
            if self._task == "dpo" or config.lora.r is not None:
                raise ValueError("not measured: mlx-lm is compared in training of all weights on sequences only")
            return _mlx_lm_step(config, self._batch, variant.checkpointing)
        engine = self._engine(config)
        engine.moments = {}  # not needed for gradients
        if self._shared is None:
            self._shared = engine
        engine.params, engine.frozen = self._shared.params, self._shared.frozen

        def run() -> None:
            _, grads = engine._accumulate_gradients(self._batch, 1, 1 / self._batch.inputs.size)
            mx.eval(grads)

        return run

    def _variant_config(self, variant: Variant) -> Config:
        train = self._config.train.model_copy(update={"gradient_checkpointing": variant.checkpointing})
        config = self._config.model_copy(update={"train": train})
        return config if variant.settings is None else with_settings(config, variant.settings)

    def _engine(self, config: Config) -> MLXEngine:
        engine = PreferenceEngine if self._task == "dpo" else MLXEngine
        return engine(config, dict(self._weights))

    def by_speed(self, checkpointing: bool) -> list[Variant]:
        """The variants that can be chosen, with this choice of checkpointing. The device's default gets a margin."""
        variants = [
            variant
            for variant, found in self.measured.items()
            if variant.settings is not None and variant.settings.technique not in self._wrong
            and variant.checkpointing == checkpointing and found.seconds and found.error is None
        ]  # fmt: skip

        def key(variant: Variant) -> tuple[int, float]:
            number, seconds = self.measured[variant].rank
            return number, seconds * (1 - MARGIN if variant.settings == self._default else 1)

        return sorted(variants, key=key)

    def choose(self, checkpointing: bool, stop: float) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The settings of the fastest variant whose whole step is within the memory budget, and the step's figures.
        Both are None if no variant is, or only one was measured. Frees everything else."""
        order = self.by_speed(checkpointing)
        if len(order) < 2:
            return None, None
        self._steps.clear()
        self._shared = None
        gc.collect()
        mx.clear_cache()
        for variant in order:
            assert variant.settings is not None
            settings = variant.settings._asdict()
            if (
                time.perf_counter() + 6 * (self.measured[variant].median or 0) > stop
            ):  # two steps of two micro-batches and an update
                return settings, {"error": "not measured: no time left"}
            step = _attempt(partial(self._whole_step, self._variant_config(variant)))
            if "error" not in step and step["peak_memory"] <= self._budget:
                return settings, {**settings, **step}
            self.measured[variant].error = step.get("error", "out of memory: the whole step is above the budget")
            self._log(f"  {describe(variant)}: {self.measured[variant].error}")
        return None, None

    def _whole_step(self, config: Config) -> dict[str, Any]:
        """Time and peak memory of a step of at most two micro-batches, after a first one."""
        before = mx.get_active_memory()
        engine, batch = self._engine(config), _random_batch(config, self._task, min(2, config.train.grad_accum_steps))
        seconds = 0.0
        for number in (1, 2):
            mx.reset_peak_memory()
            began = time.perf_counter()
            engine.train_step(batch, number, 0.0, config.train.momentum)  # a rate of zero: nothing changes
            seconds = time.perf_counter() - began
        peak, estimated = mx.get_peak_memory() - before, estimate(config, pairs=self._task == "dpo").peak
        return {
            "micro_batches": len(batch.inputs),
            "ms": 1e3 * seconds,
            "peak_memory": peak,
            "estimated_memory": estimated,
            "estimate_by_peak": estimated / peak,
            "memory_budget": self._budget,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One for each variant, with ratios to mlx-lm with the same checkpointing."""
        rows = []
        for variant, found in self.measured.items():
            peer = self.measured.get(Variant(None, variant.checkpointing), Measured())
            seconds, peak = found.median, found.peak or None
            rows.append(
                {
                    "program": "mlx-lm" if variant.settings is None else "anarchobot",
                    **(variant.settings._asdict() if variant.settings else {}),
                    "gradient_checkpointing": variant.checkpointing,
                    "runs": len(found.last_round),
                    "ms": None if seconds is None else 1e3 * seconds,
                    "peak_memory": peak,
                    "time_by_mlx_lm": found.relative_to(peer),
                    "peak_by_mlx_lm": peak / peer.peak if peak and peer.peak else None,
                    "error": found.error,
                }
            )
        return rows


def describe(variant: Variant) -> str:
    checkpointed = ", checkpointed" if variant.checkpointing else ""
    if variant.settings is None:
        return f"mlx-lm{checkpointed}"
    technique, chunk, compiled = variant.settings
    return f"{technique}, loss_chunk {chunk}{'' if compiled else ', not compiled'}{checkpointed}"


def _random_batch(config: Config, task: Task, micro_batches: int) -> Batch:
    """Of the task's shape; with segments, two in each sequence."""
    model, rows, length = config.model, config.train.micro_batch_size, config.data.seq_len
    draw = np.random.default_rng(config.train.seed)
    pairs = (2,) if task == "dpo" else ()
    ids = draw.integers(0, model.vocab_size, (micro_batches, rows, *pairs, length + 1), np.int32)
    inputs, targets = ids[..., :-1].copy(), ids[..., 1:].copy()
    if task == "dpo":
        shape = (micro_batches, rows)
        indices = np.arange(micro_batches * rows).reshape(shape)
        reference = np.full((*shape, 2), -length * np.log(model.vocab_size), np.float32)
        return PairBatch(inputs, targets, indices=indices, ref_log_probs=reference)
    halves = np.broadcast_to(np.arange(length, dtype=np.int32) // -(-length // 2), inputs.shape).copy()
    return Batch(inputs, targets, halves if has_segments(config, task) else None)


def _mlx_lm_step(config: Config, batch: Batch, checkpointing: bool) -> Callable[[], Any]:
    """The gradients of mlx-lm's model and loss, compiled as in its `train`, with weights in the dtype of our products:
    its users load bfloat16. It has no document mask. Raises ValueError for a model that mlx-lm does not have."""
    from mlx_lm.tuner import trainer

    model, llama = config.model, architecture(config.model.architecture)
    if missing := list(llama.unsupported_for_export(model, "mlx")):
        raise ValueError(f"not measured: mlx-lm does not have this model ({missing[0]})")
    values = llama.to_hf(model)
    module = importlib.import_module(f"mlx_lm.models.{values['model_type']}")
    peer = module.Model(module.ModelArgs.from_dict(values))
    peer.set_dtype(DTYPES[expected_precision(config.train, "cpu" if on_cpu() else "gpu")])
    if checkpointing:
        layer_class = type("Checkpointed", (type(peer.layers[0]),), {})  # grad_checkpoint changes it for all models
        for layer in peer.layers:
            layer.__class__ = layer_class
        trainer.grad_checkpoint(peer.layers[0])  # type: ignore[no-untyped-call]
    peer.train()
    mx.eval(peer.parameters())
    gradients = value_and_grad(peer, trainer.default_loss)
    rows = mx.array(np.concatenate([batch.inputs[0], batch.targets[0][:, -1:]], axis=1))  # [B, L + 1]
    lengths = mx.array([[0, config.data.seq_len]] * len(rows))

    step = mx.compile(partial(gradients, peer), inputs=peer.state, outputs=peer.state)

    def run() -> Any:
        result = step(rows, lengths)
        mx.eval(result)
        return result

    return run
