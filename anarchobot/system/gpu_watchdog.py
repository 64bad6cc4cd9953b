"""macOS's GPU watchdog: it stops work on the GPU that delays the display, and MLX reports a failed command buffer.

MLX issue 3267 has reports and workarounds. A variable relaxes the watchdog; it must be set before the GPU is first used
(llama.cpp also sets it). It was not enough on every machine; work in smaller pieces, or a display that is asleep, was.
"""

import os
import re
import sys

from anarchobot.config.errors import UserError

VARIABLE = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
SMALLER_BUFFERS = "MLX_MAX_OPS_PER_BUFFER=10 MLX_MAX_MB_PER_BUFFER=10"  # MLX's defaults are 40 or 50
# The last two end other work after such a stop.
_MESSAGE = re.compile(
    r"Impacting ?Interactivity|GPU Timeout Error|CallbackErrorTimeout|InnocentVictim|SubmissionsIgnored"
)


class GPUTimeoutError(UserError):
    """macOS stopped a command buffer. A smaller micro-batch can avoid it, because its kernels are shorter."""

    exit_code = 1


def relax_watchdog() -> None:
    """Sets the variable, unless the user has, for this process and its children."""
    if sys.platform == "darwin":
        os.environ.setdefault(VARIABLE, "1")


def as_gpu_timeout(error: Exception) -> GPUTimeoutError | None:
    """The error for the user if it is one of the watchdog's, otherwise None."""
    if not _MESSAGE.search(str(error)):
        return None
    variable = "" if os.environ.get(VARIABLE) == "1" else f"set {VARIABLE}=1, "
    return GPUTimeoutError(
        f"macOS stopped the GPU's work because it delayed the display ({error}): {variable}let the display sleep, or "
        f"set {SMALLER_BUFFERS}"
    )
