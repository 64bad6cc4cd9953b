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
from functools import cache
from pathlib import Path

OLD_CORES = ("Prescott", "Core2", "Nehalem")  # OpenBLAS takes CPUs that it does not know for these
_SET_THREADS = {"OpenBLAS": "openblas_set_num_threads", "MKL": "MKL_Set_Num_Threads"}


@cache
def load_fast_blas() -> str | None:
    """Loads OpenBLAS or MKL, and returns its name; None if neither exists. Call it before importing MLX.

    MKL is used if there is no OpenBLAS or if OpenBLAS does not know this CPU. Nothing is measured: a resumed run must
    use the same library. macOS uses Accelerate, so nothing is loaded there.
    """
    if sys.platform != "linux":
        return "Accelerate"
    paths = _candidates()
    usable = {"OpenBLAS": _usable("OpenBLAS", paths["OpenBLAS"])}
    if usable["OpenBLAS"] is None or _is_slow(usable["OpenBLAS"]):
        usable = {"MKL": _usable("MKL", paths["MKL"]), **usable}
    for name, library in usable.items():
        if library is not None:
            ctypes.CDLL(library._name, ctypes.RTLD_GLOBAL)
            return name
    return None


def blas_warning() -> str | None:
    """The problem and the command that fixes it, separated by ": ", if there is no fast BLAS."""
    name = load_fast_blas()
    mkl = "pip install mkl" if platform.machine() == "x86_64" else ""
    if name is None:
        return (
            "no fast BLAS found, matrix products on this CPU will be about 15 times slower: "
            f"sudo apt install libopenblas0-pthread{mkl and ', or: ' + mkl}"
        )
    if name == "OpenBLAS" and _is_slow(ctypes.CDLL(None)):
        return f"this OpenBLAS does not know this CPU and takes it for an old one, several times slower: {mkl}"
    return None


def _usable(name: str, paths: list[str]) -> ctypes.CDLL | None:
    """The first library that can be loaded, limited to one thread. Its symbols are not global yet."""
    for path in paths:
        try:
            library = ctypes.CDLL(path)
            library.cblas_sgemm  # noqa: B018  (builds with 64-bit integers use another symbol name: unusable here)
            getattr(library, _SET_THREADS[name])(1)
        except (OSError, AttributeError):
            continue
        return library
    return None


def _is_slow(openblas: ctypes.CDLL) -> bool:
    """Whether this OpenBLAS uses code for a CPU without AVX2 although this one has it."""
    get = openblas.openblas_get_corename
    get.restype = ctypes.c_char_p
    return get().decode() in OLD_CORES and " avx2 " in Path("/proc/cpuinfo").read_text()


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
