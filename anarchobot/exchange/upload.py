"""Uploads an exported folder to the Hugging Face Hub, after a check that it names no path of this machine.

huggingface_hub's settings apply, such as HF_TOKEN and HF_ENDPOINT.
"""

import re
from pathlib import Path

from anarchobot import __version__
from anarchobot.config.errors import UserError
from anarchobot.exchange import hub

_TEXT_FILES = (".md", ".json", ".jinja", "Modelfile")
_VOCABULARIES = ("tokenizer.json", "vocab.json")  # of any text
_ROOTS = "Users|home|root|private|Volumes|tmp|var|mnt|media|opt|srv"


def check_repo(repo: str) -> None:
    """Raises UserError if `repo` is not a valid ORG/NAME, or nobody is logged in."""
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except errors.HFValidationError:
        repo = ""
    if repo.count("/") != 1:
        raise UserError("argument --push: expected a name on the Hugging Face Hub, ORG/NAME")
    try:
        HfApi().whoami()
    except errors.LocalTokenNotFoundError:
        raise UserError("argument --push: log in with `hf auth login`, or set HF_TOKEN") from None
    except Exception as error:  # the package raises its own, its network library's and built-in exceptions
        raise _failed("argument --push: can't log in to", error, "try again") from error


def check_paths(folder: Path) -> None:
    """Raises UserError if a text file in `folder` has a path of this machine, such as that of a home folder."""
    own = [rf"{re.escape(str(path))}\b" for path in (Path.home(), Path.cwd()) if path.name]
    starts = "|".join([rf"/(?:{_ROOTS})/", *own])
    path = re.compile(rf"(?<![\w.:/<>-])(?:{starts})[^\s`'\"|)\]]*")
    for file in sorted(folder.iterdir()):
        if file.name.endswith(_TEXT_FILES) and file.name not in _VOCABULARIES:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if match := path.search(line):
                    raise UserError(
                        f"{file}:{number}: not uploaded: it names a path of this machine, {match[0]}: remove it, and "
                        f"upload the folder with `hf upload`"
                    )


def upload(folder: Path, repo: str, public: bool) -> str:
    """Uploads the files of `folder` to the model `repo`, which is created if it does not exist; returns its URL.

    Raises UserError if it can't, or if the model exists and is public, but `public` is false.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not hub.show_progress:
        disable_progress_bars()
    api = HfApi(library_name="anarchobot", library_version=__version__)
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.model_info(repo).private:
            raise UserError(f"{repo}: not uploaded: this model is public: pass --public, or choose another name")
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Export by AnarchoBot {__version__}")
    except UserError:
        raise
    except Exception as error:  # see check_repo
        hint = f"try again with `hf upload {repo} {folder}`"
        raise _failed(f"{folder}: can't be uploaded to {repo} on", error, hint) from error
    return str(url)


def _failed(what: str, error: Exception, hint: str) -> UserError:
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        hint = "check the token's rights (`hf auth login` or HF_TOKEN)"
    return UserError(f"{what} the Hugging Face Hub ({hub.reason(error)}): {hint}")
