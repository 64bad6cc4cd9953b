"""Loads a fast BLAS for MLX's CPU backend on Linux.

MLX's Linux wheel ships the reference BLAS, which reaches 5 to 9 GFLOP/s in a float32 product; OpenBLAS and MKL reach
115 to 140 on one core. MLX uses whichever BLAS was loaded first with global symbols. The library is limited to one
thread: with two, an MLX training step was six times slower.

`python -m anarchobot.system.blas` prints which BLAS was found and exits with 1 if there is none.
"""

import ctypes
import glob
import platform
import sys
from functools import cache

_SET_THREADS = {"OpenBLAS": "openblas_set_num_threads", "MKL": "MKL_Set_Num_Threads"}


@cache
def load_fast_blas() -> str | None:
    """Loads OpenBLAS or, failing that, MKL, and returns its name; None if neither exists. Call it before importing MLX.

    macOS uses Accelerate, so nothing is loaded there.
    """
    if sys.platform != "linux":
        return "Accelerate"
    for name, paths in _candidates().items():
        for path in paths:
            try:
                library = ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
                library.cblas_sgemm  # noqa: B018  (builds with 64-bit integers use another symbol name: unusable here)
                getattr(library, _SET_THREADS[name])(1)
            except (OSError, AttributeError):
                continue
            return name
    return None


def no_blas_message() -> str:
    """The problem and the command that fixes it, separated by ": "."""
    mkl = ", or: pip install mkl" if platform.machine() == "x86_64" else ""
    return (
        "no fast BLAS found, matrix products on this CPU will be about 15 times slower: "
        f"sudo apt install libopenblas0-pthread{mkl}"
    )


def _candidates() -> dict[str, list[str]]:
    # MKL's wheel installs its libraries, including the OpenMP runtime, into the virtual environment's lib folder.
    return {
        "OpenBLAS": ["libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so"],
        "MKL": [*sorted(glob.glob(f"{glob.escape(sys.prefix)}/lib/libmkl_rt.so*"), reverse=True), "libmkl_rt.so"],
    }


if __name__ == "__main__":
    found = load_fast_blas()
    print(found or no_blas_message())
    raise SystemExit(found is None)
