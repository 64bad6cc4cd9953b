"""`anarchobot bench`."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from anarchobot.cli.parser import add_command, add_config, overrides
from anarchobot.config.errors import UserError


def add_commands(commands: Any) -> None:
    parser = add_command(commands, "bench", _bench, "where the time of a training step goes, on random tokens")
    add_config(parser)
    parser.add_argument("--steps", metavar="N", default="5", help="measure each part N times and take the median")


def _bench(args: argparse.Namespace) -> None:
    if not args.steps.isascii() or not args.steps.isdigit() or int(args.steps) < 1:
        raise UserError(f"argument --steps: '{args.steps}', expected a whole number from 1 on")
    from anarchobot.config.loading import load_config
    from anarchobot.system.blas import no_blas_message
    from anarchobot.tasks.bench import bench

    found = bench(load_config(args.config, overrides(args)), int(args.steps))
    if found["device"] == "cpu" and found["blas"] is None and not args.quiet:
        print(f"warning: {no_blas_message()}", file=sys.stderr)
    if args.json:
        print(json.dumps(found))
        return
    for line in _lines(found):
        print(line)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    step, peak, on_cpu = found["step"], found["peak"], found["device"] == "cpu"
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    where = f"cpu, {threads}, {found['blas'] or 'no fast BLAS'}" if on_cpu else found["device"]
    compiled = f"compiled ({step['traces']} traces)" if step["compiled"] else "not compiled"
    yield f"{found['parameters']:,} parameters, {found['precision']} on {where}, {found['optimizer']}, {compiled}"
    yield (
        f"a step of {found['tokens_per_step']:,} random tokens: {step['ms']:,.1f} ms (median of {found['steps']}), "
        f"{step['tokens_per_second']:,.0f} tokens/s, {step['peak_memory_mb']:,.1f} MB at most"
    )
    yield (
        f"the model: {step['model_flops'] / 1e9:,.3f} GFLOP a step, {step['model_flops_per_token'] / 1e6:,.3f} MFLOP a "
        f"token; computed again besides: {step['recomputed_flops'] / 1e9:,.3f} GFLOP a step"
    )
    yield (
        f"that is {step['gflop_per_second']:,.1f} GFLOP/s, {step['share_of_peak']:.1%} of the "
        f"{peak['gflop_per_second']:,.1f} that products of {peak['product_size']} x {peak['product_size']} reach here"
        + (f" ({threads} at once)" if on_cpu else "")
    )
    yield ""
    yield f"{'part':<22}{'GFLOP':>10}{'ms':>12}{'GFLOP/s':>12}{'share':>9}"
    for part in found["parts"]:
        operations, rate = "-", "-"
        if part["flops"]:
            operations, rate = f"{part['flops'] / 1e9:,.3f}", f"{part['gflop_per_second']:,.1f}"
        yield f"{part['name']:<22}{operations:>10}{part['ms']:>12,.2f}{rate:>12}{part['share']:>9.1%}"
