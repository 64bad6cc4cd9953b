"""Models on the Hugging Face Hub by name, `ORG/NAME` or `ORG/NAME@REVISION`, in huggingface_hub's own cache.

huggingface_hub's settings apply, such as HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE. It is imported only when a
name is looked up.
"""

import re
import shutil
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from anarchobot.config.errors import UserError, did_you_mean
from anarchobot.config.paths import did_you_mean_run

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

# Only files of the repository's top level, because subfolders hold copies in other formats; and a setting of
# sentence-transformers.
CONFIGS = ("config.json", "adapter_config.json")
SMALL_FILES = (
    *CONFIGS,
    *("generation_config.json", "model.safetensors.index.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"),
    "README.md",  # with the license
    ".gitattributes",  # every repository has it: huggingface_hub warns if there is none of the files
)
WEIGHTS = ("model*.safetensors", "adapter*.safetensors")
_OTHER_WEIGHTS = (".bin", ".gguf", ".pt", ".pth", ".ckpt", ".safetensors", ".onnx", ".h5", ".msgpack")
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?", re.ASCII)

show_progress = True  # the command line turns it off for --quiet


def resolve_model(path: str | Path) -> Path:
    """Returns an existing path as it is, and the folder of a model on the Hub after downloading it.

    ORG/NAME is a path if the folder ORG exists; ORG/NAME@REVISION is always a name. Raises UserError if there is
    neither such a path nor such a model, or it can't be downloaded.
    """
    path = Path(path)
    if path.exists():
        return path
    match = _NAME.fullmatch(str(path))
    near = did_you_mean_run(path)
    if not near and match is not None and (match[2] is not None or not path.parent.is_dir()):
        return _snapshot(match[1], match[2])
    near = near or did_you_mean(str(path), map(str, path.parent.iterdir()) if path.parent.is_dir() else [])
    hub_name = "ORG/NAME" if match is None else f"{path}@main"
    raise UserError(
        f"{path}: no such folder"
        + (near or f": expected the folder of a run, model or adapter, or a name on the Hugging Face Hub ({hub_name})")
    )


def model_name(folder: Path) -> str:
    """Returns ORG/NAME@COMMIT for a folder in the Hub's cache, and the path of any other folder."""
    repo, snapshots, commit = ("", "", "", *folder.parts)[-3:]
    if snapshots == "snapshots" and repo.startswith("models--"):
        return f"{repo.removeprefix('models--').replace('--', '/')}@{commit}"
    return str(folder)


def repo_name(folder: Path) -> str:
    """Returns ORG/NAME for a folder in the Hub's cache, as other programs take it, and the path of any other folder."""
    name = model_name(folder)
    return name if name == str(folder) else name.partition("@")[0]


def hub_name(text: str) -> str | None:
    """Returns `text` if it is ORG/NAME or ORG/NAME@REVISION."""
    return text if _NAME.fullmatch(text) else None


