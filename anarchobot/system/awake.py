"""A Mac does not sleep while a run goes on."""

import os
import shutil
import subprocess
import sys


def stay_awake() -> str | None:
    """Starts macOS' own `caffeinate`, which ends with this process; a line that says so, or None elsewhere."""
    program = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if program is None:
        return None
    subprocess.Popen([program, "-i", "-w", str(os.getpid())], stdin=subprocess.DEVNULL, start_new_session=True)
    return "this Mac will not go to sleep before the run ends (caffeinate; a closed lid still puts it to sleep)"
