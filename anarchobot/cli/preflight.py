"""Commands to run before training: `anarchobot verify`, `plan`, `bench` and `selftest`."""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anarchobot.cli.parser import add_command, add_config, check_output, overrides, positive
from anarchobot.config.errors import UserError
from anarchobot.config.wording import count

CHECK_COUNTS = {"pass": "passed", "warn": "warned", "fail": "failed", "skip": "skipped"}
DEVICE_FILE = Path("anarchobot-device.json")
MEMORY_PARTS = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer state", "activations": "activations",
    "logits": "logits of a chunk", "update": "update",
}  # fmt: skip


def add_commands(commands: Any) -> None:
    verify = add_command(
        commands,
        "verify",
        _verify,
        "check machine, configuration, data and folders before a run",
        epilog="Exit codes: 0 no check failed, 1 a check failed, 2 usage error.",
    )
    add_config(verify)
    verify.add_argument("--no-calibration", action="store_true", help="skip timing; do not estimate run time")

    plan = add_command(commands, "plan", _plan, "estimate memory, tokens, FLOPs and disk space of a run")
    add_config(plan)
    plan.add_argument(
        "--deadline",
        metavar="TIME",
        help="hours, or a time such as 8h or 2d: shows the tokens per second needed to finish (default: none)",
    )

    bench = add_command(commands, "bench", _bench, "measure the parts of a training step on random tokens")
    add_config(bench)
    bench.add_argument(
        "--steps", type=positive, metavar="N", help="repetitions per part; the median is reported (default: 5)"
    )
    bench.add_argument(
        "--device",
        action="store_true",
        help="check the device and find the fastest technique, for at most three minutes; train.technique auto uses it",
    )
    bench.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"with --device: JSON file for an issue, without personal data (default: {DEVICE_FILE})",
    )

    selftest = add_command(
        commands, "selftest", _selftest, "run fault-injection tests on this machine: kills, corrupt files, disk errors"
    )
    selftest.add_argument(
        "--faults", action="store_true", required=True, help="run the tests; takes minutes (required)"
    )
    selftest.add_argument("--kills", type=positive, default=10, metavar="N", help="number of runs to kill")
    selftest.add_argument("--seed", type=int, default=0, metavar="S", help="random seed for the faults")


# --- verify


def _verify(args: argparse.Namespace) -> int:
    from anarchobot.preflight.verify import verify

    # args.settings rather than `overrides`, which imports packages that may be missing.
    checks = verify(args.config, args.settings, calibrate=not args.no_calibration, name=args.config_name)
    counts = {word: sum(check.status == status for check in checks) for status, word in CHECK_COUNTS.items()}
    if args.json:
        print(json.dumps({**counts, "checks": [check._asdict() for check in checks]}, indent=1))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            if args.quiet and check.status in ("pass", "skip"):
                continue
            print(f"{check.status}  {check.name.ljust(width)}  {check.found}")
            if check.advice:
                print(f"{'':{width + 6}}  -> {check.advice}")
        print(", ".join(f"{number} {word}" for word, number in counts.items()))
    return int(counts["failed"] > 0)


# --- plan


def _plan(args: argparse.Namespace) -> None:
    deadline = None if args.deadline is None else parse_hours(args.deadline)
    from anarchobot.preflight.plan import load_plan, plan

    result = plan(load_plan(args.config, overrides(args)), deadline)
    print(json.dumps(result) if args.json else "\n".join(_plan_lines(result)))


def parse_hours(text: str) -> float:
    """Parses `8`, `8h`, `2d` or `1.5d` to hours. Raises UserError for anything else."""
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)([hd]?)", text)
    value = float(match[1]) * (24 if match[2] == "d" else 1) if match else 0.0
    if value == 0:
        raise UserError(f"argument --deadline: expected a time > 0, such as 8, 8h or 2d, got '{text}'")
    return value


