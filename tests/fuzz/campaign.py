"""Feeds damaged files to readers and sums up what happened.

python -m tests.fuzz.campaign --inputs 10000 --seed 0 --keep DIR [READER ...]
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.child import write
from tests.fuzz.mutation import make_input
from tests.fuzz.readers import READERS
from tests.fuzz.samples import build, read_samples

MAX_CRASHES = 20  # of one reader: each costs the start of a process
PER_PROCESS = 2000  # inputs: the tokenizers library never frees about a megabyte of each tokenizer that has encoded


@dataclass
class Result:
    """`findings` maps the kind and place of a problem to the first input that shows it and its message, `counts` to the
    number of such inputs."""

    reader: str
    inputs: int
    accepted: int = 0
    seconds: float = 0.0
    findings: dict[str, tuple[int, str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, number: int, finding: str, message: str) -> None:
        self.findings.setdefault(finding, (number, message))
        self.counts[finding] += 1

    def __str__(self) -> str:
        lines = [
            f"{self.reader}: {self.inputs:,} inputs ({self.accepted:,} accepted) in {self.seconds:.0f} s, "
            f"{len(self.findings)} findings"
        ]
        lines += [
            f"    input {number}, {self.counts[finding]} in all: {finding}: {message}"
            for finding, (number, message) in self.findings.items()
        ]
        return "\n".join(lines)


def fuzz(samples: Path, reader: str, seed: int, inputs: int) -> Result:
    """Reads `inputs` damaged files in child processes; another one starts after a crash."""
    result, first, crashes, start = Result(reader, inputs), 0, 0, time.monotonic()
    while first < inputs:
        last = min(inputs, first + PER_PROCESS)
        command = [sys.executable, "-m", "tests.fuzz.child", samples, seed, first, last, reader]
        child = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        out, errors = child.communicate()
        begun, finished = -1, False
        for line in map(json.loads, out.splitlines()):
            begun = line.get("begin", begun)
            if "accepted" in line:
                finished, result.accepted = True, result.accepted + line["accepted"]
            if "input" in line:
                result.add(line["input"], f"{line['kind']} {line['where']}", line["what"])
        if finished:
            first = last
            continue
        if child.returncode != -signal.SIGXCPU or _ends_again(samples, reader, seed, begun):
            result.add(begun, f"the process ended with {child.returncode}: {_last_frames(errors)}", "")
        first, crashes = begun + 1, crashes + 1
        if begun < 0 or crashes == MAX_CRASHES:
            result.inputs = max(0, first)
            break
    result.seconds = time.monotonic() - start
    return result


def _ends_again(samples: Path, reader: str, seed: int, number: int) -> bool:
    """Whether one input alone also takes too much processor time. A busy machine charges a process for waiting."""
    command = [sys.executable, "-m", "tests.fuzz.child", samples, seed, number, number + 1, reader]
    return subprocess.run(list(map(str, command)), capture_output=True, check=False).returncode != 0


def _last_frames(errors: str) -> str:
    frames = [line.strip() for line in errors.splitlines() if "/anarchobot/" in line or "Error" in line]
    return " ".join(frames[:2]) or " ".join(errors.split())[-300:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("readers", nargs="*", default=list(READERS))
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the inputs with findings")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        samples = Path(scratch) / "samples"
        build(samples)
        for name in args.readers:
            result = fuzz(samples, name, args.seed, args.inputs)
            print(result, flush=True)
            reader = READERS[name]
            for number, _ in result.findings.values() if args.keep else ():
                known = read_samples(samples / (reader.samples or name))
                files = known[number] if number < 0 else make_input(name, args.seed, number, known, reader.changed)
                folder = args.keep / f"{name} {number}"
                shutil.rmtree(folder, ignore_errors=True)
                folder.parent.mkdir(parents=True, exist_ok=True)
                write(folder, files)


if __name__ == "__main__":
    main()