def cached_file(name: str, file: str) -> Path | None:
    """A file of the model ORG/NAME[@REVISION], if it is in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = name.partition("@")
    path = try_to_load_from_cache(repo, file, revision=revision or None)
    return Path(path) if isinstance(path, str) else None


def pinned_name(path: str) -> str:
    """Returns ORG/NAME@COMMIT for a name of the Hub, so that it means the same files later, and a path as it is."""
    return path if Path(path).exists() else model_name(resolve_model(path))


@lru_cache  # a process uses the same commit throughout
def _snapshot(repo: str, revision: str | None) -> Path:
    from huggingface_hub import errors

    name = repo if revision is None else f"{repo}@{revision}"
    try:
        return _download(repo, revision, name)
    except UserError:
        raise
    except errors.HFValidationError as error:
        raise UserError(f"{name}: no such folder, and not a valid name on the Hugging Face Hub (ORG/NAME)") from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name}: access is restricted: accept the terms at https://huggingface.co/{repo}, and log in with "
            "`hf auth login` or HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: no such folder, and no such model on the Hugging Face Hub: check the name; for a private model, "
            "log in with `hf auth login` or HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name}: the model has no such revision: expected a branch, a tag or a commit") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{name}: no such folder, not fully in the Hub's cache, and {_unreachable(error)}") from error
    except Exception as error:  # the package raises its own, its network library's and built-in exceptions
        denied = isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403)
        hint = "check the token (`hf auth login` or HF_TOKEN)" if denied else "try again"
        raise UserError(
            f"{name}: can't be downloaded from the Hugging Face Hub ({reason(error)}): {hint}, or give a local folder"
        ) from error


def _download(repo: str, revision: str | None, name: str) -> Path:
    """Returns the folder of a model in the cache, after downloading what is missing. Raises huggingface_hub's errors.

    Without a connection, the cached revision is used. The small files come first: they are enough to know whether the
    model can be loaded. Weights are downloaded by this thread, because those of snapshot_download ignore Ctrl-C.
    """
    from huggingface_hub import errors, get_cached_repo_tree, snapshot_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Hidden(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(SMALL_FILES), tqdm_class=Hidden))
    try:
        files = [file for file in get_cached_repo_tree(repo, revision=folder.name) if "/" not in file.path]
    except errors.CachedRepoTreeNotFoundError:  # no connection, and another program filled the cache
        return folder
    weights = [file for file in files if any(fnmatchcase(file.path, pattern) for pattern in WEIGHTS)]
    if not weights:
        others = [file.path for file in files if file.path.endswith(_OTHER_WEIGHTS)]
        found = f"only {', '.join(others[:3])}" if others else "no weights at all"
        raise UserError(
            f"{name}: the repository has {found}: expected {' or '.join(WEIGHTS)}: choose a repository of this model "
            "with safetensors files"
        )
    if not any((folder / config).exists() for config in CONFIGS):
        raise UserError(f"{name}: the repository has no config.json: expected a model of transformers or mlx-lm")
    if missing := [file for file in weights if not (folder / file.path).exists()]:
        _download_weights(repo, folder, missing)
    return folder


def _download_weights(repo: str, folder: Path, files: "Sequence[RepoFile]") -> None:
    from huggingface_hub import hf_hub_download
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    plan = [hf_hub_download(repo, file.path, revision=folder.name, dry_run=True) for file in files]
    size = sum(file.file_size or 0 for file in plan if not file.is_cached)  # a file of another commit may be
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{model_name(folder)}: {decimal(size)} to download, but only {decimal(free)} free in "
            f"{folder.parents[2]}: free some space, or set HF_HOME to a folder on another disk"
        )
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    if show_progress and size:
        console.print(f"downloading {model_name(folder)} ({decimal(size)})", markup=False)
    columns = (BarColumn(20), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (show_progress and console.is_terminal)) as bar:
        task = bar.add_task("", total=size)

        class FileBar:
            """What hf_hub_download takes as the progress bar of a file: advances `bar`."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                pass

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *exc: object) -> None:
                pass

            def update(self, n: float) -> None:
                bar.update(task, advance=n)

            def ignore(self, *args: Any, **kwargs: Any) -> None:
                pass

            close = update_transfer = set_postfix_str = set_transfer_postfix_str = ignore

        for file in files:
            hf_hub_download(repo, file.path, revision=folder.name, tqdm_class=FileBar)


def _unreachable(error: Exception) -> str:
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set: unset it to download the model, or give a local folder"
    cause = error.__cause__ or error
    return f"the Hugging Face Hub can't be reached ({reason(cause)}): check the network, or give a local folder"


def reason(error: BaseException) -> str:
    """The message in one line, without URLs: those of downloads are signed."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return f"HTTP {error.response.status_code} {error.server_message or ''}".strip()
    text = re.sub(r"\S+://\S+", "URL", " ".join(str(error).split()))
    return text[:200] or type(error).__name__
