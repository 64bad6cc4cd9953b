"""Only torch_backend/ imports torch. Running without MLX or without torch: tests/tasks/test_backends.py."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

FALLBACK = "PYTORCH_ENABLE_MPS_FALLBACK"


@pytest.mark.parametrize(("chosen", "expected"), [({}, "1"), ({FALLBACK: "0"}, "0")], ids=["default", "chosen"])
def test_mps_fallback_is_set_before_torch_is_imported(chosen: dict[str, str], expected: str) -> None:
    pytest.importorskip("torch")
    code = f"import os, sys, anarchobot.torch_backend; print(os.environ['{FALLBACK}'], 'torch' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name != FALLBACK} | chosen
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected, "False"]


def test_only_torch_backend_imports_torch() -> None:
    package = Path(__file__).parents[2] / "anarchobot"
    for file in package.rglob("*.py"):
        if file.parent.name != "torch_backend":
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(name.split(".")[0] == "torch" for name in names), file
