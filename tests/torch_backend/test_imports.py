"""Only torch_backend/ imports torch. Running without MLX or without torch: tests/tasks/test_backends.py."""

import ast
from pathlib import Path


def test_only_torch_backend_imports_torch() -> None:
    package = Path(__file__).parents[2] / "anarchobot"
    for file in package.rglob("*.py"):
        if file.parent.name != "torch_backend":
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(name.split(".")[0] == "torch" for name in names), file