def _plan_lines(result: dict[str, Any]) -> Iterator[str]:
    memory, checkpoint, unit = result["memory"], result["checkpoint"], result["unit"]
    micro_batch, num_micro_batches = result["micro_batch_size"], result["grad_accum_steps"]
    trained = result["trained_parameters"]
    yield f"{result['parameters']:,} parameters" + ("" if trained == result["parameters"] else f", {trained:,} trained")
    yield (
        f"step: {micro_batch * num_micro_batches} {unit} in micro-batches of {micro_batch}, "
        f"{result['tokens_per_step']:,} tokens"
    )
    yield ""
    yield f"estimated memory, {result['precision']} on {result['device']}"
    for key, name in MEMORY_PARTS.items():
        yield f"  {name:<19}{_size(memory[key]):>10}"
    yield f"  {'peak':<19}{_size(memory['peak']):>10}   in the {memory['phase']} phase"
    saving = _size(checkpoint["model_bytes"] + checkpoint["optimizer_bytes"])
    yield f"  {'while saving':<18}{'+' + saving:>11}   at most"
    yield ""
    yield f"  {'precision':<12}{'peak':>10}{'gradient_checkpointing':>26}"
    for plain, checkpointed in zip(result["peaks"][::2], result["peaks"][1::2], strict=True):
        yield f"  {plain['precision']:<12}{_size(plain['peak']):>10}{_size(checkpointed['peak']):>26}"
    yield ""
    largest = result["largest_micro_batch"]
    budget, machine = _size(result["budget_bytes"]), _size(result["machine_bytes"])
    whole = ", the whole step" if largest == micro_batch * num_micro_batches else ""
    found = f"{largest} {unit}{whole}" if largest else "none fits"
    yield f"largest micro-batch within {budget} of this machine's {machine}: {found}"
    yield from _run_lines(result)
    if result["teacher"] is not None:
        cached = result["teacher_cache_bytes"]
        size = "" if cached is None else f" of at most {_size(cached)}"
        yield f"teacher: {result['teacher']}, a cache{size}; memory and time for computing it are not included"
    yield (
        f"checkpoint: {_size(checkpoint['model_bytes'])} model, {_size(checkpoint['optimizer_bytes'])} optimizer; "
        f"up to {checkpoint['most']} on disk, {_size(checkpoint['disk_bytes'])}"
    )


def _run_lines(result: dict[str, Any]) -> Iterator[str]:
    from anarchobot.preflight.plan import CHINCHILLA, many_epochs

    yield f"compute: {result['flops_per_token'] / 1e6:,.1f} MFLOP per token"
    if result["steps"] is None:
        yield f"steps, tokens and time unknown: {result['steps_unknown']}"
        return
    yield (
        f"run: {count(result['steps'], 'step')}, {result['tokens']:,} tokens, {result['flops']:.3g} FLOP, "
        f"{result['tokens_per_parameter']:.1f} tokens per parameter (Chinchilla: {CHINCHILLA})"
    )
    if (epochs := result["epochs"]) is not None:
        yield f"passes over the shards: {many_epochs(epochs) or f'{epochs:.2f} epochs'}"
    if result["tokens_per_second"] is not None:
        yield f"to finish in {result['deadline_hours']:g} h: {result['tokens_per_second']:,.0f} tokens/s"


def _size(number: int) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


# --- bench


def _bench(args: argparse.Namespace) -> None:
    if args.device:
        _bench_device(args)
        return
    if args.output is not None:
        raise UserError("argument --output: only with --device")
    from anarchobot.config.loading import load_config
    from anarchobot.system.blas import blas_warning
    from anarchobot.tasks.bench import bench

    result = bench(load_config(args.config, overrides(args)), args.steps or 5)
    if result["device"] == "cpu" and not args.quiet and (warning := blas_warning()):
        print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        print(json.dumps(result))
        return
    for line in _bench_lines(result):
        print(line)


