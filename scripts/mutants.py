#!/usr/bin/env python
"""Mutation testing: changes the code in one place at a time and reports the changes that no test notices.

Works on a clone of HEAD in a temporary folder, so the working tree is neither changed nor tested. The changes are drawn
with a seed, over all packages in proportion to their lines. The tests of a change are the files that import the changed
module, the others of its package, and those that import anything of its package, up to the first failure.
"""

import argparse
import ast
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

SWAPS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
    "in": "not in", "not in": "in", "is": "is not", "is not": "is",
    "+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "//", "**": "*", "&": "|", "|": "&", "<<": ">>", ">>": "<<",
    "and": "or", "or": "and",
    "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any",
}  # fmt: skip
SYMBOLS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
    ast.In: "in", ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not",
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
    ast.BitAnd: "&", ast.BitOr: "|", ast.LShift: "<<", ast.RShift: ">>", ast.And: "and", ast.Or: "or",
}  # fmt: skip
LOGS = re.compile(r"(print|log|logger|console|progress|warn|warnings)\b")


class Mutation(NamedTuple):
    path: str  # relative to the project
    line: int
    start: int  # bytes of the file that are replaced
    end: int
    before: str
    after: str

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) or "nothing" for text in (self.before, self.after))
        return f"{self.path}:{self.line}: {before[:70]} -> {after[:70]}"


