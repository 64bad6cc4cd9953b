"""What a run writes down: metrics.jsonl, TensorBoard's event files and, at the end, a summary.

Every line is flushed as it is written, so that a killed run keeps all but perhaps the last.
"""

import json
import time
from pathlib import Path
from typing import Any, Self

from anarchobot.training.checkpoint import write_json

# TensorBoard's tags; what is not here (text, times) is in metrics.jsonl alone.
_TAGS = {
    "train": ("loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_gb"),
    "eval": ("val_loss", "val_bpb", "perplexity"),
}


class MetricsLog:
    """Appends events to `folder`/metrics.jsonl and `folder`/tensorboard; a context, which closes both."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        path = folder / "metrics.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")  # the run before was killed as it wrote
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def event(self, event: str, step: int, **values: Any) -> None:
        """One JSON object: step, event, time (seconds since 1970) and the values."""
        line = {"step": step, "event": event, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name in _TAGS.get(event, ()):
            self._board.add_scalar(f"{event}/{name}", values[name], step)
        if event == "sample":
            self._board.add_text("sample", values["text"], step)
        self._board.flush()

    def summary(self, values: dict[str, Any]) -> None:
        write_json(self.folder / "final_training_summary.json", values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self._board.close()
