"""Runs PyTorch on one thread, like MLX in these tests."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
