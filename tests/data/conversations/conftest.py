from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.tokenizers.templates import KINDS, TEMPLATES, Both


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Both]:
    """A tokenizer with a template, by their names, made once."""
    models = {kind: make() for kind, make in KINDS.items()}

    @cache
    def made(kind: str, template: str) -> Both:
        folder: Path = tmp_path_factory.mktemp("chat") / "model"
        return Both(folder, models[kind], TEMPLATES[template])

    return made
