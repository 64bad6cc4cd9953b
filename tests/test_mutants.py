"""scripts/mutants.py: which changes it makes."""

import ast
import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = '''"""Adds 1."""
def f(x: int = 3, *, flag: bool = True) -> int:
    """Adds 1."""
    assert x == 1
    if x < 2 and flag:
        raise ValueError(f"{x + 1} é")
    items = [1.5,
             -x, min(x, x)]
    print("x" + "y", end="")
    g(items,
      key=flag)
    return "é" * x
'''


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts" / "mutants.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mutations_of_a_source(script: ModuleType) -> None:
    """No docstring, annotation, assertion, message or text changes, and lines keep their numbers."""
    found = script.mutations("a.py", SOURCE)
    assert sorted((m.line, m.before, m.after) for m in found) == [
        (2, "3", "4"),
        (2, "True", "False"),
        (5, "2", "3"),
        (5, "<", "<="),
        (5, "and", "or"),
        (6, 'raise ValueError(f"{x + 1} é")', "pass"),
        (7, "1.5", "3.0"),
        (8, "-x", "x"),
        (8, "min", "max"),
        (10, "g(items,\n      key=flag)", "pass\n"),
        (11, "key=flag", ""),
        (12, '"é" * x', "None"),
    ]
    data = SOURCE.encode()
    for m in found:
        changed = data[: m.start] + m.after.encode() + data[m.end :]
        assert data[m.start : m.end] == m.before.encode() and changed.count(b"\n") == SOURCE.count("\n")
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))


def test_a_draw_has_every_package_in_proportion(script: ModuleType, tmp_path: Path) -> None:
    for package, lines in (("large", 90), ("small", 10), ("tiny", 2)):
        folder = tmp_path / "anarchobot" / package / "deep"
        folder.mkdir(parents=True)
        (folder / "module.py").write_text("x = 1 + 2\n" * lines)
    drawn = script.draw(tmp_path, 23, 1)
    counts = Counter(m.path.split("/")[1] for m in drawn)
    assert counts == {"large": 17 + 1, "small": 2 + 1, "tiny": 1 + 1}
    assert len({(m.path, m.line) for m in drawn}) == 23
    assert drawn == script.draw(tmp_path, 23, 1) != script.draw(tmp_path, 23, 2)


def test_the_test_file_of_a_module_runs_first(script: ModuleType) -> None:
    tests = script.tests_of(ROOT, "anarchobot/optim/adamw.py")
    assert tests[0] == "tests/optim/test_adamw.py" and "tests/optim/test_muon.py" in tests
    assert "tests/knowledge/test_text.py" not in tests
