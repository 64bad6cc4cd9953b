"""Whether something fits on a disk, before it is written."""

import errno
import shutil
import sys
from pathlib import Path

RESERVE = 2**20  # bytes, for folders and small files beside the large ones


def require_space(folder: Path, size: int) -> None:
    """Raises OSError (ENOSPC) with both numbers if `size` bytes do not fit beside what is in `folder`, which may not
    exist yet.

    Not on macOS: its disks have purgeable space that is not counted as free but is freed by a write.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    usage = shutil.disk_usage(existing)
    if sys.platform == "darwin" or usage.total == 0:  # 0: a file system that does not say
        return
    if usage.free < size + RESERVE:
        message = f"{(size + RESERVE) / 1e6:,.1f} MB needed, but {usage.free / 1e6:,.1f} MB free: free some space"
        raise OSError(errno.ENOSPC, message, str(folder))
