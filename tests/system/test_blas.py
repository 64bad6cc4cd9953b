"""Which BLAS is loaded, and that MLX calls it."""

import ctypes
import subprocess
import sys

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
def test_the_faster_of_two_libraries_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name in turn is measured to be the faster one."""
    path = next((path for paths in blas._candidates().values() for path in paths if can_load(path)), None)
    if path is None:
        pytest.skip("there is no fast BLAS")
    monkeypatch.setattr(blas, "_candidates", lambda: {"OpenBLAS": [path], "MKL": [path]})
    monkeypatch.setattr(blas, "_usable", lambda name, paths: [Library(path, name)])
    for fastest in ("OpenBLAS", "MKL"):
        monkeypatch.setattr(blas, "_speed", lambda library, name=fastest: float(library.name == name))
        assert blas.load_fast_blas.__wrapped__() == fastest


@linux
def test_an_openblas_that_does_not_know_the_cpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "load_fast_blas", lambda: "OpenBLAS")
    monkeypatch.setattr(blas, "_has_avx2", lambda: True)
    for core, expected in (("Prescott", True), ("SkylakeX", False), ("Zen", False)):
        monkeypatch.setattr(blas, "_openblas_core", lambda core=core: core)
        assert (blas.blas_warning() is not None) == expected


@linux
def test_speed_is_that_of_the_librarys_product() -> None:
    for name, paths in blas._candidates().items():
        for library in blas._usable(name, paths):
            assert 1 < blas._speed(library) < 1e6


class Library:
    def __init__(self, path: str, name: str) -> None:
        self._name, self.name = path, name


def can_load(path: str) -> bool:
    try:
        ctypes.CDLL(path)
    except OSError:
        return False
    return True


@linux
def test_a_library_without_the_blas_symbols_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """libm loads but is not a BLAS: accepting it would silently leave the slow one in place."""
    monkeypatch.setattr(blas, "_candidates", lambda: {"OpenBLAS": ["libm.so.6"], "MKL": []})
    assert blas.load_fast_blas.__wrapped__() is None


def test_macos_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas.sys, "platform", "darwin")
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda *a: pytest.fail("loaded a library on macOS"))
    assert blas.load_fast_blas.__wrapped__() == "Accelerate"