def mutations(path: str, source: str) -> list[Mutation]:
    """Returns every mutation of a file. Annotations, strings and assertions are left alone."""
    data = source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def text(node: ast.AST) -> str:
        start, end = span(node)
        return data[start:end].decode()

    def replace(start: int, end: int, after: str) -> Mutation:
        before = data[start:end].decode()
        after += "\n" * (before.count("\n") - after.count("\n"))  # line numbers stay
        return Mutation(path, data.count(b"\n", 0, start) + 1, start, end, before, after)

    def operator(left: ast.AST, right: ast.AST, kind: type[ast.AST]) -> Iterator[Mutation]:
        """Swaps the operator between two operands."""
        begin = span(left)[1]
        between = data[begin : span(right)[0]].decode()
        found = re.search(re.escape(SYMBOLS[kind]).replace(r"\ ", r"\s+"), between) if kind in SYMBOLS else None
        if found:
            yield replace(begin + found.start(), begin + found.end(), SWAPS[SYMBOLS[kind]])

    def of_node(node: ast.AST) -> Iterator[Mutation]:
        match node:
            case ast.Compare(left=left, ops=[kind, *_], comparators=[right, *_]):
                yield from operator(left, right, type(kind))
            case ast.BinOp(left=left, right=right, op=kind) if not _is_text(left) and not _is_text(right):
                yield from operator(left, right, type(kind))
            case ast.BoolOp(values=[left, right, *_], op=kind):
                yield from operator(left, right, type(kind))
            case ast.AugAssign(target=left, value=right, op=kind):
                yield from operator(left, right, type(kind))
            case ast.Constant(value=bool(value)):
                yield replace(*span(node), str(not value))
            case ast.Constant(value=int(value)):
                yield replace(*span(node), str(value + 1))
            case ast.Constant(value=float(value)):
                yield replace(*span(node), repr(value * 2 or 1.0))
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand) | ast.Await(value=operand):
                yield replace(*span(node), text(operand))
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                if not isinstance(test, ast.Compare | ast.BoolOp | ast.Constant | ast.UnaryOp):
                    yield replace(*span(test), f"(not ({text(test)}))")
            case ast.Return(value=ast.expr() as value) if text(value) != "None":
                yield replace(*span(value), "None")
            case (
                ast.Raise() | ast.Continue() | ast.Break() | ast.AugAssign() | ast.Delete(targets=[ast.Subscript(), *_])
            ):
                yield replace(*span(node), "pass")
            case ast.Expr(value=ast.Call() | ast.Await()) if not LOGS.search(text(node).split("(")[0]):
                yield replace(*span(node), "pass")
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                yield replace(*span(node), "pass")
        if isinstance(node, ast.Call):
            function = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if function in SWAPS:
                end = span(node.func)[1]
                yield replace(end - len(function), end, SWAPS[function])
            for keyword in (keyword for keyword in node.keywords if not _is_text(keyword.value)):
                start, end = span(keyword)
                comma = re.match(rb"\s*,\s*", data[end:])
                yield replace(start, end + (comma.end() if comma else 0), "")

    def visit(node: ast.AST) -> Iterator[Mutation]:
        yield from of_node(node)
        if isinstance(node, ast.Raise):
            return  # the rest is a message
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                checking = isinstance(child, ast.If) and text(child.test) == "TYPE_CHECKING"
                if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr | ast.Assert) and not checking:
                    yield from visit(child)

    return list(visit(ast.parse(source)))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def draw(tree: Path, count: int, seed: int) -> list[Mutation]:
    """Draws one mutation of each package and the others in proportion to their lines, at most one of a line."""
    lines: dict[str, dict[tuple[str, int], list[Mutation]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted((tree / "anarchobot").glob("*/**/*.py")):
        path = file.relative_to(tree).as_posix()
        for mutation in mutations(path, file.read_text(encoding="utf-8")):
            lines[path.split("/")[1]][path, mutation.line].append(mutation)
    generator = random.Random(seed)
    rest, total, before, drawn = count - len(lines), sum(map(len, lines.values())), 0, []
    for places in lines.values():
        share = 1 + (before + len(places)) * rest // total - before * rest // total
        before += len(places)
        drawn += [generator.choice(places[place]) for place in sorted(generator.sample(sorted(places), share))]
    return drawn


def tests_of(tree: Path, path: str) -> list[str]:
    """Returns the test files of a module: those that import it, the others in the folder of its package, then those
    that import another module of its package; smallest first."""
    _, package, *_ = parts = Path(path).with_suffix("").parts
    parent, stem = ".".join(parts[:-1]), parts[-1]
    imports = re.compile(rf"\b{re.escape(parent)}(\.| import \(?[\w\s,]*\b){stem}\b")
    ranked = []
    for file in (tree / "tests").rglob("test_*.py"):
        name = file.relative_to(tree).as_posix()
        text = file.read_text(encoding="utf-8")
        imported, in_folder = bool(imports.search(text)), name.startswith(f"tests/{package}/")
        if (in_folder or f"anarchobot.{package}" in text) and not name.startswith("tests/faults/"):
            ranked.append((file.stem != f"test_{stem}", not imported, not in_folder, file.stat().st_size, name))
    return [name for *_, name in sorted(ranked)]


def run_tests(tree: Path, tests: list[str], seconds: int, *options: str) -> tuple[int | None, list[str]]:
    """Runs tests in a clone. Returns the exit code, None after the time limit, and the tests that failed."""
    command = [sys.executable, "-m", "pytest", "-rfE", "--tb=no", "-p", "no:cacheprovider", *options, *tests]
    process = subprocess.Popen(
        command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None, []
    return process.returncode, re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)


def judge(tree: Path, mutation: Mutation, seconds: int, timeout: int) -> tuple[bool, str]:
    """Applies a mutation, runs its tests and restores the file. Returns whether it was killed, and by what."""
    file = tree / mutation.path
    original = file.read_bytes()
    file.write_bytes(original[: mutation.start] + mutation.after.encode() + original[mutation.end :])
    try:
        code, failed = run_tests(tree, tests_of(tree, mutation.path), seconds, "-x", f"--timeout={timeout}")
    finally:
        file.write_bytes(original)
        for compiled in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):  # matched by seconds: may be the mutant's
            compiled.unlink()
    if code in (None, 0):
        return False, "tests passed" if code == 0 else f"tests stopped after {seconds} s"
    return True, failed[0] if failed else f"exit code {code}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="number of mutations (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    parser.add_argument("--seconds", type=int, default=120, help="limit for a mutation's tests (default: 120)")
    parser.add_argument("--timeout", type=int, default=60, help="limit for one test, then it fails (default: 60)")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="only these numbers (default: all)")
    args = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        tree = folder / "tree"
        subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, tree], check=True)
        drawn = list(enumerate(draw(tree, args.count, args.seed), 1))
        killers = {}
        judged = [(number, mutation) for number, mutation in drawn if args.only is None or number in args.only]
        for number, mutation in judged:
            killed, reason = judge(tree, mutation, args.seconds, args.timeout)
            print(f"{number:3} {mutation}\n    {'killed' if killed else 'SURVIVED'}: {reason}", flush=True)
            if killed:
                killers[number] = reason
        tests = sorted({reason for reason in killers.values() if reason.startswith("tests/")})
        _, broken = run_tests(tree, tests, 3600) if tests else (0, [])
    finally:
        shutil.rmtree(folder)
    print(f"{len(killers)} of {len(judged)} killed (seed {args.seed})")
    for test in broken:
        print(f"not a kill, the test fails without a mutation: {test}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
