"""Any configuration either trains or is rejected with a one-line error."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anarchobot.cli.main import main
from anarchobot.config.loading import leaf_keys
from tests.config.test_any_input import VALUES
from tests.config.test_loading import another_value
from tests.tiny import write_config

OWN = {"train.save_dir", "train.log_path", "data.shard_dir", "train.device", "train.backend", "train.supervise"}
# Valid keys whose values could take too long or too much memory.
TOO_LARGE = {"model", "train.total_steps", "train.epochs", "train.token_budget", "generation.max_new_tokens"}
KEYS = [key for key in leaf_keys() if key not in OWN and key.partition(".")[0] != "tokenizer"]
SMALL = {key: another_value(key, info.default) for key, info in leaf_keys().items()}
GOOD = st.sampled_from([key for key in KEYS if not {key, key.partition(".")[0]} & TOO_LARGE]).map(
    lambda key: f"{key}={yaml.safe_dump(SMALL[key], default_flow_style=True).splitlines()[0]}"
)
ODD = st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from([v for v in VALUES if v != "1e5"]))


@pytest.mark.parametrize("examples", [15, pytest.param(500, marks=pytest.mark.faults)])
def test_any_configuration(
    examples: int, tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_codes: set[int] = set()
    number = 0

    @given(st.lists(st.one_of(GOOD, GOOD, ODD), min_size=1, max_size=3))
    @settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    def check(overrides: list[str]) -> None:
        nonlocal number
        number += 1
        config = write_config(tmp_path / "c.yaml", tiny_shards, tmp_path / f"run{number}", train__total_steps=2)
        capsys.readouterr()
        code = main(["pretrain", str(config), "--quiet", "--no-supervise", *overrides])
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("anarchobot: ")]
        assert code in (0, 2), (overrides, err)
        assert len(errors) == (code == 2), (overrides, err)
        assert "Traceback" not in out + err, overrides
        exit_codes.add(code)

    check()
    assert exit_codes == {0, 2}
