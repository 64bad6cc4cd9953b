""".npz files: NumPy's own are read; those that would take more memory than their size are refused before they do."""

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from anarchobot.storage.npz import open_npz


def npy(shape: str, data: bytes = b"", dtype: str = "<f4") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def read_all(path: Path) -> dict[str, np.ndarray]:
    with open_npz(path) as npz:
        return {name: npz.load(name) for name in npz.headers}


def test_files_of_numpy_are_read(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3), "b/c": np.array(7), "bytes": np.zeros(3, np.uint8),
        "empty": np.zeros((0, 4)), "fortran": np.asfortranarray(np.eye(3)[:2]), "half": np.ones(2, np.float16),
        "other byte order": np.arange(3, dtype=">f4"),
    }  # fmt: skip
    np.savez(tmp_path / "a.npz", allow_pickle=False, **arrays)
    found = read_all(tmp_path / "a.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found[name], array)


def write(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def overlapping() -> bytes:
    """A directory that lists the first array a hundred times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(100):
            archive.writestr(f"{i:02}.npy", npy("(250000,)", bytes(1_000_000)) if i == 0 else b"")
            archive.infolist()[i].header_offset = 0
            archive.infolist()[i].compress_size = archive.infolist()[0].compress_size
            archive.infolist()[i].file_size = archive.infolist()[0].file_size
            archive.infolist()[i].CRC = archive.infolist()[0].CRC
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"w.npy": npy("(1000000000,)", bytes(8))},
            r"w.npy: shape \[10{9}\] takes 4,000,000,000 bytes, but it has 8$",
        ),
        ({"w.npy": npy("(1,)", bytes(4_000_000))}, r"w.npy: shape \[1\] takes 4 bytes, but it has 4,000,000$"),
        ({"w.npy": npy("(-1, -2)", bytes(8))}, "."),
        ({"w.npy": npy("(4611686018427387904, 0)")}, "."),
        ({"w.npy": npy("(1,)", bytes(8), "|O")}, "w.npy: dtype object, expected numbers"),
        ({"w.npy": npy("(1,)", bytes(8), "<U2")}, "w.npy: dtype <U2, expected numbers"),
        ({"w.npy": npy("(1,)", bytes(16), "<c16")}, "w.npy: dtype complex128, expected numbers"),
        ({"w.npy": npy("(1,)", bytes(16), "<f16")}, "w.npy: dtype float128, expected numbers"),
        ({"w.npy": npy("(1,", bytes(8))}, "w.npy: damaged header"),
        ({"w.npy": b"hello"}, "magic string"),
        ({"w.npy": b"\x93NUMPY\x03\x00" + bytes(20)}, "w.npy: format version 3.0"),
    ],
    ids=[
        "large shape",
        "small shape",
        "negative",
        "empty",
        "object",
        "text",
        "complex",
        "long",
        "header",
        "other",
        "version",
    ],
)
def test_headers_that_state_another_size_are_refused(tmp_path: Path, content: dict[str, bytes], message: str) -> None:
    file = write(tmp_path / "a.npz", content)
    tracemalloc.start()
    with pytest.raises((ValueError, zipfile.BadZipFile), match=message):
        read_all(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000  # Python's own; the first array states 4 GB


def test_compressed_arrays_are_refused_before_they_expand(tmp_path: Path) -> None:
    file = write(tmp_path / "a.npz", {"w.npy": npy("(5000000,)", bytes(20_000_000))}, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 30_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^w.npy is compressed: [\d,]+ bytes expand to 20,000,128: save it"):
        read_all(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * file.stat().st_size


def test_arrays_that_overlap_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    file.write_bytes(overlapping())
    tracemalloc.start()
    with pytest.raises((ValueError, zipfile.BadZipFile), match="overlap"):
        read_all(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < file.stat().st_size


def test_damage_is_an_error_at_every_byte(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", allow_pickle=False, a=np.arange(4), b=np.ones(2, np.float32))
    whole = (tmp_path / "a.npz").read_bytes()
    expected = read_all(tmp_path / "a.npz")
    for at in range(0, len(whole), 3):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :]):
            (tmp_path / "b.npz").write_bytes(damaged)
            try:
                found = read_all(tmp_path / "b.npz")
            except (ValueError, EOFError, OSError, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
                continue
            for name, array in found.items():  # a byte that means nothing, or part of a name
                if name in expected:
                    np.testing.assert_array_equal(array, expected[name])
