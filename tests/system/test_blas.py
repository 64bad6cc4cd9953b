"""Which BLAS is loaded, and that MLX calls it."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from anarchobot.system import blas

linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS uses Accelerate")


@linux
def test_mlx_calls_the_loaded_library() -> None:
    """Asks the dynamic linker (dladdr) which library defines cblas_sgemm."""
    if blas.load_fast_blas() is None:
        assert "no fast BLAS" in str(blas.blas_warning())
        return
    code = """
from anarchobot.system.blas import load_fast_blas
name = load_fast_blas()
import ctypes, mlx.core as mx
class Info(ctypes.Structure):  # dladdr's Dl_info
    _fields_ = [("file", ctypes.c_char_p), *((name, ctypes.c_void_p) for name in ("base", "name", "at"))]
info, process = Info(), ctypes.CDLL(None)
process.dladdr(ctypes.cast(process.cblas_sgemm, ctypes.c_void_p), ctypes.byref(info))
print(name, info.file.decode().lower(), float((mx.ones((300, 300)) @ mx.ones((300, 300))).sum()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, file, product = done.stdout.split()
    assert name.lower() in file
    assert float(product) == 300.0**3


@linux
def test_message_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_candidates", lambda: {"OpenBLAS": ["libnowhere.so.9"], "MKL": []})
    monkeypatch.setattr(blas, "load_fast_blas", blas.load_fast_blas.__wrapped__)
    warning = blas.blas_warning()
    assert warning is not None and "libopenblas0-pthread" in warning and "\n" not in warning


@linux
@pytest.mark.parametrize(
    "core, mkl, expected, warns",
    [
        (b"SkylakeX", True, "OpenBLAS", False),
        (b"Prescott", True, "MKL", False),
        (b"Prescott", False, "OpenBLAS", True),
        (None, True, "MKL", False),
        (None, False, None, True),
    ],
)
def test_mkl_replaces_an_openblas_that_does_not_know_the_cpu(
    core: bytes | None, mkl: bool, expected: str | None, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    openblas = SimpleNamespace(_name=None, openblas_get_corename=Function(core))
    libraries = {"OpenBLAS": openblas if core else None, "MKL": SimpleNamespace(_name=None) if mkl else None}
    monkeypatch.setattr(blas, "_usable", lambda name, paths: libraries[name])
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda *arguments: openblas)
    monkeypatch.setattr(blas.Path, "read_text", lambda path: "flags: sse avx avx2 fma")
    monkeypatch.setattr(blas, "load_fast_blas", blas.load_fast_blas.__wrapped__)
    assert blas.load_fast_blas() == expected
    assert (blas.blas_warning() is not None) == warns


class Function:
    def __init__(self, value: bytes | None) -> None:
        self.value = value

    def __call__(self) -> bytes | None:
        return self.value


@linux
def test_a_library_without_the_blas_symbols_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """libm loads but is not a BLAS: accepting it would silently leave the slow one in place."""
    monkeypatch.setattr(blas, "_candidates", lambda: {"OpenBLAS": ["libm.so.6"], "MKL": []})
    assert blas.load_fast_blas.__wrapped__() is None


def test_macos_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas.sys, "platform", "darwin")
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda *a: pytest.fail("loaded a library on macOS"))
    assert blas.load_fast_blas.__wrapped__() == "Accelerate"


def test_the_library_is_limited_to_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training runs micro-batches on threads of its own."""
    for name, function in (("OpenBLAS", "openblas_set_num_threads"), ("MKL", "MKL_Set_Num_Threads")):
        threads: list[int] = []
        library = SimpleNamespace(**{"cblas_sgemm": None, function: threads.append})
        monkeypatch.setattr(blas.ctypes, "CDLL", lambda path, library=library: library)
        assert blas._usable(name, ["lib.so"]) is library and threads == [1]
