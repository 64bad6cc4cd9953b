"""safetensors files, compared with the safetensors package; damaged files are one-line errors, never wrong values."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from anarchobot.config.errors import UserError
from anarchobot.exchange import safetensors_file
from anarchobot.exchange.dtypes import DTYPES, Dtype

torch = pytest.importorskip("torch")
torch_files = pytest.importorskip("safetensors.torch")


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "b.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "a.weight": rng.standard_normal((7, 2)).astype(np.float32).T,  # not contiguous
        "norm": rng.standard_normal(9).astype(np.float32),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_package_reads_our_files(tmp_path: Path, dtype: Dtype) -> None:
    safetensors_file.write(tmp_path / "m", tensors(), dtype, {"format": "pt"})
    found = torch_files.load_file(tmp_path / "m")
    assert set(found) == set(tensors())
    for name, array in tensors().items():
        expected = torch.from_numpy(array.copy()).to(getattr(torch, dtype))
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected)
    with safe_open(tmp_path / "m", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_the_packages_files(tmp_path: Path, dtype: Dtype) -> None:
    theirs = {name: torch.from_numpy(array.copy()).to(getattr(torch, dtype)) for name, array in tensors().items()}
    torch_files.save_file(theirs, tmp_path / "m", {"format": "pt"})
    found = safetensors_file.read(tmp_path / "m")
    assert set(found) == set(theirs)
    for name, tensor in theirs.items():
        loaded = found[name].load()
        assert loaded.dtype == np.float32
        np.testing.assert_array_equal(loaded, tensor.float().numpy())


def test_truncation_is_detected_at_every_length(tmp_path: Path) -> None:
    safetensors_file.write(tmp_path / "whole", tensors(), "float32", {})
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut: (truncated|not a safetensors file)"):
            safetensors_file.read(tmp_path / "cut")


def test_unsupported_dtypes_and_malformed_headers_are_rejected(tmp_path: Path) -> None:
    torch_files.save_file({"w": torch.zeros(3, dtype=torch.int64)}, tmp_path / "ints")
    assert safetensors_file.read(tmp_path / "ints", any_dtype=True)["w"].code == "I64"
    with pytest.raises(UserError, match="w: dtype I64, expected one of F32, F16, BF16"):
        safetensors_file.read(tmp_path / "ints")
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    malformed: tuple[Any, ...] = (
        *({**good, "shape": [3]}, {**good, "shape": [-2]}, {**good, "data_offsets": [8, 0]}, {**good, "dtype": 5}),
        *({**good, "shape": 2}, {"dtype": "F32"}, {**good, "more": 1}, [], None, {**good, "shape": [True, 2]}),
    )
    for entry in malformed:
        text = json.dumps({"w": entry}).encode()
        (tmp_path / "malformed").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        with pytest.raises(UserError, match="malformed: not a safetensors file"):
            safetensors_file.read(tmp_path / "malformed")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 255))
def test_fuzzed_files_give_tensors_or_user_errors(tmp_path: Path, noise: bytes, at: int, byte: int) -> None:
    safetensors_file.write(tmp_path / "fuzz", tensors(), "bfloat16", {})
    whole = bytearray((tmp_path / "fuzz").read_bytes())
    whole[min(at, len(whole) - 1)] = byte
    for content in (bytes(whole), noise, len(noise).to_bytes(8, "little") + noise):
        (tmp_path / "fuzz").write_bytes(content)
        try:
            for tensor in safetensors_file.read(tmp_path / "fuzz").values():
                tensor.load()
        except UserError as error:
            assert str(error).startswith(str(tmp_path / "fuzz"))


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"a":{"dtype":"F32","shape":[' + b"1," * 99 + b'1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[4611686018427387904,4611686018427387904,0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
    ],
    ids=["deep", "100 dimensions", "huge and empty", "huge number"],
)
def test_extreme_headers_are_one_line_errors(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "m"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=r"m: not a safetensors file \(.{5,100}\)$"):
        safetensors_file.read(file)


def test_tensors_that_overlap_are_rejected(tmp_path: Path) -> None:
    """They would take many times the size of the file: here 1,000 tensors of 4 kB in 60 kB."""
    entry = {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}
    file = tmp_path / "m"
    for others in (
        {f"w{i}": entry for i in range(999)},
        {"part": {**entry, "shape": [1], "data_offsets": [3996, 4000]}},
    ):
        text = json.dumps({"w": entry, **others}).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4000))
        for any_dtype in (False, True):
            with pytest.raises(UserError, match=r"m: \w+ overlaps \w+: it starts at byte [\d,]+, before byte [\d,]+"):
                safetensors_file.read(file, any_dtype)
    torch_files.save_file({"a": torch.zeros(0), "b": torch.ones(2), "c": torch.zeros(0, 3)}, file)  # empty ones don't
    assert safetensors_file.read(file)["b"].load().tolist() == [1, 1]


def test_sizes_of_dtypes_that_only_mlx_reads_are_checked(tmp_path: Path) -> None:
    text = json.dumps({"w": {"dtype": "I64", "shape": [10**9], "data_offsets": [0, 8 * 10**9]}}).encode()
    (tmp_path / "m").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(UserError, match=r"m: truncated: \d+ bytes, but w ends at byte 8,000,000,0\d\d: copy it again"):
        safetensors_file.read(tmp_path / "m", any_dtype=True)
