"""Starts several ranks on this machine, for tests."""

import json
import os
import socket
from contextlib import ExitStack
from pathlib import Path

TIMEOUT = 200.0  # seconds, for a busy machine


def rank_environments(folder: Path, size: int) -> list[dict[str, str]]:
    """Returns the environment that mlx.launch sets for each rank of a ring on loopback."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(size)]
        ports = [server.getsockname()[1] for server in servers]
    (folder / "ring.json").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    ring = {"MLX_HOSTFILE": str(folder / "ring.json"), "ANARCHOBOT_RANKS_SECRET": "a secret of these ranks"}
    return [{**os.environ, **ring, "MLX_RANK": str(rank)} for rank in range(size)]
