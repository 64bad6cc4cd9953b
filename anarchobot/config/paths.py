"""Names of files that users give: the home folder, Unicode normalization, and several names of one folder."""

import os
import shlex
import unicodedata
from pathlib import Path

RUNS = Path("runs")  # the folder of run folders
NAMED_RUNS = 3  # in an error


def find_path(name: str) -> str:
    """Expands ~. If there is no such file, but one whose name is the same text in another Unicode normalization,
    returns that name: é is one character in what is typed, and two in names from some Macs and their archives."""
    expanded = os.path.expanduser(name)  # noqa: PTH111  Path's drops ./ and a final slash
    if expanded.isascii() or os.path.lexists(expanded):
        return expanded
    path = Path(Path(expanded).anchor)  # the root, or the current folder
    for part in Path(expanded).relative_to(path).parts:
        path /= part
        if not part.isascii() and not os.path.lexists(path):
            path = path.with_name(_other_normalization(path))
    return str(path)


def did_you_mean_run(path: Path) -> str:
    """`; did you mean 'runs/notes'?` for `notes`, if that exists: run folders are in runs/ by default. For the `chat`
    of `train`, when it will exist. Else empty."""
    if path.name == "chat" and (path.parent / "train.json").is_file():
        return f": the conversations are trained after the texts (anarchobot monitor {path.parent})"
    inside = RUNS / path
    return f"; did you mean '{inside}'?" if not path.is_absolute() and inside.exists() else ""


def such_as_runs() -> str:
    """`; such as runs/b or runs/a`, the run folders in runs/ that were saved last; empty if there are none."""
    saved = sorted(RUNS.glob("*/latest.json"), key=lambda file: -file.stat().st_mtime)
    names = [shlex.quote(str(file.parent)) for file in saved[:NAMED_RUNS]]
    return f"; such as {' or '.join(names)}" if names else ""


def chat_run_of(path: str | Path) -> Path | None:
    """The run on conversations that belongs to a run of `train`, if there is one: its `chat` folder."""
    folder = Path(path)
    chat = (folder.parent if folder.suffix == ".json" else folder) / "chat"
    return chat if (chat.parent / "train.json").is_file() and (chat / "latest.json").is_file() else None


def model_name_of(path: str | Path) -> str:
    """The name of a run: of its folder, also for a step or best.json in it; of the whole for the `chat` of `train`."""
    folder = Path(path).resolve()
    if folder.suffix == ".json" or folder.name.startswith("step_"):
        folder = folder.parent
    is_part = folder.name == "chat" and (folder.parent / "train.json").is_file()
    return folder.parent.name if is_part else folder.name


def _other_normalization(path: Path) -> str:
    """The name beside `path` that is the same text; its own name if there is none, or several."""
    try:
        names = [file.name for file in path.parent.iterdir() if _normalized(file.name) == _normalized(path.name)]
    except OSError:
        names = []
    return names[0] if len(names) == 1 else path.name


def _normalized(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def is_same_folder(a: Path, b: Path) -> bool:
    """Also through links, and in another case where the file system ignores case."""
    try:
        return a.samefile(b)
    except OSError:  # one of them does not exist
        return a.resolve() == b.resolve()
