"""Shared by the tests of sft and dpo: a base model, conversations and pairs, small enough for runs of a second."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from anarchobot.config.loading import LoadedConfig
from anarchobot.tasks.finetuning import load_tuning_config
from anarchobot.tasks.pretrain import pretrain
from tests.tiny import LEFT_OUT, loaded

COLORS = ("red", "blue", "green", "black", "white")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("base")
    pretrain(loaded(folder / "c.yaml", tiny_shards, folder / "run", model__dropout=0.0), show="nothing")
    return folder / "run"


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty conversations in which the assistant repeats a color."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    draw = random.Random(0)
    rows = []
    for i in range(60):
        color = draw.choice(COLORS)
        turns = [("user", f"Say {color} {i}"), ("assistant", f"{color} {color}")] * draw.choice((1, 2))
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pairs that prefer politeness; two have identical answers."""
    path = tmp_path_factory.mktemp("preferences") / "pairs.jsonl"
    draw = random.Random(0)
    rows = [
        {"prompt": f"Say {(c := draw.choice(COLORS))} {i}", "chosen": f"{c} please", "rejected": f"no {c}"}
        for i in range(58)
    ]
    rows += [{"prompt": "Hello", "chosen": "same", "rejected": "same"}] * 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers of `preferences` one by one, in TRL's form; two have a label that can't be read."""
    path = tmp_path_factory.mktemp("labeled") / "labeled.jsonl"
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for i in range(58):
        color, good = draw.choice(COLORS), draw.random() < 0.65
        answer = f"{color} please" if good else f"no {color}"
        rows.append({"prompt": f"Say {color} {i}", "completion": answer, "label": good})
    rows += [{"prompt": "Hello", "completion": "Hi", "label": "good"}] * 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tuning(folder: Path, name: str, base: Path, dataset: Path, **overrides: Any) -> LoadedConfig:
    """A config for sft or dpo with save_dir folder/name; `overrides` as in tests/tiny.py."""
    config: dict[str, dict[str, Any]] = {
        "data": {"dataset": str(dataset), "seq_len": 48, "val_fraction": 0.2},
        "train": {
            "init_from": str(base), "total_steps": 6, "micro_batch_size": 2, "grad_accum_steps": 2, "lr": 0.01,
            "min_lr": 0.0, "warmup_steps": 0, "schedule": "constant", "log_interval": 1, "eval_interval": 3,
            "ckpt_interval": 3, "device": "cpu", "save_dir": str(folder / name),
        },
    }  # fmt: skip
    for key, value in overrides.items():
        section, leaf = key.split("__")
        config.setdefault(section, {})[leaf] = value
        if value is LEFT_OUT:
            del config[section][leaf]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return load_tuning_config(str(path), [])


def events(run: Path, event: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "logs" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]
