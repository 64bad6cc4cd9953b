"""Logs a run and its continuation to the tracker named by the first argument, in the current folder, and prints what
the tracker stored, read by its own package or format. Started by test_trackers.py."""

import glob
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from anarchobot.runs.metrics_log import MetricsLog
from anarchobot.runs.trackers import IDS, open_trackers

CONFIG = {"model": {"d_model": 64}}


def offline() -> None:
    """No socket may be bound to a port or connected to a host."""

    def check(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX, address
        original_connect(self, address)

    original_connect = socket.socket.connect
    socket.socket.connect = check  # type: ignore[method-assign]
    socket.socket.bind = check  # type: ignore[method-assign]


def log(name: str, steps: range, fails: bool = False) -> None:
    """Logs the losses and a sample."""
    logs = Path("logs")
    trackers, _ = open_trackers([name], logs, "mine", CONFIG)

    def warn(text: str) -> None:
        raise AssertionError(text)

    try:
        with MetricsLog(logs, trackers=trackers, warn=warn) as metrics:
            for step in steps:
                metrics.event("train", step, loss=1 / step)
            metrics.event("sample", steps[-1], text="<once>")
            if fails:
                raise KeyError
            metrics.event("end", steps[-1], finished=True)
    except KeyError:
        pass


def read_wandb() -> dict[str, Any]:
    """Reads the records of wandb's files: a header of 7 bytes, then CRC, length, type and data of each record."""
    from wandb.proto.wandb_internal_pb2 import Record

    losses, samples, ids, ends, names = [], 0, set(), [], set()
    for file in sorted(glob.glob("logs/wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        raw, place = Path(file).read_bytes(), 7
        while place + 7 <= len(raw):
            size = int.from_bytes(raw[place + 4 : place + 6], "little")
            record = Record.FromString(raw[place + 7 : place + 7 + size])
            place += 7 + size
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            losses += [[row["step"], row["train/loss"]]] if "train/loss" in row else []
            samples += "sample" in str(sorted(row))
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                names.add(record.run.display_name)
            if record.WhichOneof("record_type") == "exit":
                ends.append(record.exit.exit_code)
    return {"losses": losses, "samples": samples, "ids": sorted(ids), "names": sorted(names), "ends": ends[-1:]}


def read_trackio() -> dict[str, Any]:
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("anarchobot")
    rows = SQLiteStorage.get_logs("anarchobot", name)
    losses = [[row["step"], row["train/loss"]] for row in rows if "train/loss" in row]
    config = SQLiteStorage.get_run_config("anarchobot", name)
    return {"losses": losses, "samples": sum("sample" in row for row in rows), "ids": [name], "config": config["model"]}


def read_mlflow() -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("anarchobot")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    return {
        "losses": sorted([metric.step, metric.value] for metric in history),
        "samples": len(client.list_artifacts(run.info.run_id, "sample")),
        "ids": [run.info.run_id],
        "names": [run.info.run_name],
        "ends": [run.info.status],
        "params": run.data.params,
    }


def main() -> None:
    offline()
    name = sys.argv[1]
    read = {"wandb": read_wandb, "trackio": read_trackio, "mlflow": read_mlflow}[name]
    log(name, range(1, 5), fails=True)
    first = read()
    log(name, range(4, 7))  # resumed from step 3
    print(json.dumps([first, read(), json.loads((Path("logs") / IDS).read_text())]))


if __name__ == "__main__":
    main()
