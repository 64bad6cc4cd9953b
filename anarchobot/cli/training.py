"""`anarchobot pretrain`."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarchobot.cli.parser import add_command, add_config, add_settings, add_switch, overrides

if TYPE_CHECKING:
    from anarchobot.tasks.run import Show

# The settings that everybody changes, under the names that everybody types.
SETTINGS = {
    "--lr": "train.lr",
    "--batch-size": "train.micro_batch_size",
    "--epochs": "train.epochs",
    "--warmup-steps": "train.warmup_steps",
    "--max-grad-norm": "train.max_grad_norm",
    "--checkpoint-dir": "train.save_dir",
    "--resume-from": "train.checkpoint_path",
    "--save-every": "train.ckpt_interval",
    "--backend": "train.backend",
}


def add_commands(commands: Any) -> None:
    parser = add_command(commands, "pretrain", _pretrain, "train a model from scratch on token shards")
    add_config(parser)
    add_settings(parser, SETTINGS)
    add_switch(parser, "supervise", "train.supervise")


def _pretrain(args: argparse.Namespace) -> int:
    from anarchobot.config.loading import load_config
    from anarchobot.system.micro_batch import resolve_micro_batch
    from anarchobot.tasks import supervise

    loaded = load_config(args.config, overrides(args))
    train = loaded.config.train
    if supervise.wanted(loaded.config):
        command = [sys.executable, "-P", "-m", "anarchobot", *args.words]  # -P: nothing of the folder it stands in
        train = resolve_micro_batch(loaded).loaded.config.train
        return supervise.supervise(command, Path(train.save_dir), train.micro_batch_size, train.grad_accum_steps)
    from anarchobot.tasks.pretrain import pretrain

    return report(args, "pretrain", pretrain(loaded, show=shown(args)))


def shown(args: argparse.Namespace) -> "Show":
    """What of a run is shown on stderr while it goes on."""
    return "nothing" if args.quiet else "json" if args.json else "progress"


def report(args: argparse.Namespace, command: str, summary: dict[str, Any]) -> int:
    """Prints what a run came to, and how it goes on if it was stopped; returns the exit code. Of several ranks, the
    first speaks for all."""
    if "rank" in summary:
        return 0 if summary["finished"] else 130
    if args.json:
        print(json.dumps(summary))
    elif not args.quiet:
        best = summary["best_val_loss"]
        print(
            f"{summary['save_dir']}: step {summary['steps']}, {summary['tokens']:,} tokens in {summary['wall_time']}"
            + (f", best validation loss {best:.4f}" if best is not None else "")
        )
    if summary["finished"]:
        return 0
    from anarchobot.training.ranks import detect_launcher

    again = command if detect_launcher() is None else f"launch ... -- {command}"
    print(
        f"stopped at step {summary['steps']}; go on with: anarchobot {again} "
        f"{shlex.quote(summary['save_dir'] + '/config.yaml')} --resume-from auto",
        file=sys.stderr,
    )
    return 130
