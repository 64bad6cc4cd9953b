"""Experiment trackers: Weights & Biases, Trackio and MLflow. Their packages are imported only if a run names them.

Each works in its own thread, so that a slow network does not slow down training. A tracker that fails is reported, and
training continues.
"""

import html
import io
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from contextvars import copy_context
from pathlib import Path
from typing import Any, Literal, Protocol

from anarchobot.config.errors import UserError, one_line
from anarchobot.storage.durable import parse_json, write_atomic

PROJECT = "anarchobot"
IDS = "trackers.json"  # in the logs folder: the tracker's id of this run, so that a resumed run continues it
CLOSE_SECONDS = 60.0  # to wait at the end of a run

End = Literal["finished", "stopped", "failed"]


class Tracker(Protocol):
    """`id` finds the run again; `place` is where to see it."""

    id: str
    place: str

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_text(self, step: int, name: str, text: str) -> None: ...

    def close(self, end: End) -> None: ...


class Wandb:
    """`WANDB_MODE=offline` writes to the logs folder only. `WANDB_PROJECT` and wandb's other variables apply."""

    def __init__(self, logs: Path, name: str, config: Mapping[str, Any], run_id: str | None) -> None:
        import wandb

        self.id = run_id or secrets.token_hex(4)
        project = None if "WANDB_PROJECT" in os.environ else PROJECT
        settings = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(project=project, name=name, id=self.id, resume="allow", dir=logs, settings=settings)
        self._run.config.update(config, allow_val_change=True)
        self._run.define_metric("*", step_metric="step")  # wandb's own step may not decrease, as it does on a resume
        self._html = wandb.Html
        offline = f"offline; upload with: wandb sync {Path(self._run.dir).parent}"
        self.place = offline if self._run.offline else str(self._run.url)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def log_text(self, step: int, name: str, text: str) -> None:
        self._run.log({"step": step, name: self._html(f"<pre>{html.escape(text)}</pre>", inject=False)})

    def close(self, end: End) -> None:
        self._run.finish(exit_code=int(end == "failed"))


class Trackio:
    """Writes to a local database; `TRACKIO_SPACE_ID` sends to a Hugging Face Space."""

    def __init__(self, logs: Path, name: str, config: Mapping[str, Any], run_id: str | None) -> None:
        import trackio

        self.id = run_id or f"{name}-{secrets.token_hex(4)}"  # it resumes runs by name
        with redirect_stdout(io.StringIO()):
            # In a copy of the context, where its atexit handler, which prints, does not find the run.
            self._run = copy_context().run(
                trackio.init, PROJECT, self.id, config=dict(config), resume="allow", embed=False
            )
        self._markdown = trackio.Markdown
        self.place = f"show with: trackio show --project {PROJECT}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def log_text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._markdown(text)}, step=step)

    def close(self, end: End) -> None:
        with redirect_stdout(io.StringIO()):
            self._run.finish()


class MLflow:
    """Writes to `MLFLOW_TRACKING_URI`; by default, to mlflow.db and mlruns/ in the current folder."""

    def __init__(self, logs: Path, name: str, config: Mapping[str, Any], run_id: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        if run_id is None:
            project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(project)
            experiment = self._client.create_experiment(project) if found is None else found.experiment_id
            run_id = str(self._client.create_run(experiment, run_name=name).info.run_id)
            params = [Param(key, json.dumps(value)) for key, value in _flat(config).items()]
            for i in range(0, len(params), 100):  # at most 100 at once
                self._client.log_batch(run_id, params=params[i : i + 100])
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.id = run_id
        self.place = f"run {run_id} in {self._client.tracking_uri}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self.id, [self._metric(key, value, now, step) for key, value in values.items()])

    def log_text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self.id, text, f"{name}/step_{step:08}.txt")

    def close(self, end: End) -> None:
        self._client.set_terminated(self.id, {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[end])


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any], str | None], Tracker]] = {
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": MLflow,
}


class TrackerThread:
    """Calls a tracker in a thread of its own. An exception loses that event only."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self._tracker = name, tracker
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._submitted = 0
        self._done, self._failed, self._error = 0, 0, ""  # set by the thread
        self._reported = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:
                self._error = self._error or one_line(f"{type(error).__name__}: {error}")
                self._failed += 1
            self._done += 1

    def _submit(self, call: Callable[[], None]) -> None:
        self._submitted += 1
        self._calls.put(call)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._submit(lambda: self._tracker.log(step, values))

    def log_text(self, step: int, name: str, text: str) -> None:
        self._submit(lambda: self._tracker.log_text(step, name, text))

    def first_error(self) -> str | None:
        """Returns a warning about the first lost event, once."""
        if not self._failed or self._reported:
            return None
        self._reported = True
        return f"train.log_to: {self.name} failed ({self._error}): training continues"

    def close(self, end: End) -> str | None:
        """Ends the tracker's run. Returns a warning if events were lost."""
        self._submit(lambda: self._tracker.close(end))
        self._calls.put(None)
        self._thread.join(CLOSE_SECONDS)
        lost = self._failed + self._submitted - self._done
        reason = self._error or f"not done after {CLOSE_SECONDS:.0f} s"
        return f"train.log_to: {self.name} lost {lost} events ({reason})" if lost else None


def open_trackers(
    names: Sequence[str], logs: Path, name: str, config: Mapping[str, Any]
) -> tuple[list[TrackerThread], list[str]]:
    """Starts the run `name`, or continues it if `logs` has its ids. Also returns messages for the user.

    Raises UserError if a package is missing, or if a new run cannot be started. A continued run does without a tracker
    that fails, with a warning.
    """
    logs.mkdir(parents=True, exist_ok=True)
    ids = _read_ids(logs / IDS)
    threads, messages = [], []
    for key in dict.fromkeys(names):
        if key not in TRACKERS:
            continue
        try:
            tracker = TRACKERS[key](logs, name, config, ids.get(key))
        except ImportError as error:
            raise UserError(f"train.log_to: {key} is not installed ({error}): pip install {key}") from error
        except Exception as error:
            reason = one_line(f"train.log_to: {key} could not be started ({type(error).__name__}: {error})")
            if key not in ids:
                raise UserError(reason) from error
            messages.append(f"warning: {reason}: training continues without it")
            continue
        ids[key] = tracker.id
        write_atomic(logs / IDS, json.dumps(ids) + "\n")
        threads.append(TrackerThread(key, tracker))
        messages.append(f"logging to {key} ({tracker.place})")
    return threads, messages


def _read_ids(file: Path) -> dict[str, str]:
    try:
        ids = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in ids.items() if isinstance(value, str)} if isinstance(ids, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"model.d_model": 64} from {"model": {"d_model": 64}}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
