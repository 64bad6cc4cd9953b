"""The built-in text exists, is large enough and deterministic."""

import os
import sys
from pathlib import Path

from anarchobot.data.sources import builtin


def test_texts_are_megabytes_in_a_fixed_order() -> None:
    texts = list(builtin.texts())
    assert sum(len(text.encode()) for text in texts) > 5e6
    assert texts == list(builtin.texts())
    assert texts[: len(builtin.topics())] == builtin.topics()
    assert Path(sys.modules["json"].__file__ or "").read_text(encoding="utf-8") in texts


def test_topics_are_the_language_reference() -> None:
    from pydoc_data.topics import topics

    assert len(builtin.topics()) == len(topics) > 50
    assert any(text == topics["with"] and '"with" statement' in text for text in builtin.topics())


def test_source_files_exclude_tests_and_site_packages() -> None:
    files = builtin.source_files()
    assert files == sorted(files)
    assert {"argparse.py", "pickle.py"} <= {path.name for path in files}
    library = Path(os.__file__).parent
    folders = {part for path in files for part in path.relative_to(library).parts[:-1]}
    assert "json" in folders and not folders & {"test", "tests", "site-packages", "dist-packages", "pydoc_data"}
