"""Says so, once, when the steps of a run are much slower than planned."""

import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anarchobot.config.errors import UserError
from anarchobot.runs.run_log import RunLog, finite, read_run
from anarchobot.training.display import duration

CHECK_SECONDS = 15.0
RECENT = 5  # log lines, whose median speed counts: a short pause of the machine does not


@contextmanager
def warn_if_late(
    folder: Path, step_seconds: float, allowed: float, is_final: bool, log: Callable[[str], None]
) -> Iterator[None]:
    """Watches the log of the run in `folder`. `step_seconds`: as planned; `allowed`: seconds that it may be late;
    `is_final`: whether its number of steps is."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(CHECK_SECONDS):
            try:
                text = describe_delay(read_run(folder), step_seconds, allowed, is_final)
            except UserError:  # nothing is logged yet
                continue
            if text is not None:
                log(f"warning: {text}")
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def describe_delay(run: RunLog, step_seconds: float, allowed: float, is_final: bool) -> str | None:
    """Returns None if the run will be in time, or if that is not known yet."""
    lines = run.events_of("train")[-RECENT:]
    speeds = [speed for line in lines if (speed := finite(line.get("tokens_per_second")))]
    steps, step = run.environment.get("steps"), run.step
    if len(speeds) < RECENT or not isinstance(steps, int) or steps <= step:
        return None
    tokens_per_step = lines[-1]["tokens"] / lines[-1]["step"]
    planned = (steps - step) * step_seconds
    left = (steps - step) * tokens_per_step / statistics.median(speeds)
    if left - planned <= allowed:
        return None
    slower = f"steps take {left / planned:.1f} times as long as planned"
    if not is_final:
        return f"{slower}: the run will have fewer steps"
    return f"{slower}: {duration(left)} left, so that the run ends about {duration(left - planned)} late"
