"""`anarchobot pretrain`, `sft`, `dpo`, `grpo`, `launch` and `adapt-vocab`."""

import argparse
import json
import shlex
import sys
from typing import TYPE_CHECKING, Any

from anarchobot.cli.parser import add_command, add_config, add_settings, add_switch, overrides, parse, positive
from anarchobot.config.errors import UserError

if TYPE_CHECKING:
    from anarchobot.config.loading import LoadedConfig
    from anarchobot.tasks.run import OutputMode

# Flags for the most common settings.
SETTINGS = {
    "--lr": "train.lr",
    "--batch-size": "train.micro_batch_size",
    "--steps": "train.total_steps",
    "--epochs": "train.epochs",
    "--warmup-steps": "train.warmup_steps",
    "--max-grad-norm": "train.max_grad_norm",
    "--checkpoint-dir": "train.save_dir",
    "--resume-from": "train.checkpoint_path",
    "--save-every": "train.ckpt_interval",
    "--backend": "train.backend",
    "--seed": "train.seed",
    "--log-to": "train.log_to",
}
FINETUNING_SETTINGS = {"--model": "train.init_from", "--dataset": "data.dataset"} | SETTINGS
SMALL_MODEL = 20e6  # parameters: all weights fit in any memory, and there is more to learn than to keep
LAUNCH_BACKENDS = ("ring", "mpi", "nccl", "jaccl")


def add_commands(commands: Any) -> None:
    for name, run, summary, settings in (
        ("pretrain", _pretrain, "pretrain on token shards, from scratch or from train.init_from", SETTINGS),
        ("sft", _sft, "fine-tune a model on conversations", FINETUNING_SETTINGS),
        ("dpo", _dpo, "fine-tune a model on preference pairs or labeled answers", FINETUNING_SETTINGS),
        ("grpo", _grpo, "train a model on its own completions, by rewards (GRPO)", FINETUNING_SETTINGS),
    ):
        parser = add_command(commands, name, run, summary)
        default = "" if name == "pretrain" else "LoRA of rank 8"
        add_config(parser, optional=bool(default), default=default)
        add_settings(parser, settings, defaults_of=name if default else "")
        add_switch(parser, "--supervise", "train.supervise")
        parser.add_argument(
            "--brief",
            action="store_true",
            help="show progress, warnings and counts of the data, but no description of the run (default: off)",
        )

    launch = add_command(
        commands,
        "launch",
        _launch,
        "train with several processes, on this machine or on several machines",
        epilog="example: anarchobot launch --hosts 10.0.0.1,10.0.0.2 -- pretrain configs/small.yaml (docs/scaling.md)",
    )
    launch.add_argument(
        "-n", "--ranks", type=positive, metavar="N", help="number of processes (default: 2; with --hosts: 1 per host)"
    )
    launch.add_argument("--hosts", metavar="A,B", help="addresses of hosts to reach by ssh (default: this machine)")
    launch.add_argument(
        "--hostfile", metavar="FILE", help="hosts file written by mlx.distributed_config (default: none)"
    )
    launch.add_argument(
        "--backend", metavar="NAME", help=f"communication backend: {', '.join(LAUNCH_BACKENDS)} (default: ring)"
    )
    launch.add_argument(
        "task", nargs="+", metavar="COMMAND", help="command to run, after --: pretrain, sft or dpo and its arguments"
    )

    adapt = add_command(commands, "adapt-vocab", _adapt_vocab, "adapt a model to a new tokenizer and vocabulary")
    add_config(adapt)


def _pretrain(args: argparse.Namespace) -> int:
    from anarchobot.config.loading import load_config
    from anarchobot.tasks import supervise

    loaded = load_config(args.config, overrides(args))
    if supervise.should_supervise(loaded.config):
        return _supervise(args, loaded)
    from anarchobot.tasks.pretrain import pretrain

    return _print_summary(args, "pretrain", pretrain(loaded, show=_show(args)))


def _sft(args: argparse.Namespace) -> int:
    from anarchobot.tasks.sft import sft

    return _finetune(args, "sft", sft)


def _dpo(args: argparse.Namespace) -> int:
    from anarchobot.tasks.dpo import dpo

    return _finetune(args, "dpo", dpo)


def _grpo(args: argparse.Namespace) -> int:
    from anarchobot.tasks.grpo import grpo

    return _finetune(args, "grpo", grpo)


def _finetune(args: argparse.Namespace, name: str, task: Any) -> int:
    from anarchobot.tasks import supervise

    loaded = _load_tuning(args, name)
    if supervise.should_supervise(loaded.config, tuning=True):
        return _supervise(args, loaded, pairs=name == "dpo")
    return _print_summary(args, name, task(loaded, show=_show(args)))


def _load_tuning(args: argparse.Namespace, name: str) -> "LoadedConfig":
    """The configuration. Without CONFIG, `sft` trains all weights of a small model instead of adapters, unless a key of
    lora is given: adapters are for models that already know much."""
    from anarchobot.config.templates import DEFAULT_CONFIGS, shipped_configs
    from anarchobot.model.parameters import parameter_count
    from anarchobot.tasks.finetuning import load_tuning_config

    given, is_default = overrides(args), args.config is None
    loaded = load_tuning_config(args.config or DEFAULT_CONFIGS[name], given, limit_lengths=is_default)
    keys = [word.partition("=")[0] if isinstance(word, str) else word[0] for word in given]
    has_lora = any(key.startswith("lora.") for key in keys) or loaded.config.model.quantization is not None
    size = parameter_count(loaded.config.model)
    if name != "sft" or not is_default or has_lora or size >= SMALL_MODEL:
        return loaded
    if not (args.quiet or args.json):
        text = f"training all {size:,} parameters: adapters (lora.r=8) change too little of a small model"
        print(text, file=sys.stderr)
    given = overrides(args, {"chat.rouge_samples": 0})
    return load_tuning_config(str(shipped_configs()["tuning/sft"]), given, limit_lengths=True)


