"""What all tests share. MLX is imported after a fast BLAS, where there is one: it only makes the suite quicker."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from anarchobot.system.blas import load_fast_blas
from tests.tiny import make_shards

load_fast_blas()

# A suite in the background of a shell ignores Ctrl-C, and so would the programs that it starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time, and as long as they need: Hypothesis allows one 0.2 s, for which a busy machine may stand
# still. A test's own settings come on top.
settings.register_profile(
    "suite", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


def shared_data_folder() -> Path | None:
    """Real text for tests: ANARCHOBOT_TEST_DATA, else ../shared/data; None where there is none."""
    folder = Path(os.environ.get("ANARCHOBOT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = shared_data_folder()
    if folder is None:
        pytest.skip("no test data here (ANARCHOBOT_TEST_DATA): the cases without it have run")
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only for the tests: one that damages shards copies them first."""
    return make_shards(tmp_path_factory.mktemp("tiny") / "shards")
