"""Starts several ranks of one run: here as child processes, on other machines with mlx.launch.

The parent imports no MLX. It forwards signals, reports which rank died and how, and stops the others, which also notice
by themselves (training/heartbeat.py).
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path

from anarchobot.config.errors import REPORTS_ENV, UserError
from anarchobot.training.rendezvous import SECRET_ENV
from anarchobot.training.signals import PARENT_ENV, forward_signals, print_status

TASKS = ("pretrain", "sft", "dpo")
LOCALHOST = "127.0.0.1"
# Seconds after a rank's end: SIGTERM, for ranks still connecting, which have no heartbeat; after a death, SIGKILL.
TERM_AFTER, KILL_AFTER = 10.0, 50.0
_ENDED = re.compile(r"Node with rank (\d+) (?:exited with code (-?\d+)|was killed)")


def launch_local(words: Sequence[str], ranks: int) -> int:
    """Runs `anarchobot WORDS` as several ranks on this machine, connected by MLX's ring. Returns the exit code: 130 if
    they were stopped, 1 if one died."""
    command = _command(words)
    with tempfile.TemporaryDirectory(prefix="anarchobot-ring-") as folder:
        hostfile = Path(folder) / "ring.json"
        hostfile.write_text(json.dumps([[f"{LOCALHOST}:{port}"] for port in free_ports(ranks)]))
        secret = os.environ.get(SECRET_ENV) or secrets.token_hex(32)
        env = {**os.environ, PARENT_ENV: str(os.getpid()), "MLX_HOSTFILE": str(hostfile), SECRET_ENV: secret}
        env[REPORTS_ENV] = folder
        # Each has a separate session, so that a Ctrl-C reaches it only once, through this process.
        children = [
            subprocess.Popen(command, env={**env, "MLX_RANK": str(rank)}, start_new_session=True)
            for rank in range(ranks)
        ]
        try:
            with forward_signals(children):
                return _wait_for_all(children)
        finally:
            for child in children:
                child.kill()
                child.wait()


def launch_with_mlx(words: Sequence[str], options: Sequence[str]) -> int:
    """Runs `anarchobot WORDS` with `mlx.launch OPTIONS`, in the same folder and with the same Python on each machine.
    Returns the first nonzero exit code of a rank; mlx.launch stops the others, but always exits with 0."""
    for flag, file in pairwise(options):
        if flag == "--hostfile" and not Path(file).is_file():
            raise UserError(f"--hostfile {file}: no such file: create one with mlx.distributed_config")
        if (flag, file) == ("--backend", "mpi") and shutil.which("mpirun") is None:
            raise UserError("--backend mpi: mpirun was not found: install Open MPI, or use --backend ring")
    launcher = Path(sys.executable).with_name("mlx.launch")
    command = [sys.executable, "-P", str(launcher), *options, "--", *_command(words)]
    code, reported = 0, set[str]()
    # mlx.launch spins on stdin once that is closed, so it gets a pipe that stays open.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as child:
        assert child.stderr is not None
        with forward_signals([child]):
            for line in iter(child.stderr.readline, b""):
                text = line.decode(errors="replace")
                if (found := _ENDED.search(text)) and code == 0:
                    code = int(found[2] or 1)
                if text.startswith("anarchobot: "):
                    if text in reported:
                        continue  # by another rank
                    reported.add(text)
                with suppress(OSError):
                    sys.stderr.write(text)
                    sys.stderr.flush()
        return child.wait() or (code if code >= 0 else 1)


def _command(words: Sequence[str]) -> list[str]:
    if not words or words[0] not in TASKS:
        raise UserError(f"launch: expected a command after --: one of {', '.join(TASKS)}, with CONFIG and settings")
    return [sys.executable, "-P", "-m", "anarchobot", *words]  # -P: don't import from the current folder


def _wait_for_all(children: Sequence["subprocess.Popen[bytes]"]) -> int:
    code, died_at, ended_at, terminated = 0, 0.0, 0.0, False
    running = dict(enumerate(children))
    while running:
        for rank, child in list(running.items()):
            if (returncode := child.poll()) is None:
                continue
            del running[rank]
            ended_at = ended_at or time.monotonic()
            if returncode not in (0, 130) and died_at == 0:
                died_at = time.monotonic()
                if returncode < 0:
                    print_status(f"rank {rank} was killed by {signal.Signals(-returncode).name}: stopping the others")
            if returncode != 0 and code == 0:
                code = returncode if returncode > 0 else 1
        since_death = time.monotonic() - died_at if died_at else 0.0
        if since_death > KILL_AFTER:
            return code
        # A rank that is still connecting ignores Ctrl-C; one that trains or saves treats SIGTERM as a first Ctrl-C.
        since_end = time.monotonic() - ended_at if ended_at and code else 0.0
        if max(since_death, since_end) > TERM_AFTER and not terminated:
            terminated = True
            for child in running.values():
                child.terminate()
        time.sleep(0.1)
    return code


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server((LOCALHOST, 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]
