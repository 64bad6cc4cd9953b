"""Which BLAS is found, and that it is the one MLX then calls."""

import subprocess
import sys

import pytest

from anarchobot.system import blas

linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate and loads nothing")


@linux
def test_a_library_that_is_found_is_the_one_that_mlx_calls() -> None:
    """The dynamic linker says so itself: the address behind cblas_sgemm lies in the library that was loaded."""
    if blas.load_fast_blas() is None:
        assert "no fast BLAS" in blas.advice()
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
def test_without_one_the_advice_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_candidates", lambda: {"OpenBLAS": ["libnowhere.so.9"], "MKL": []})
    assert blas.load_fast_blas.__wrapped__() is None
    assert "libopenblas0-pthread" in blas.advice()
    assert "\n" not in blas.advice()


@linux
def test_a_library_that_lacks_the_plain_names_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """libm is a library, but no BLAS: taking it would leave the slow one in place, unannounced."""
    monkeypatch.setattr(blas, "_candidates", lambda: {"OpenBLAS": ["libm.so.6"], "MKL": []})
    assert blas.load_fast_blas.__wrapped__() is None


def test_nothing_is_loaded_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas.sys, "platform", "darwin")
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda *a: pytest.fail("loaded a library on macOS"))
    assert blas.load_fast_blas.__wrapped__() == "Accelerate"
