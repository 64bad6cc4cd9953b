"""Reads damaged files in a process of its own, so that a crash of a library, a hang or an allocation without end is
detected and named. `python -m tests.fuzz.child SAMPLES SEED FIRST LAST READER...` prints JSON lines.

Bounds per input: the reader's seconds of processor time, WAIT of wall time, and MEMORY_BASE plus the reader's memory
factor times its size.
"""

import faulthandler
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from anarchobot.config.errors import MAX_LENGTH, UserError
from tests.fuzz.mutation import Files, make_input

if TYPE_CHECKING:
    from tests.fuzz.readers import Reader

WAIT = 300
MEMORY_BASE = 2**26
ADDRESS_SPACE = 2**32  # bytes beyond those in use at the start; more raises MemoryError (Linux)


def main(samples: Path, seed: int, first: int, last: int, names: list[str]) -> None:
    from tests.fuzz.readers import READERS, set_common
    from tests.fuzz.samples import read_samples

    set_common(samples / "common")
    out = os.fdopen(os.dup(1), "w", buffering=1)
    faulthandler.register(
        signal.SIGXCPU, chain=True
    )  # shows where, also in a library's code, and then ends the process
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", DeprecationWarning)
    for name in names:
        reader = READERS[name]
        known, accepted = read_samples(samples / (reader.samples or name)), 0
        for number in range(-len(known), last):  # first the valid samples, which load what the reader needs
            if 0 <= number < first:
                continue
            files = known[number] if number < 0 else make_input(name, seed, number, known, reader.changed)
            print(json.dumps({"begin": number}), file=out)
            with tempfile.TemporaryDirectory() as scratch:
                folder = write(Path(scratch) / "input", files)
                outcome = check(reader, folder, None if number < 0 else size_of(files))
            if isinstance(outcome, dict):
                print(json.dumps({"reader": name, "input": number, **outcome}), file=out)
            accepted += outcome is True
            if number == -1 and name == names[-1]:
                limit_address_space()
        print(json.dumps({"reader": name, "accepted": accepted}), file=out)
    out.flush()
    os._exit(0)  # without the threads of a server


def check(reader: "Reader", folder: Path, size: int | None) -> bool | dict[str, str]:
    """Whether the input was accepted, or the problem with it. Without `size`, a valid input: without bounds."""
    before = peak_memory(reset=True)
    if size is not None:
        limit_time(reader.seconds)
        faulthandler.dump_traceback_later(WAIT, exit=True)
    outcome: bool | dict[str, str] = True
    with open(os.devnull, "w", errors="backslashreplace") as null, redirect_stdout(null), redirect_stderr(null):
        try:
            reader.read(folder)
        except UserError as error:
            outcome = False
            if len(str(error).splitlines()) != 1 or len(str(error)) > MAX_LENGTH:
                outcome = {"kind": "message", "what": str(error)[:200], "where": ""}
        except BaseException as error:
            outcome = describe(error)
    faulthandler.cancel_dump_traceback_later()
    grown = peak_memory() - before
    if size is not None and isinstance(outcome, bool) and grown > MEMORY_BASE + reader.memory_factor * size:
        outcome = {"kind": "memory", "what": f"{grown / 1e6:.0f} MB for an input of {size:,} bytes", "where": ""}
    return outcome


def limit_time(seconds: int) -> None:
    """The process gets SIGXCPU after this much more processor time."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + seconds, hard))


def describe(error: BaseException) -> dict[str, str]:
    """Names the error by its type and by the last line of the package that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/anarchobot/" in frame.filename] or list(frames)
    where = f"{own[-1].filename.rpartition('/anarchobot/')[2]}:{own[-1].lineno}" if own else ""
    return {"kind": type(error).__name__, "what": " ".join(str(error).split())[:200], "where": where}


def write(folder: Path, files: Files) -> Path:
    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def size_of(files: Files) -> int:
    return sum(map(len, files.values()))


def peak_memory(reset: bool = False) -> int:
    """The largest resident size in bytes; with `reset`, from now on (Linux only)."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def limit_address_space() -> None:
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        used = int(status.partition("VmSize:")[2].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, used + ADDRESS_SPACE))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
