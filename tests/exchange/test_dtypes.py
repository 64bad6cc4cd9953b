"""Fewer bits: PyTorch's conversions are the truth."""

import numpy as np
import pytest
import torch

from anarchobot.config.errors import UserError
from anarchobot.exchange.dtypes import narrowed, widened


def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    halfway = (rng.integers(0, 2**15, 20000, dtype=np.uint32) << 16 | 0x8000).view(np.float32)  # between two bfloat16
    both = np.concatenate([bits, halfway, -halfway, np.float32([0.0, -0.0, 1e-45, 65504.0])])
    return both[np.isfinite(both)].astype(np.float32)


def test_bfloat16_is_pytorchs_bit_for_bit_and_comes_back() -> None:
    x = values()
    ours = narrowed("w", x, "bfloat16")
    theirs = torch.from_numpy(x).bfloat16()
    np.testing.assert_array_equal(ours, theirs.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(widened(ours).view(np.uint32), theirs.float().numpy().view(np.uint32))


def test_float16_is_pytorchs_and_refuses_what_is_beyond_it() -> None:
    x = values()
    x = x[np.abs(x) < 65519]
    np.testing.assert_array_equal(narrowed("w", x, "float16"), torch.from_numpy(x).half().numpy())
    with pytest.raises(UserError, match=r"^model.norm.weight: holds 70000, and float16 ends at 65504: export it as bf"):
        narrowed("model.norm.weight", np.float32([1, -70000]), "float16")


def test_float32_is_the_array_itself() -> None:
    x = values()
    assert narrowed("w", x, "float32") is x
