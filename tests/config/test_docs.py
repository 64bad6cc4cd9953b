"""docs/configuration.md is generated from the schema."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.loading import leaf_keys


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "write_config_docs", Path(__file__).parents[2] / "scripts" / "write_config_docs.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--check"]) == 0, capsys.readouterr().err


def test_every_key_has_its_row(script: ModuleType) -> None:
    rows = [line for line in script.page().splitlines() if line.startswith("| `") and not line.startswith("| `--")]
    assert [row.split("`")[1] for row in rows] == [
        key.partition(".")[2] for key in (*leaf_keys(), *leaf_keys(AdaptConfig))
    ]
    assert {row.replace("\\|", "").count("|") for row in rows} == {5}


def test_check_reports_a_stale_page_without_writing_it(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "PAGE", tmp_path / "configuration.md")
    assert script.main(["--check"]) == 1
    assert not script.PAGE.exists()
    assert script.main([]) == 0
    assert script.main(["--check"]) == 0
    script.PAGE.write_text(script.page().replace("32000", "32001"))
    assert script.main(["--check"]) == 1
    assert capsys.readouterr().err == "configuration.md is out of date: run make docs\n" * 2
