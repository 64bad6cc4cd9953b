"""The check runner behind `anarchobot verify`: checks, their results, and the context they share."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from anarchobot.config.errors import UserError
from anarchobot.system.packages import PACKAGE

if TYPE_CHECKING:  # these need packages whose presence the first checks verify
    from anarchobot.config.adapt_schema import AdaptConfig
    from anarchobot.config.loading import Loaded, LoadedConfig
    from anarchobot.data.shards import TokenStream
    from anarchobot.exchange.pretrained import PretrainedModel

Status = Literal["pass", "warn", "fail", "skip"]
REDUCE_MEMORY = (
    "lower train.micro_batch_size (and raise train.grad_accum_steps), set train.gradient_checkpointing: true, or make "
    "the model or data.seq_len smaller"
)


# What a check returns: its status, what it found and, unless it passed, advice.
Outcome = tuple[Status, str] | tuple[Status, str, str]


class CheckResult(NamedTuple):
    """One row of the table, and one object of `verify --json`."""

    name: str
    status: Status
    found: str
    advice: str = ""


@dataclass
class Context:
    """The inputs of `verify` and, below the line, results shared between checks. `name`: of the configuration, in
    advice."""

    path: str
    overrides: Sequence[str]
    calibrate: bool
    name: str = ""
    # ---
    loaded: "LoadedConfig" = field(init=False)
    adapt: "Loaded[AdaptConfig]" = field(init=False)  # set for adapt-vocab only
    base: "PretrainedModel | None" = None
    teacher: "PretrainedModel | None" = None
    streams: "list[TokenStream]" = field(default_factory=list)
    windows: int | None = None  # training sequences per epoch
    steps: int | None = None
    pairs: bool = False  # dpo: a micro-batch counts pairs, each of two sequences
    on_cpu: bool = True
    device_memory: int = 0  # bytes
    recommended_memory: int = 0  # bytes: more leaves too little for the system


class Check(NamedTuple):
    """`requires` names the checks that must not have failed; `advice` is shown if `run` raises UserError or OSError."""

    name: str
    run: Callable[[Context], Outcome]
    requires: tuple[str, ...] = ()
    advice: str = ""


def check(
    name: str, requires: tuple[str, ...] = (), advice: str = ""
) -> Callable[[Callable[[Context], Outcome]], Check]:
    """Decorator that makes a Check of a function. `CONFIG` in `advice` stands for the configuration's name."""
    return lambda function: Check(name, function, requires, advice)


def run_checks(checks: Sequence[Check], context: Context, unavailable: set[str]) -> Iterator[CheckResult]:
    """Runs `checks` in order and adds the names of those that fail or are skipped to `unavailable`."""
    for name, run, requires, advice in checks:
        missing = [required for required in requires if required in unavailable]
        outcome: Outcome
        try:
            outcome = ("skip", f"needs: {', '.join(missing)}") if missing else run(context)
        except UserError as error:
            outcome = "fail", str(error), advice.replace("CONFIG", context.name)
        except OSError as error:
            message = f"{error.filename or 'system'}: {error.strerror or error}"
            outcome = "fail", message, advice.replace("CONFIG", context.name)
        except ImportError as error:
            outcome = "fail", f"import failed: {error}", f"pip install --upgrade {PACKAGE}"
        except MemoryError:
            outcome = "fail", "out of memory", REDUCE_MEMORY
        result = CheckResult(name, *outcome)
        if result.status in ("fail", "skip"):
            unavailable.add(name)
        yield result
