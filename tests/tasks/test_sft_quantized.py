"""sft and dpo on a base that is quantized in its folder, and without a configuration file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.config.templates import DEFAULT_CONFIGS
from anarchobot.exchange.exporting import export
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.runs import checkpoint
from anarchobot.tasks.dpo import dpo
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tasks.sft import sft
from tests.exchange.quantized_folder import quantize_folder
from tests.tasks.test_pretrain import assert_same_state
from tests.tasks.tuning import base as base
from tests.tasks.tuning import chats as chats
from tests.tasks.tuning import events, tuning
from tests.tasks.tuning import preferences as preferences
from tests.tiny import loaded

CONFIGS = Path(__file__).parents[2] / "configs" / "tuning"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    export(base, "mlx", folder / "floats")
    return quantize_folder(folder / "floats", folder / "packed", bits=4, group_size=32)


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, packed: Path, chats: Path) -> None:
    settings: dict[str, Any] = {"lora__r": 4, "lora__dropout": 0.1, "train__total_steps": 9}
    sft(tuning(tmp_path, "whole", packed, chats, **settings), show="nothing")
    sft(tuning(tmp_path, "broken", packed, chats, **settings | {"train__total_steps": 4}), show="nothing")
    sft(tuning(tmp_path, "broken", packed, chats, **settings, train__checkpoint_path="auto"), show="nothing")
    assert_same_state(tmp_path / "whole", tmp_path / "broken")
    first, *_, last = (line["val_loss"] for line in events(tmp_path / "whole", "eval"))
    assert last < first
    assert checkpoint.find(tmp_path / "whole").config.model.quantization == '{"bits": 4, "group_size": 32}'


def test_dpo(tmp_path: Path, packed: Path, preferences: Path) -> None:
    summary = dpo(tuning(tmp_path, "run", packed, preferences, lora__r=4, train__total_steps=2), show="nothing")
    assert summary["finished"] and (tmp_path / "run" / "adapters").is_dir()


def test_quantized_share_is_shown(
    tmp_path: Path, packed: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft(tuning(tmp_path, "run", packed, chats, lora__r=4, train__total_steps=1))
    assert "99.7% of the rest in 4 bits" in capsys.readouterr().err


def test_training_quantized_weights_is_rejected(tmp_path: Path, packed: Path, chats: Path, tiny_shards: Path) -> None:
    with pytest.raises(UserError, match=r"train\.init_from: the weights of .* are quantized .*: set lora\.r"):
        sft(tuning(tmp_path, "run", packed, chats), show="nothing")
    adapters = tuning(tmp_path, "run", packed, chats, lora__r=4)
    lora = adapters.config.lora.model_copy(update={"quantize": 4})
    again = replace(adapters, config=adapters.config.model_copy(update={"lora": lora}))
    with pytest.raises(UserError, match=r"lora\.quantize.*: the weights of .* are quantized already: remove it"):
        sft(again, show="nothing")
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__init_from=str(packed))
    with pytest.raises(UserError, match=r"train\.init_from: the weights of .* are quantized: import the model first"):
        pretrain(config, show="nothing")
    assert not (tmp_path / "run").exists()


def test_without_a_configuration_file(tmp_path: Path, base: Path, chats: Path) -> None:
    """--model and --dataset are enough; settings that follow replace the defaults. One of lora asks for adapters."""
    words = ["--model", str(base), "--dataset", str(chats), "--checkpoint-dir", str(tmp_path / "run"), "--quiet"]
    assert main(["sft", *words, "train.total_steps=2", "train.device=cpu", "lora.alpha=16"]) == 0
    config = checkpoint.find(tmp_path / "run").config
    assert config.data.seq_len == config.model.max_seq_len == 64  # less than the default of 512
    assert (config.lora.r, config.train.total_steps, config.train.epochs) == (8, 2, None)
    assert config.model == load_pretrained(str(base)).model


def test_default_settings_are_those_of_the_recipes() -> None:
    def read(path: str | Path) -> dict[str, dict[str, Any]]:
        values: dict[str, dict[str, Any]] = yaml.safe_load(Path(path).read_text())
        del values["train"]["save_dir"]
        return values

    assert read(DEFAULT_CONFIGS["sft"]) == read(CONFIGS / "lora_balanced.yaml")
    dpo_settings = read(DEFAULT_CONFIGS["dpo"])
    assert dpo_settings.pop("lora") == read(CONFIGS / "lora_balanced.yaml")["lora"]
    assert float(dpo_settings["train"].pop("lr")) == 5e-5
    recipe = read(CONFIGS / "dpo.yaml")
    del recipe["train"]["lr"]
    assert dpo_settings == recipe
