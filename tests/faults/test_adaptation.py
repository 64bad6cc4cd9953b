"""adapt-vocab killed with `kill -9` in every stage is resumed and produces the same files."""

import random
import subprocess
from pathlib import Path

import pytest

from anarchobot.storage.durable import read_checksummed
from tests.tasks.adaptation.world import STAGES, command, kill_in, make_world, results, write_config

pytest.importorskip("gensim")


@pytest.mark.faults
@pytest.mark.parametrize("target", ["trained", "extended"])
def test_kill_9_in_every_stage(target: str, tmp_path: Path) -> None:
    """Each stage is killed twice, the second time while resuming. With and without LoRA in stage 2."""
    world = make_world(tmp_path)
    change = {
        "tokenization": {"target": target},
        "term_mining": {"top_k": 20},
        "vocab_adaptation": {"stage2_use_lora": target == "trained", "stage1_steps": 30, "stage2_steps": 30},
        "embedding": {"fasttext": {"epochs": 3, "thread": 1, "dim": 8}},
    }
    uninterrupted, root = tmp_path / "uninterrupted", tmp_path / "root"
    subprocess.run(command(write_config(world, uninterrupted, **change)), check=True)
    config = write_config(world, root, **change)
    stages = [*STAGES[:1], *(["terms"] if target == "extended" else []), *STAGES[1:]]
    rng = random.Random(0)
    for stage in stages:
        seconds = read_checksummed(uninterrupted / "records" / f"{stage}.json")["seconds"]
        for _ in range(2):
            kill_in(stage, config, root, seconds, rng)
    subprocess.run(command(config), check=True)
    assert results(root) == results(uninterrupted)
    assert sorted(p.name for p in root.iterdir()) == sorted(p.name for p in uninterrupted.iterdir())
