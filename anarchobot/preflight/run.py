"""Checks of the device and the run folder: disk space, memory and time."""

import tempfile
from pathlib import Path
from shutil import disk_usage

from anarchobot.config.wording import count
from anarchobot.preflight.check import REDUCE_MEMORY, Context, Outcome, check
from anarchobot.runs.checkpoint import saved_steps
from anarchobot.storage.lock import holder
from anarchobot.system.blas import blas_warning, load_fast_blas
from anarchobot.system.machine import system_memory
from anarchobot.system.memory import checkpoint_bytes, estimate
from anarchobot.system.micro_batch import MEMORY_FRACTION, resolve_micro_batch
from anarchobot.tasks.calibration import step_seconds
from anarchobot.tasks.resume import check_same_run, find_start
from anarchobot.tasks.supervise import CPU_RATE, GPU_RATE
from anarchobot.training.display import duration


@check("device", ("optional packages",), "set train.device: auto")
def device(context: Context) -> Outcome:
    """Raises UserError if train.device is not available."""
    train = context.loaded.config.train
    context.device_memory = working_set = system_memory().total
    if train.backend == "torch":
        from anarchobot.torch_backend.device import choose_device as choose_torch_device

        name = choose_torch_device(train.device).type
    else:
        import mlx.core as mx

        from anarchobot.training.device import choose_device

        name = "cpu" if choose_device(train.device).type == mx.DeviceType.cpu else "gpu"
        if name == "gpu":
            info = mx.device_info()  # Metal calls it memory_size, CUDA total_memory
            context.device_memory = int(info.get("memory_size", info.get("total_memory", context.device_memory)))
            working_set = int(info.get("max_recommended_working_set_size", context.device_memory))
    context.recommended_memory = min(round(MEMORY_FRACTION * context.device_memory), working_set)
    context.on_cpu = name == "cpu"
    found = f"{name} ({'PyTorch' if train.backend == 'torch' else 'MLX'}), {size(context.device_memory)} of memory"
    if context.on_cpu and train.precision == "float16":
        return "warn", f"{found}: float16 on a CPU is slower and less accurate than float32", "remove train.precision"
    return "pass", found


@check("BLAS", ("device",))
def blas(context: Context) -> Outcome:
    if not context.on_cpu or context.loaded.config.train.backend == "torch":
        return "pass", "not needed"
    if warning := blas_warning():
        problem, _, remedy = warning.partition(": ")
        return "warn", problem, remedy
    return "pass", str(load_fast_blas())


@check("save_dir", ("configuration",), "resume it (--resume-from auto), or choose another folder: train.save_dir")
def save_dir(context: Context) -> Outcome:
    train = context.loaded.config.train
    outcome = _writable(Path(train.save_dir), context.loaded.where("train.save_dir"), "train.save_dir")
    if outcome[0] == "pass" and train.log_path is not None:
        logs = _writable(Path(train.log_path), context.loaded.where("train.log_path"), "train.log_path")
        outcome = outcome if logs[0] == "pass" else logs
    if outcome[0] == "pass":
        find_start(context.loaded)
    return outcome


@check("run_root", ("configuration",))
def run_root(context: Context) -> Outcome:
    """adapt-vocab's output folder."""
    key = "pipeline.run_root"
    return _writable(Path(context.adapt.config.pipeline.run_root), context.adapt.where(key), key)


def _writable(folder: Path, where: str, key: str) -> Outcome:
    """Creates a temporary file in the folder, or in its nearest existing parent."""
    parent = _nearest_existing(folder)
    choose = f"choose another folder: {key}"
    if not parent.is_dir():
        return "fail", f"{where}: {folder}: {parent} is a file", choose
    if writer := holder(folder):
        return "fail", f"{where}: {folder}: {writer} is writing here", f"wait until it ends, or {choose}"
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"x")
    except OSError as error:
        return "fail", f"{where}: {folder}: cannot write to {parent}: {error.strerror}", choose
    return "pass", f"{folder}: {'exists' if parent == folder else 'will be created'} and is writable"


def _nearest_existing(folder: Path) -> Path:
    """The folder itself or its nearest existing parent; may be a file."""
    return next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)


@check(
    "resumed run",
    ("save_dir", "model and data"),
    "use the config.yaml in the run's folder, or choose another train.save_dir",
)
def resumed_run(context: Context) -> Outcome:
    start = find_start(context.loaded).checkpoint
    if start is None:
        return "pass", "starts from scratch"
    identity: dict[str, object] = {"shards": [stream.manifest.digest() for stream in context.streams]}
    if context.loaded.config.lora.r is not None and context.base is not None:
        identity["base"] = context.base.digest
    if context.teacher is not None:
        identity["teacher"] = context.teacher.digest
    check_same_run(start, context.loaded.config, identity)
    return "pass", f"resumes at step {start.step:,} from {start.folder}"


@check("disk space", ("save_dir",))
def disk(context: Context) -> Outcome:
    config = context.loaded.config
    one, keep = sum(checkpoint_bytes(config)), config.train.ckpt_keep
    folder = Path(config.train.save_dir)
    existing = min(keep + 1, len(saved_steps(folder)) if folder.is_dir() else 0)  # a resumed run replaces these
    free, required = disk_usage(_nearest_existing(folder)).free, (keep + 2 - existing) * one
    found = (
        f"{keep + 2} checkpoints of {size(one)} ({keep} kept, the best one, one being written)"
        f"{f', of which {existing} exist,' if existing else ''} need {size(required)}; {size(free)} free"
    )
    if free >= required:
        return "pass", found
    return "fail", found, "free disk space, or lower train.ckpt_keep"


@check("memory", ("device",), REDUCE_MEMORY)
def memory(context: Context) -> Outcome:
    context.loaded, messages = resolve_micro_batch(context.loaded, pairs=context.pairs)
    needed = estimate(context.loaded.config, device="cpu" if context.on_cpu else "gpu", pairs=context.pairs)
    peak, total = needed.peak, context.device_memory
    found = "; ".join([*messages, f"estimated peak {size(peak)} ({needed.phase}) of {size(total)}"])
    if peak > total:
        return "fail", found, REDUCE_MEMORY
    if peak > context.recommended_memory:
        return "warn", f"{found}, above the recommended {size(context.recommended_memory)}", REDUCE_MEMORY
    return "pass", found


@check("time", ("device", "memory"), "fix the problem: training would fail the same way")
def run_time(context: Context) -> Outcome:
    if not context.calibrate:
        return "skip", "--no-calibration"
    config, train = context.loaded.config, context.loaded.config.train
    rate = GPU_RATE if not context.on_cpu else CPU_RATE if load_fast_blas() is not None else CPU_RATE / 15
    rows = (2 if context.pairs else 1) * train.micro_batch_size
    seconds, method = step_seconds(config, context.base, rows, rate)
    tokens = rows * train.grad_accum_steps * config.data.seq_len
    prefix = {"measured": "", "upper bound": "at most ", "estimate": "not measured, estimated from FLOPs: "}[method]
    found = f"{prefix}{seconds:.3g} s per step, {tokens / seconds:,.0f} tokens/s"
    if context.steps is not None:
        total = duration(seconds * context.steps)
        found = f"{total} for {count(context.steps, 'step')}, without validation and checkpoints: {found}"
    if config.grpo.rewards is not None:
        found = f"{found}; without sampling the completions"
    return "pass", found


def size(number: int) -> str:
    """`1.2 GB`, `3.4 MB`: decimal units."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
