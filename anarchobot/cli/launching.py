"""`anarchobot launch`."""

import argparse
from typing import Any

from anarchobot.cli.parser import add_command, overrides, parse
from anarchobot.config.errors import UserError

BACKENDS = ("ring", "mpi", "nccl", "jaccl")


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "launch",
        _launch,
        "train one model by several processes, here or on several machines",
        epilog="example: anarchobot launch --hosts 10.0.0.1,10.0.0.2 -- pretrain configs/small.yaml (docs/scaling.md)",
    )
    parser.add_argument("-n", "--ranks", type=int, metavar="N", help="processes (2), on each of the hosts (1)")
    parser.add_argument("--hosts", metavar="A,B", help="machines that ssh knows by their addresses; without: this one")
    parser.add_argument("--hostfile", metavar="FILE", help="the machines as mlx.distributed_config writes them")
    parser.add_argument("--backend", metavar="NAME", help=f"how they talk: {', '.join(BACKENDS)} (ring)")
    parser.add_argument("task", nargs="+", metavar="COMMAND", help="behind --: pretrain or sft, CONFIG and settings")


def _launch(args: argparse.Namespace) -> int:
    from anarchobot.tasks import launch

    ranks, hosts, backend = args.ranks, args.hosts, args.backend
    if ranks is not None and ranks < 1:
        raise UserError(f"--ranks {ranks}: expected 1 or more")
    if backend is not None and backend not in BACKENDS:
        raise UserError(f"--backend {backend}: expected {', '.join(BACKENDS)}")
    if hosts is not None and args.hostfile is not None:
        raise UserError("--hosts, --hostfile: expected one of them")
    if args.hostfile is not None and ranks is not None:
        raise UserError("--hostfile, --ranks: the file says how many: leave one of them out")
    words = [*args.task, *(f"--{flag}" for flag in ("quiet", "json", "debug") if getattr(args, flag))]
    elsewhere = hosts is not None or args.hostfile is not None
    if not elsewhere and backend in (None, "ring"):
        _check(words)
        return launch.launch_here(words, ranks or 2)
    if args.hostfile is not None:
        options = ["--hostfile", args.hostfile]
    else:
        options = ["--hosts", hosts or launch.ALONE, "-n", str(ranks or (1 if elsewhere else 2))]
    return launch.launch_by_mlx(words, [*options, *(["--backend", backend] if backend else [])])


def _check(words: list[str]) -> None:
    """Raises UserError for a mistake in what is to run, or in its config, which every rank would tell otherwise."""
    from anarchobot.cli.main import build_parser
    from anarchobot.config.loading import load_config
    from anarchobot.tasks.finetuning import load_tuning_config
    from anarchobot.tasks.launch import TASKS

    if words[0] in TASKS:
        args = parse(build_parser(), words)
        (load_config if words[0] == "pretrain" else load_tuning_config)(args.config, overrides(args))
