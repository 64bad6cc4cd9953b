"""Shared fixtures. A fast BLAS, if there is one, is loaded before MLX is imported; it only makes tests faster."""

import gc
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from anarchobot.system.blas import load_fast_blas
from tests.tiny import make_shards

load_fast_blas()

import mlx.core as mx  # noqa: E402

UNCOMPILED = ("exchange", "inference", "serving", "cli", "evaluation", "test_mlx_lm_models")

# Background jobs of a shell ignore Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time, without Hypothesis's deadline of 0.2 s, which fails on a busy machine. Tests can
# override these settings.
settings.register_profile(
    "suite", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def cpu_by_default() -> None:
    """On a Mac as well: expected values are a CPU's. `anarchobot bench --device` checks a GPU."""
    mx.set_default_device(mx.cpu)


@pytest.fixture(autouse=True)
def no_compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """In UNCOMPILED (folders and files), functions are not compiled: on a CPU, MLX runs the C++ compiler for half a
    second for each new kernel, and mlx-lm's modules alone have hundreds."""
    if not {request.path.parent.name, request.path.stem} & set(UNCOMPILED):
        yield
        return
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def without_garbage() -> None:
    """For tests that measure MLX's memory: arrays of earlier tests that are freed meanwhile would be subtracted."""
    gc.collect()


def shared_data_folder() -> Path | None:
    """The folder of real texts: ANARCHOBOT_TEST_DATA, by default ../shared/data; None if it does not exist."""
    folder = Path(os.environ.get("ANARCHOBOT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = shared_data_folder()
    if folder is None:
        pytest.skip("no test data (set ANARCHOBOT_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: tests that damage shards copy them first."""
    return make_shards(tmp_path_factory.mktemp("tiny") / "shards")


@pytest.fixture(autouse=True)
def _no_request_log() -> Iterator[None]:
    """`serve` in this process logs to a stderr that pytest closes after the test."""
    yield
    for name in ("anarchobot.serving", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
