"""Requests that follow the OpenAPI description, or break it, get documented responses and no internal error."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from anarchobot.inference.model import Model
from anarchobot.inference.text_encoder import TextEncoder
from anarchobot.serving.app import Limits
from anarchobot.serving.embeddings import Embedder
from tests.fuzz.openapi import description
from tests.fuzz.test_readers import INPUTS, SEED
from tests.inference.encoder_folders import write_encoder
from tests.serving.conftest import RunningServer, run_server
from tests.serving.conftest import model as model

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture
def server(model: Model, tmp_path: Path) -> Iterator[RunningServer]:
    load = partial(TextEncoder, str(write_encoder(tmp_path / "encoder")))
    limits = Limits(tokens=4000, body_bytes=2**16)
    with Embedder(load) as embedder, run_server(model, limits, embedder=embedder) as found:
        yield found


@pytest.mark.fuzz
def test_schemathesis(server: RunningServer, tmp_path: Path) -> None:
    program = shutil.which("schemathesis", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("schemathesis is not installed: run `make fuzz`")
    file, report = tmp_path / "openapi.json", tmp_path / "report.json"
    file.write_text(json.dumps(description()))
    # Operations without a body have few different requests; the others get all of the inputs together.
    bodies = sum("requestBody" in operation for path in description()["paths"].values() for operation in path.values())
    each = max(1, INPUTS // bodies)
    options = ["--checks", CHECKS, "--max-examples", each, "--seed", SEED, "--phases", "examples,coverage,fuzzing"]
    options += [
        "--no-shrink",
        "--request-timeout",
        60,
        "--continue-on-failure",
        "--report-json-path",
        report,
        "--warnings",
        "off",
    ]
    command = [program, "run", file, "--url", server.url, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr
    assert server.is_healthy()
