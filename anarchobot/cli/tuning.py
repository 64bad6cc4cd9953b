"""`anarchobot sft` and `anarchobot dpo`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from anarchobot.cli.parser import add_command, add_config, add_settings, add_switch, overrides
from anarchobot.cli.training import SETTINGS, report, shown

MODEL = {"--model": "train.init_from", "--dataset": "data.dataset"}


def add_commands(commands: Any) -> None:
    for name, run, summary in (
        ("sft", _sft, "teach a model to answer, from conversations"),
        ("dpo", _dpo, "teach a model which answers are preferred, from pairs"),
    ):
        parser = add_command(commands, name, run, summary)
        add_config(parser)
        add_settings(parser, MODEL | SETTINGS)
        add_switch(parser, "supervise", "train.supervise")


def _sft(args: argparse.Namespace) -> int:
    from anarchobot.tasks.sft import sft

    return _tune(args, "sft", sft)


def _dpo(args: argparse.Namespace) -> int:
    from anarchobot.tasks.dpo import dpo

    return _tune(args, "dpo", dpo)


def _tune(args: argparse.Namespace, name: str, task: Any) -> int:
    from anarchobot.system.micro_batch import resolve_micro_batch
    from anarchobot.tasks import supervise
    from anarchobot.tasks.finetuning import load_tuning_config

    loaded = load_tuning_config(args.config, overrides(args))
    train = loaded.config.train
    if supervise.wanted(loaded.config, tuning=True):
        command = [sys.executable, "-P", "-m", "anarchobot", *args.words]  # -P: nothing of the folder it stands in
        train = resolve_micro_batch(loaded, pairs=name == "dpo").loaded.config.train
        return supervise.supervise(command, Path(train.save_dir), train.micro_batch_size, train.grad_accum_steps)
    return report(args, name, task(loaded, show=shown(args)))
