"""Checks of what a run takes of the machine: its folder, the disk, memory, time."""

import tempfile
from pathlib import Path

from anarchobot.preflight.calibration import step_seconds
from anarchobot.preflight.check import SMALLER, Answer, Question, Setup
from anarchobot.runs.checkpoint import saved_steps
from anarchobot.storage.lock import holder
from anarchobot.system.blas import no_blas_message
from anarchobot.system.memory import checkpoint_bytes, estimate
from anarchobot.system.micro_batch import MEMORY_FRACTION, resolve_micro_batch
from anarchobot.tasks.resume import check_same_run
from anarchobot.tasks.run import find_start
from anarchobot.tasks.supervise import CPU_RATE, GPU_RATE
from anarchobot.training.display import duration


def device(setup: Setup) -> Answer:
    """Raises UserError when a GPU is asked for and there is none."""
    train = setup.loaded.config.train
    setup.memory = setup.machine.memory()
    if train.backend == "torch":
        from anarchobot.torch_backend.device import choose_device as choose_torch_device

        named = choose_torch_device(train.device).type
    else:
        import mlx.core as mx

        from anarchobot.training.device import choose_device

        named = "cpu" if choose_device(train.device).type == mx.DeviceType.cpu else "gpu"
        if named == "gpu":
            setup.memory = int(mx.device_info().get("memory_size", setup.memory))
    setup.on_cpu = named == "cpu"
    found = f"{named} ({'PyTorch' if train.backend == 'torch' else 'MLX'}), {size(setup.memory)} of memory"
    if setup.on_cpu and train.precision == "float16":
        return Answer(
            "warn", f"{found}: float16 on a CPU is slower than float32, and less exact", "leave train.precision out"
        )
    return Answer("pass", found)


def blas(setup: Setup) -> Answer:
    if not setup.on_cpu or setup.loaded.config.train.backend == "torch":
        return Answer("pass", "not needed")
    found = setup.machine.blas()
    if found is None:
        what, _, how = no_blas_message().partition(": ")
        return Answer("warn", what, how)
    return Answer("pass", found)


def save_dir(setup: Setup) -> Answer:
    train = setup.loaded.config.train
    answer = _writable(Path(train.save_dir), setup.loaded.where("train.save_dir"), "train.save_dir")
    if answer.status == "pass" and train.log_path is not None:
        logs = _writable(Path(train.log_path), setup.loaded.where("train.log_path"), "train.log_path")
        answer = answer if logs.status == "pass" else logs
    if answer.status == "pass":
        find_start(setup.loaded)
    return answer


def run_root(setup: Setup) -> Answer:
    """Of adapt-vocab."""
    key = "pipeline.run_root"
    return _writable(Path(setup.adapt.config.pipeline.run_root), setup.adapt.where(key), key)


def _writable(folder: Path, where: str, key: str) -> Answer:
    """Tried with a file that has no name, in the first folder that is there."""
    there = _there(folder)
    choose = f"choose another folder: {key}"
    if not there.is_dir():
        return Answer("fail", f"{where}: {folder}: {there} is a file", choose)
    if told := holder(folder):
        return Answer("fail", f"{where}: {folder}: {told} is writing here", f"wait for its end, or {choose}")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        return Answer("fail", f"{where}: {folder}: {there} can't be written to: {error.strerror}", choose)
    return Answer("pass", f"{folder}: {'there' if there == folder else 'will be made'}, and can be written to")


def _there(folder: Path) -> Path:
    """The folder itself, or the first one above it that is there (or the file in its way)."""
    return next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)


def resumed_run(setup: Setup) -> Answer:
    start = find_start(setup.loaded).checkpoint
    if start is None:
        return Answer("pass", "begins anew")
    identity: dict[str, object] = {"shards": [stream.manifest.digest() for stream in setup.streams]}
    if setup.loaded.config.lora.r is not None and setup.base is not None:
        identity["base"] = setup.base.digest
    check_same_run(start, setup.loaded.config, identity)
    return Answer("pass", f"goes on at step {start.step:,}, from {start.folder}")


def disk(setup: Setup) -> Answer:
    config = setup.loaded.config
    one, keep = sum(checkpoint_bytes(config)), config.train.ckpt_keep
    folder = Path(config.train.save_dir)
    there = min(keep + 1, len(saved_steps(folder)) if folder.is_dir() else 0)  # which a resumed run replaces
    free, wanted = setup.machine.free(_there(folder)), (keep + 2 - there) * one
    parts = f"{keep + 2} checkpoints of {size(one)} ({keep} kept, the best one, one being written)"
    found = f"{parts}{f', of which {there} are there,' if there else ''} take {size(wanted)}; {size(free)} are free"
    return Answer("pass", found) if free >= wanted else Answer("fail", found, "make room, or lower train.ckpt_keep")


def memory(setup: Setup) -> Answer:
    setup.loaded, chosen = resolve_micro_batch(setup.loaded, pairs=setup.pairs)  # train.micro_batch_size: auto
    needed = estimate(setup.loaded.config, device="cpu" if setup.on_cpu else "gpu", pairs=setup.pairs)
    peak, whole = needed.peak, setup.memory
    told = f"{size(peak)} at the peak ({needed.phase}), by estimate; there are {size(whole)}"
    found = "; ".join([*chosen, told])
    if peak > whole:
        return Answer("fail", found, SMALLER)
    if peak > MEMORY_FRACTION * whole:
        return Answer("warn", f"{found}, of which {MEMORY_FRACTION:.0%} are comfortable", SMALLER)
    return Answer("pass", found)


def run_time(setup: Setup) -> Answer:
    if not setup.calibrate:
        return Answer("skip", "not asked for (--no-calibration)")
    config, train = setup.loaded.config, setup.loaded.config.train
    rate = GPU_RATE if not setup.on_cpu else CPU_RATE if setup.machine.blas() is not None else CPU_RATE / 15
    rows = (2 if setup.pairs else 1) * train.micro_batch_size
    seconds, how = step_seconds(config, setup.base, rows, rate)
    tokens = rows * train.grad_accum_steps * config.data.seq_len
    known = {"measured": "", "at most": "at most ", "a guess": "not measured, by its operations some "}[how]
    found = f"{known}{seconds:.3g} s a step, {tokens / seconds:,.0f} tokens/s"
    if setup.steps is not None:
        found = f"{duration(seconds * setup.steps)} for {setup.steps:,} steps: {found}; validation and saving besides"
    return Answer("pass", found)


def size(number: int) -> str:
    """`1.2 GB`, `3.4 MB`; of 10^9 and 10^6 bytes."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


DEVICE = Question("device", device, ("packages it asks for",), "set train.device: auto")
BLAS = Question("BLAS", blas, ("device",))
SAVE_DIR = Question(
    "save_dir",
    save_dir,
    ("configuration",),
    "go on with it (--resume-from auto), or choose another folder: train.save_dir",
)
RESUMED_RUN = Question(
    "resumed run",
    resumed_run,
    ("save_dir", "model and data"),
    "use the config.yaml that lies in its folder, or choose another train.save_dir",
)
RUN_ROOT = Question("run_root", run_root, ("configuration",))
DISK = Question("disk space", disk, ("save_dir",))
MEMORY = Question("memory", memory, ("device",), SMALLER)
TIME = Question("time", run_time, ("device", "memory"), "mend what is named: training would begin so")
