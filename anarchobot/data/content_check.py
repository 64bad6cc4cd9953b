"""The shards' contents read and compared with the manifest once, in a thread beside the training."""

import threading
from collections.abc import Iterable
from pathlib import Path

from anarchobot.config.errors import UserError
from anarchobot.data.shards import first_altered


class ContentCheck:
    """Begins at once; `problem` says what is wrong with the first damaged file, as soon as it is found."""

    def __init__(self, folders: Iterable[str | Path]) -> None:
        self.problem: str | None = None
        self._folders = list(folders)
        # A daemon: the end of a run does not wait for it.
        threading.Thread(target=self._run, name="shard contents", daemon=True).start()

    def _run(self) -> None:
        try:
            for folder in self._folders:
                if (file := first_altered(folder)) is not None:
                    self.problem = f"{Path(folder) / file}: its content is not what was written: pretokenize again"
                    return
        except (UserError, OSError) as error:
            self.problem = str(error)
