"""Requests that follow the OpenAPI description, or break it, get documented responses and no internal error."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.openapi import description
from tests.fuzz.test_readers import INPUTS, SEED
from tests.serving.conftest import RunningServer
from tests.serving.conftest import model as model
from tests.serving.conftest import server as server

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


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
