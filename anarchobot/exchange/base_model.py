"""The model that a run was fine-tuned, fused or imported from: its name on the Hub, and its license."""

import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from anarchobot.config.errors import UserError
from anarchobot.config.strict_yaml import parse_scalar
from anarchobot.exchange.hub import cached_file, hub_name, model_name
from anarchobot.runs import checkpoint

_MAX_RUNS = 100  # from a run to the one that it started from, and so on
_MAX_FRONT_MATTER = 65536


class BaseModel(NamedTuple):
    """`name` is ORG/NAME, or None for a local folder; `license` has the keys license, license_name
    and license_link, as far as its model card has them."""

    name: str | None
    license: dict[str, str]


def find_base_model(saved: checkpoint.Checkpoint) -> BaseModel | None:
    """Follows the runs that `saved` started from to a Hugging Face model; None if there is none, or it is gone. Reads
    local files and the Hub's cache only."""
    for _ in range(_MAX_RUNS):
        if (origin := _origin(saved)) is None:
            return None
        folder = Path(origin)
        if not folder.exists():
            name = hub_name(origin)
            return None if name is None else BaseModel(name.partition("@")[0], _license(cached_file(name, "README.md")))
        if (folder / "config.json").is_file():
            name = hub_name(model_name(folder))
            return BaseModel(name and name.partition("@")[0], _license(folder / "README.md"))
        try:
            saved = checkpoint.find(folder, files=())
        except UserError:
            return None
    return None


def _origin(saved: checkpoint.Checkpoint) -> str | None:
    """The path or name that the weights of a run come from."""
    if "imported" in saved.state:
        return str(saved.state["imported"])
    if "fused" in saved.state:
        return str(saved.state["fused"][0])
    return saved.config.train.init_from


def _license(card: Path | None) -> dict[str, str]:
    """The license in the front matter of a model card."""
    if card is None or not card.is_file():
        return {}
    with card.open("rb") as file:
        front_matter = re.match(rb"---\r?\n(.*?)\r?\n---\s", file.read(_MAX_FRONT_MATTER), re.DOTALL)
    lines = b"" if front_matter is None else front_matter[1]
    found = {}
    for key, text in re.findall(rb"^(license(?:_name|_link)?): *(\S.*?)\s*$", lines, re.MULTILINE):
        with suppress(UserError, UnicodeDecodeError):
            if isinstance(value := parse_scalar(text.decode(), key.decode()), str):
                found[key.decode()] = value
    return found
