"""Conversions to float16 and bfloat16, compared with PyTorch."""

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.exchange.dtypes import from_bfloat16, to_dtype

torch = pytest.importorskip("torch")


def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    halfway = (rng.integers(0, 2**15, 20000, dtype=np.uint32) << 16 | 0x8000).view(np.float32)  # between two bfloat16
    both = np.concatenate([bits, halfway, -halfway, np.float32([0.0, -0.0, 1e-45, 65504.0])])
    return both[np.isfinite(both)].astype(np.float32)


def test_bfloat16_equals_pytorch_bit_for_bit() -> None:
    x = values()
    ours = to_dtype("w", x, "bfloat16")
    theirs = torch.from_numpy(x).bfloat16()
    np.testing.assert_array_equal(ours, theirs.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(from_bfloat16(ours).view(np.uint32), theirs.float().numpy().view(np.uint32))


def test_float16_equals_pytorch_and_overflow_is_an_error() -> None:
    x = values()
    x = x[np.abs(x) < 65519]
    np.testing.assert_array_equal(to_dtype("w", x, "float16"), torch.from_numpy(x).half().numpy())
    with pytest.raises(UserError, match=r"^model.norm.weight: value 70000 exceeds float16's maximum, 65504: use bf"):
        to_dtype("model.norm.weight", np.float32([1, -70000]), "float16")


def test_float32_is_not_copied() -> None:
    x = values()
    assert to_dtype("w", x, "float32") is x
