"""What a check is: a question to a setup, its answer, and what to do."""

import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from anarchobot.config.errors import UserError
from anarchobot.system.blas import load_fast_blas
from anarchobot.system.machine import system_memory
from anarchobot.system.packages import PACKAGE, installed_version

if TYPE_CHECKING:  # `packages` is asked before any of them is loaded
    from anarchobot.config.adapt_schema import AdaptConfig
    from anarchobot.config.loading import Loaded, LoadedConfig
    from anarchobot.data.shards import TokenStream
    from anarchobot.exchange.pretrained import PretrainedModel

Status = Literal["pass", "warn", "fail", "skip"]
SMALLER = (
    "lower train.micro_batch_size (and raise train.grad_accum_steps), set train.gradient_checkpointing: true, or make "
    "the model or data.seq_len smaller"
)


@dataclass(frozen=True)
class Check:
    """One row of the table. `found`: what is so; `advice`: what to do, unless it passed."""

    name: str
    status: Status
    found: str
    advice: str = ""


class Answer(NamedTuple):
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Machine:
    """`version_of` a package: None where it is missing. `memory`, and `free` of the disk that a folder is on, in
    bytes."""

    python: str = platform.python_version()
    version_of: Callable[[str], str | None] = installed_version
    blas: Callable[[], str | None] = load_fast_blas
    memory: Callable[[], int] = lambda: system_memory().total
    free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free


@dataclass
class Setup:
    """What is verified. Below the line is what checks found, for those that need them."""

    path: str
    overrides: Sequence[str]
    machine: Machine
    calibrate: bool
    # ---
    loaded: "LoadedConfig" = field(init=False)
    adapt: "Loaded[AdaptConfig]" = field(init=False)
    base: "PretrainedModel | None" = None
    streams: "list[TokenStream]" = field(default_factory=list)
    windows: int | None = None  # training sequences in an epoch
    steps: int | None = None
    pairs: bool = False  # a micro-batch is of pairs, which are two sequences each
    on_cpu: bool = True
    memory: int = 0  # bytes of the device


class Question(NamedTuple):
    """`needs`: the checks that must not have failed before; `advice`: what to do about a UserError."""

    name: str
    ask: Callable[[Setup], Answer]
    needs: tuple[str, ...] = ()
    advice: str = ""


def asked(questions: Sequence[Question], setup: Setup, lost: set[str]) -> Iterator[Check]:
    """The checks, in their order. `lost` are the names of those that failed or were skipped; it grows."""
    for name, ask, needs, advice in questions:
        missing = [need for need in needs if need in lost]
        if missing:
            answer = Answer("skip", f"needs: {', '.join(missing)}")
        else:
            try:
                answer = ask(setup)
            except UserError as error:
                answer = Answer("fail", str(error), advice.replace("CONFIG", setup.path))
            except OSError as error:
                told = f"{error.filename or 'system'}: {error.strerror or error}"
                answer = Answer("fail", told, advice.replace("CONFIG", setup.path))
            except ImportError as error:
                answer = Answer("fail", f"can't be imported: {error}", f"pip install --upgrade {PACKAGE}")
            except MemoryError:
                answer = Answer("fail", "out of memory", SMALLER)
        if answer.status in ("fail", "skip"):
            lost.add(name)
        yield Check(name, *answer)
