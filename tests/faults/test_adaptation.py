"""adapt-vocab killed for good, `kill -9`, in the middle of every stage: it goes on and ends with the same files."""

import random
import subprocess
from pathlib import Path

import pytest

from anarchobot.storage.durable import read_sealed
from tests.tasks.adaptation.world import STAGES, command, kill_in, make_world, results, write_config

pytest.importorskip("gensim")


@pytest.mark.faults
@pytest.mark.parametrize("target", ["trained", "extended"])
def test_kill_9_in_every_stage(target: str, tmp_path: Path) -> None:
    """Each is killed twice, the second time as it goes on. With adapters in stage 2, and with all weights."""
    world = make_world(tmp_path)
    change = {
        "tokenization": {"target": target},
        "term_mining": {"top_k": 20},
        "vocab_adaptation": {"stage2_use_lora": target == "trained", "stage1_steps": 30, "stage2_steps": 30},
        "embedding": {"fasttext": {"epochs": 3, "thread": 1, "dim": 8}},
    }
    unbroken, root = tmp_path / "unbroken", tmp_path / "root"
    subprocess.run(command(write_config(world, unbroken, **change)), check=True)
    config = write_config(world, root, **change)
    stages = [*STAGES[:1], *(["terms"] if target == "extended" else []), *STAGES[1:]]
    chance = random.Random(0)
    for stage in stages:
        lasts = read_sealed(unbroken / "records" / f"{stage}.json")["seconds"]
        for _ in range(2):
            kill_in(stage, config, root, lasts, chance)
    subprocess.run(command(config), check=True)
    assert results(root) == results(unbroken)
    assert sorted(p.name for p in root.iterdir()) == sorted(p.name for p in unbroken.iterdir())
