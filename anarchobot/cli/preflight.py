"""`anarchobot plan`."""

import argparse
import json
import re
from collections.abc import Iterator
from typing import Any

from anarchobot.cli.parser import add_command, add_config, overrides
from anarchobot.config.errors import UserError

PARTS = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer state", "activations": "activations",
    "logits": "logits of a chunk", "update": "the update's own",
}  # fmt: skip


def add_commands(commands: Any) -> None:
    parser = add_command(commands, "plan", _plan, "what a run will take: memory, tokens, operations, disk")
    add_config(parser)
    parser.add_argument(
        "--deadline", metavar="TIME", help="hours, or such as 8h or 2d: how many tokens a second that asks for"
    )


def _plan(args: argparse.Namespace) -> None:
    deadline = None if args.deadline is None else hours(args.deadline)
    from anarchobot.preflight.plan import load_plan, plan

    found = plan(load_plan(args.config, overrides(args)), deadline)
    print(json.dumps(found) if args.json else "\n".join(_lines(found)))


def hours(text: str) -> float:
    """`8`, `8h`, `2d`, `1.5d` in hours. Raises UserError for anything else."""
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)([hd]?)", text)
    value = float(match[1]) * (24 if match[2] == "d" else 1) if match else 0.0
    if value == 0:
        raise UserError(f"argument --deadline: '{text}', expected hours above 0, such as 8, 8h or 2d")
    return value


def _lines(found: dict[str, Any]) -> Iterator[str]:
    memory, checkpoint, unit = found["memory"], found["checkpoint"], found["unit"]
    rows, parts = found["micro_batch_size"], found["grad_accum_steps"]
    trained = found["trained_parameters"]
    of_them = "" if trained == found["parameters"] else f", {trained:,} of them or beside them trained"
    yield f"{found['parameters']:,} parameters{of_them}"
    yield f"a step: {rows * parts} {unit}, {rows} at a time, {found['tokens_per_step']:,} tokens"
    yield ""
    yield f"memory by estimate, {found['precision']} on the {found['device']}"
    for key, name in PARTS.items():
        yield f"  {name:<19}{_size(memory[key]):>10}"
    yield f"  {'at the peak':<19}{_size(memory['peak']):>10}   in the {memory['phase']} phase"
    writing = _size(checkpoint["model_bytes"] + checkpoint["optimizer_bytes"])
    yield f"  {'while saving, up to':<19}{writing:>10}   more"
    yield ""
    yield f"  {'precision':<12}{'peak':>10}{'gradient_checkpointing':>26}"
    for plain, again in zip(found["peaks"][::2], found["peaks"][1::2], strict=True):
        yield f"  {plain['precision']:<12}{_size(plain['peak']):>10}{_size(again['peak']):>26}"
    yield ""
    most = found["largest_micro_batch"]
    whole = most == found["micro_batch_size"] * found["grad_accum_steps"]
    fit = f"{f'all {most}' if whole else f'up to {most}'} {unit} of a step fit at a time" if most else "not one fits"
    yield f"this machine has {_size(found['machine_bytes'])}; {fit} in {_size(found['budget_bytes'])}"
    yield from _length(found)
    yield (
        f"a checkpoint: {_size(checkpoint['model_bytes'])} model, {_size(checkpoint['optimizer_bytes'])} optimizer; "
        f"up to {checkpoint['most']} at a time take {_size(checkpoint['disk_bytes'])} of disk"
    )


def _length(found: dict[str, Any]) -> Iterator[str]:
    from anarchobot.preflight.plan import CHINCHILLA

    yield f"operations: {found['flops_per_token'] / 1e6:,.1f} MFLOP a token"
    if found["steps"] is None:
        yield f"steps, tokens and time: not known: {found['steps_unknown']}"
        return
    yield (
        f"the run: {found['steps']:,} steps, {found['tokens']:,} tokens, {found['flops']:.3g} FLOP; "
        f"{found['tokens_per_parameter']:.1f} tokens a parameter (Chinchilla's: {CHINCHILLA})"
    )
    if found["tokens_per_second"] is not None:
        yield f"to end in {found['deadline_hours']:g} h: {found['tokens_per_second']:,.0f} tokens a second"


def _size(number: int) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
