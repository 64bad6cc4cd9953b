"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux wheel brings the reference BLAS: 5 to 9 GFLOP/s for a float32 product where OpenBLAS and MKL reach 115 to
140 on one core. A library that is loaded first, with its symbols global, is the one MLX then uses. It gets one thread:
with two, a training step under MLX was six times slower.

`python -m anarchobot.system.blas` says what is found; its exit code is 1 when one is missing.
"""

import ctypes
import glob
import platform
import sys
from functools import cache

_SET_THREADS = {"OpenBLAS": "openblas_set_num_threads", "MKL": "MKL_Set_Num_Threads"}


@cache
def load_fast_blas() -> str | None:
    """Loads OpenBLAS, else MKL, before MLX is imported; its name, or None when there is none.

    Does nothing but on Linux: macOS has Accelerate. A second call, or one after MLX, changes nothing.
    """
    if sys.platform != "linux":
        return "Accelerate"
    for name, paths in _candidates().items():
        for path in paths:
            try:
                library = ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
                library.cblas_sgemm  # noqa: B018  (64-bit-integer builds name it otherwise, and are of no use)
                getattr(library, _SET_THREADS[name])(1)
            except (OSError, AttributeError):
                continue
            return name
    return None


def advice() -> str:
    """What to install, in one line."""
    mkl = ", or: pip install mkl" if platform.machine() == "x86_64" else ""
    return (
        "no fast BLAS found, so matrix products on this CPU are about 15 times slower than they could be: "
        f"sudo apt install libopenblas0-pthread{mkl}"
    )


def _candidates() -> dict[str, list[str]]:
    # MKL's wheel puts its libraries, and the OpenMP one that it needs, into the environment's lib folder.
    return {
        "OpenBLAS": ["libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so"],
        "MKL": [*sorted(glob.glob(f"{glob.escape(sys.prefix)}/lib/libmkl_rt.so*"), reverse=True), "libmkl_rt.so"],
    }


if __name__ == "__main__":
    found = load_fast_blas()
    print(found or advice())
    raise SystemExit(found is None)