def _bench_lines(result: dict[str, Any]) -> Iterator[str]:
    step, peak, on_cpu = result["step"], result["peak"], result["device"] == "cpu"
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    where = f"cpu, {threads}, {result['blas'] or 'no fast BLAS'}" if on_cpu else result["device"]
    compiled = f"compiled ({step['traces']} traces)" if step["compiled"] else "not compiled"
    yield f"{result['parameters']:,} parameters, {result['precision']} on {where}, {result['optimizer']}, {compiled}"
    yield (
        f"step of {result['tokens_per_step']:,} random tokens: {step['ms']:,.1f} ms (median of {result['steps']}), "
        f"{step['tokens_per_second']:,.0f} tokens/s, peak memory {step['peak_memory_mb']:,.1f} MB"
    )
    yield (
        f"model: {step['model_flops'] / 1e9:,.3f} GFLOP per step, {step['model_flops_per_token'] / 1e6:,.3f} MFLOP per "
        f"token; recomputed: {step['recomputed_flops'] / 1e9:,.3f} GFLOP per step"
    )
    size = peak["product_size"]
    yield (
        f"throughput: {step['gflop_per_second']:,.1f} GFLOP/s, {step['share_of_peak']:.1%} of the "
        f"{peak['gflop_per_second']:,.1f} of {size} x {size} matmuls" + (f" in {threads}" if on_cpu else "")
    )
    yield ""
    yield f"{'part':<22}{'GFLOP':>10}{'ms':>12}{'GFLOP/s':>12}{'share':>9}"
    for part in result["parts"]:
        flops, rate = "-", "-"
        if part["flops"]:
            flops, rate = f"{part['flops'] / 1e9:,.3f}", f"{part['gflop_per_second']:,.1f}"
        yield f"{part['name']:<22}{flops:>10}{part['ms']:>12,.2f}{rate:>12}{part['share']:>9.1%}"


