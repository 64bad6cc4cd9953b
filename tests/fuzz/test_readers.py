"""Damaged files are read, or refused in one line: no traceback, crash or hang, and memory in proportion to the file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.campaign import fuzz
from tests.fuzz.readers import READERS
from tests.fuzz.samples import build

INPUTS = int(os.environ.get("FUZZ_INPUTS", "10000"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
QUICK = (
    "config", "text", "rows", "parquet", "conversations", "preference pairs", "labeled answers", "questions",
    "tokenizer.json", "tokenizer.model", "shards", "safetensors", "adapters", "knowledge base",
)  # fmt: skip


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    build(folder)
    return folder


@pytest.mark.fuzz
@pytest.mark.parametrize("reader", READERS)
def test_reader(samples: Path, reader: str) -> None:
    if reader == "harness requests":
        pytest.importorskip("lm_eval")
    result = fuzz(samples, reader, SEED, INPUTS)
    print(result)
    assert not result.findings, str(result)


def test_few_inputs_of_each_reader(tmp_path: Path) -> None:
    build(tmp_path, with_mlx_lm=False)
    command = [sys.executable, "-m", "tests.fuzz.child", tmp_path, 0, 0, 5, *QUICK]
    child = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, (lines[-1:], child.stderr)
    assert [line for line in lines if "kind" in line] == []
    accepted = {line["reader"]: line["accepted"] for line in lines if "accepted" in line}
    assert tuple(accepted) == QUICK
    assert all(accepted.values()), accepted