def _supervise(args: argparse.Namespace, loaded: "LoadedConfig", pairs: bool = False) -> int:
    """Runs the same command in a supervised child process."""
    from anarchobot.system.micro_batch import resolve_micro_batch
    from anarchobot.tasks import supervise

    command = [sys.executable, "-P", "-m", "anarchobot", *args.argv]  # -P: import nothing from the current folder
    if "--model" in args.options:  # with the commit of a model of the Hub, whose branch may move before a resume
        command += ["--model", str(loaded.config.train.init_from)]
    return supervise.supervise(command, resolve_micro_batch(loaded, pairs=pairs).loaded.config.train)


def _show(args: argparse.Namespace) -> "OutputMode":
    return "nothing" if args.quiet else "json" if args.json else "brief" if args.brief else "progress"


def _print_summary(args: argparse.Namespace, command: str, summary: dict[str, Any]) -> int:
    """Prints a run's summary, and how to use it, or to resume it if it was stopped; returns the exit code. Only rank 0
    prints."""
    if "rank" in summary:
        return 0 if summary["finished"] else 130
    if args.json:
        print(json.dumps(summary))
    else:
        best = summary["best_val_loss"]
        print(
            f"{summary['save_dir']}: step {summary['steps']}, {summary['tokens']:,} tokens in {summary['wall_time']}"
            + ("" if best is None else f", best {_best(command, best)}")
        )
    if summary["finished"]:
        if not (args.json or args.quiet):
            use = "generate --prompt 'The'" if command == "pretrain" else "chat"
            print(f"next: anarchobot {use} --checkpoint {shlex.quote(summary['save_dir'])}", file=sys.stderr)
        return 0
    from anarchobot.training.ranks import detect_launcher

    again = command if detect_launcher() is None else f"launch ... -- {command}"
    print(
        f"stopped at step {summary['steps']}; resume with: anarchobot {again} "
        f"{shlex.quote(summary['save_dir'] + '/config.yaml')} --resume-from auto",
        file=sys.stderr,
    )
    return 130


def _best(command: str, loss: float) -> str:
    """GRPO's validation loss is the negative mean reward."""
    return f"validation reward {0.0 - loss:.4f}" if command == "grpo" else f"validation loss {loss:.4f}"


def _launch(args: argparse.Namespace) -> int:
    from anarchobot.tasks import launch

    ranks, hosts, backend = args.ranks, args.hosts, args.backend
    if backend is not None and backend not in LAUNCH_BACKENDS:
        raise UserError(f"argument --backend: expected one of {', '.join(LAUNCH_BACKENDS)}, got '{backend}'")
    if hosts is not None and not all(host.strip() for host in hosts.split(",")):
        raise UserError(f"argument --hosts: expected addresses separated by commas, got '{hosts}'")
    if hosts is not None and args.hostfile is not None:
        raise UserError("arguments --hosts and --hostfile: expected only one of them")
    if args.hostfile is not None and ranks is not None:
        raise UserError("argument --ranks: not allowed with --hostfile, which sets the number of processes")
    argv = [*args.task, *(f"--{flag}" for flag in ("quiet", "json", "debug") if getattr(args, flag))]
    is_remote = hosts is not None or args.hostfile is not None
    if not is_remote and backend in (None, "ring"):
        _check_task(args, argv)
        return launch.launch_local(argv, ranks or 2)
    if args.hostfile is not None:
        options = ["--hostfile", args.hostfile]
    else:
        options = ["--hosts", hosts or launch.LOCALHOST, "-n", str(ranks or (1 if is_remote else 2))]
    return launch.launch_with_mlx(argv, [*options, *(["--backend", backend] if backend else [])])


def _check_task(args: argparse.Namespace, argv: list[str]) -> None:
    """Raises UserError for a wrong command line or config, which otherwise every rank would report."""
    from anarchobot.config.loading import load_config
    from anarchobot.config.templates import DEFAULT_CONFIGS
    from anarchobot.tasks.finetuning import load_tuning_config
    from anarchobot.tasks.launch import TASKS

    if argv[0] in TASKS:
        task = parse(args.parser, argv)
        path = task.config or DEFAULT_CONFIGS[argv[0]]
        (load_config if argv[0] == "pretrain" else load_tuning_config)(path, overrides(task))


def _adapt_vocab(args: argparse.Namespace) -> int:
    from anarchobot.config.adapt_schema import AdaptConfig
    from anarchobot.config.loading import load
    from anarchobot.system.blas import load_fast_blas

    loaded = load(args.config, overrides(args), AdaptConfig)
    load_fast_blas()  # before MLX is imported
    from anarchobot.tasks.adaptation.evaluation import to_markdown
    from anarchobot.tasks.adaptation.pipeline import adapt_vocab

    report = adapt_vocab(loaded, quiet=args.quiet or args.json)
    if args.json:
        print(json.dumps(report))
    elif report["evaluation"]:
        print(to_markdown(report["evaluation"]))
    if not report["finished"]:
        print("stopped; resume with the same command", file=sys.stderr)
        return 130
    if not args.json:
        print(f"{report['result']}: adapted model")
    return 0