def _bench_device(args: argparse.Namespace) -> None:
    if args.steps is not None:
        raise UserError("argument --steps: not with --device, which repeats as often as its three minutes allow")
    file = args.output or DEVICE_FILE
    check_output(file)
    from anarchobot.system.blas import blas_warning, load_fast_blas

    load_fast_blas()  # before the modules below import MLX
    from anarchobot.config.loading import load_config
    from anarchobot.preflight.check import Context
    from anarchobot.preflight.settings import command_for
    from anarchobot.storage.durable import write_atomic
    from anarchobot.system.technique import cache_file
    from anarchobot.tasks.device_bench import device_bench
    from anarchobot.tasks.finetuning import load_tuning_config

    command = command_for(Context(args.config, args.settings, calibrate=False))
    task = command if command in ("sft", "dpo", "grpo") else "pretrain"
    loaded = (load_config if task == "pretrain" else load_tuning_config)(args.config, overrides(args))

    def log(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    result = device_bench(loaded, task, log)
    if result["device"]["kind"] == "cpu" and (warning := blas_warning()):
        log(f"warning: {warning}")
    text = json.dumps(result, indent=1)
    write_atomic(file, text + "\n")
    if args.json:
        print(text)
        return
    for line in _device_lines(result):
        print(line)
    if result["chosen"]:
        print(f"stored in {cache_file()}: train.technique auto uses it")
    print(f"wrote {file}: it has no personal data and can be attached to an issue")


def _device_lines(result: dict[str, Any]) -> Iterator[str]:
    device, run, versions = result["device"], result["run"], result["versions"]
    yield (
        f"{device['name']}, {device['kind']}, {_size(device['machine_memory'])}, {device['system']}; MLX "
        f"{versions['mlx']}, mlx-lm {versions['mlx-lm']}, anarchobot {versions['anarchobot']}"
    )
    unit = "pairs" if run["task"] == "dpo" else "sequences"
    yield (
        f"{run['parameters']:,} parameters, {run['precision']}, micro-batches of {run['micro_batch_size']} {unit} of "
        f"{run['seq_len']} tokens"
    )
    yield ""
    yield "gradients of a small model against the CPU's in float32"
    yield f"{'technique':<12}{'precision':<12}{'loss error':>12}{'worst gradient':>16}{'':>9}  computed again"
    for found in result["gradients"]:
        if "error" in found:
            yield f"{found['technique']:<12}{found['error']}"
            continue
        differ = (
            f"{len(found['differ_when_repeated'])} gradients differ" if found["differ_when_repeated"] else "same bits"
        )
        yield (
            f"{found['technique']:<12}{found['precision']:<12}{found['loss_error']:>12.1e}"
            f"{found['largest_error']:>16.1e}{'' if found['right'] else 'WRONG':>9}  {differ}"
        )
    yield ""
    yield "largest singular value of Muon's updates: 1.15 is right"
    yield from _singular_value_lines(result["orthogonalization"])
    yield ""
    yield from _variant_lines(result)


def _singular_value_lines(found: Any) -> Iterator[str]:
    if "error" in found:
        yield found["error"]
        return
    for i, row in enumerate(found):
        setting = "in training" if i == 0 else f"MLX_ENABLE_TF32={row['MLX_ENABLE_TF32']}"
        products = "products rounded" if row["products_rounded"] else "products exact"
        yield f"{setting:<20}{products:<18}{row['largest']:>8.3f}{'' if row['right'] else '  WRONG'}"


def _variant_lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"{'gradients of a micro-batch':<48}{'ms':>10}{'runs':>6}{'peak':>12}{'time':>8}{'peak':>8}"
    yield f"{'':<48}{'':>10}{'':>6}{'above start':>12}{'  by mlx-lm':>16}"
    for row in result["variants"]:
        name = _settings_name(row) if row["program"] == "anarchobot" else "mlx-lm"
        name += ", checkpointed" if row["gradient_checkpointing"] else ""
        if row["ms"] is None:
            yield f"{name:<48}  {row['error']}"
            continue
        ratios = (f"{row[key]:.2f}" if row[key] else "-" for key in ("time_by_mlx_lm", "peak_by_mlx_lm"))
        time, peak = ratios
        size = _size(row["peak_memory"])
        yield f"{name:<48}{row['ms']:>10,.1f}{row['runs']:>6}{size:>12}{time:>8}{peak:>8}"
        if row["error"]:
            yield f"  {row['error']}"
    yield ""
    step, chosen = result["step"], result["chosen"]
    if chosen is None:
        yield "no technique stored: too few could be compared that are right and within the memory budget"
        return
    if "error" in step:
        yield f"whole step: {step['error']}"
    else:
        yield (
            f"step of {step['micro_batches']} micro-batches: {step['ms']:,.1f} ms, peak memory "
            f"{_size(step['peak_memory'])}, estimate {_size(step['estimated_memory'])} ({step['estimate_by_peak']:.2f})"
        )
    yield f"fastest: {_settings_name(chosen)}"


def _settings_name(row: dict[str, Any]) -> str:
    return f"{row['technique']}, loss_chunk {row['loss_chunk']}{'' if row['compile'] else ', not compiled'}"


# --- selftest


def _selftest(args: argparse.Namespace) -> int:
    from anarchobot.tasks.selftest import run_selftest

    results = []
    with tempfile.TemporaryDirectory(prefix="anarchobot-selftest-") as folder:
        for outcome in run_selftest(Path(folder) / "work", args.kills, args.seed):
            results.append(outcome)
            if args.json:
                continue
            if not args.quiet:
                survived = outcome.tried - len(outcome.failures)
                print(f"{outcome.fault:42} {survived} of {outcome.tried} survived{outcome.note}", flush=True)
            for failure in outcome.failures:
                print(f"  {failure}")
    if args.json:
        print(json.dumps([vars(outcome) for outcome in results]))
    return 1 if any(outcome.failures for outcome in results) else 0
