"""Loads a fast BLAS for MLX's CPU backend on Linux.

MLX's Linux wheel ships the reference BLAS, which reaches 5 to 9 GFLOP/s in a float32 product; OpenBLAS and MKL reach
115 to 140 on one core. MLX uses whichever BLAS was loaded first with global symbols. The library is limited to one
thread: with two, an MLX training step was six times slower.

`python -m anarchobot.system.blas` prints which BLAS is used and exits with 1 if it is not a fast one.
"""

import ctypes
import glob
import platform
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SIZE = 256  # of the products that compare two libraries: a millisecond
OLD_CORES = ("Prescott", "Core2", "Nehalem")  # OpenBLAS takes CPUs that it does not know for these
_SET_THREADS = {"OpenBLAS": "openblas_set_num_threads", "MKL": "MKL_Set_Num_Threads"}


@cache
def load_fast_blas() -> str | None:
    """Loads OpenBLAS or MKL, the faster one if both exist, and returns its name; None if neither exists. Call it before
    importing MLX.

    macOS uses Accelerate, so nothing is loaded there.
    """
    if sys.platform != "linux":
        return "Accelerate"
    found = {name: usable[0] for name, paths in _candidates().items() if (usable := [*_usable(name, paths)])}
    if not found:
        return None
    name = max(found, key=lambda name: _speed(found[name])) if len(found) > 1 else next(iter(found))
    ctypes.CDLL(found[name]._name, ctypes.RTLD_GLOBAL)
    return name


def blas_warning() -> str | None:
    """The problem and the command that fixes it, separated by ": ", if there is no fast BLAS."""
    name = load_fast_blas()
    mkl = "pip install mkl" if platform.machine() == "x86_64" else ""
    if name is None:
        return (
            "no fast BLAS found, matrix products on this CPU will be about 15 times slower: "
            f"sudo apt install libopenblas0-pthread{mkl and ', or: ' + mkl}"
        )
    if name == "OpenBLAS" and (core := _openblas_core()) in OLD_CORES and _has_avx2():
        return f"this OpenBLAS does not know this CPU and uses code for {core}, which is several times slower: {mkl}"
    return None


def _usable(name: str, paths: list[str]) -> Iterator[ctypes.CDLL]:
    """Yields the libraries that can be loaded, limited to one thread. Their symbols are not global yet."""
    for path in paths:
        try:
            library = ctypes.CDLL(path)
            library.cblas_sgemm  # noqa: B018  (builds with 64-bit integers use another symbol name: unusable here)
            getattr(library, _SET_THREADS[name])(1)
        except (OSError, AttributeError):
            continue
        yield library


def _speed(library: ctypes.CDLL) -> float:
    """Products of [SIZE, SIZE] per second: the best of a few, after one that initializes the library."""
    a, c = ((ctypes.c_float * SIZE**2)() for _ in range(2))
    one, n = ctypes.c_float(1.0), ctypes.c_int(SIZE)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        # Row-major order, nothing transposed: c = a a.
        library.cblas_sgemm(101, 111, 111, n, n, n, one, a, n, a, n, ctypes.c_float(0.0), c, n)
        seconds.append(time.perf_counter() - began)
    return 1 / min(seconds[1:])


def _openblas_core() -> str:
    """The CPU for which OpenBLAS has chosen its code."""
    get = ctypes.CDLL(None).openblas_get_corename
    get.restype = ctypes.c_char_p
    return str(get().decode())


def _has_avx2() -> bool:
    return " avx2 " in Path("/proc/cpuinfo").read_text()


def _candidates() -> dict[str, list[str]]:
    # MKL's wheel installs its libraries, including the OpenMP runtime, into the virtual environment's lib folder.
    return {
        "OpenBLAS": ["libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so"],
        "MKL": [*sorted(glob.glob(f"{glob.escape(sys.prefix)}/lib/libmkl_rt.so*"), reverse=True), "libmkl_rt.so"],
    }


if __name__ == "__main__":
    warning = blas_warning()
    print(warning or load_fast_blas())
    raise SystemExit(warning is not None)
