"""Several ranks of one run, started together: here as children of this process, on other machines by mlx.launch.

The parent imports no MLX. It passes signals on, says which rank died and how, and asks the others to end, which they
also find out by themselves (training/heartbeat.py).
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType

from anarchobot.config.errors import UserError
from anarchobot.training.signals import PARENT, can_handle

TASKS = ("pretrain", "sft")
ALONE = "127.0.0.1"
# Seconds after a rank's end: SIGTERM, for those that do not train yet, and have no watch; after its death, SIGKILL.
TERM_AFTER, KILL_AFTER = 10.0, 50.0
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_ENDED = re.compile(r"Node with rank (\d+) (?:exited with code (-?\d+)|was killed)")


def launch_here(words: Sequence[str], ranks: int) -> int:
    """Runs `anarchobot WORDS` as so many ranks on this machine, joined by MLX's ring; returns the exit code: 130 when
    they were stopped, 1 when one died."""
    command = _command(words)
    with tempfile.TemporaryDirectory(prefix="anarchobot-ring-") as folder:
        hostfile = Path(folder) / "ring.json"
        hostfile.write_text(json.dumps([[f"{ALONE}:{port}"] for port in _free_ports(ranks)]))
        env = {**os.environ, PARENT: str(os.getpid()), "MLX_HOSTFILE": str(hostfile)}
        # A session of its own for each, so that a Ctrl-C reaches it once, from here.
        children = [
            subprocess.Popen(command, env={**env, "MLX_RANK": str(rank)}, start_new_session=True)
            for rank in range(ranks)
        ]
        try:
            with forward_signals(children):
                return _until_all_end(children)
        finally:
            for child in children:
                child.kill()
                child.wait()


def launch_by_mlx(words: Sequence[str], options: Sequence[str]) -> int:
    """Runs `anarchobot WORDS` by `mlx.launch OPTIONS`, in the same folder and by the same Python on each machine;
    returns the first exit code of a rank that is not 0. mlx.launch itself ends the others, and always with 0."""
    for flag, file in pairwise(options):
        if flag == "--hostfile" and not Path(file).is_file():
            raise UserError(f"--hostfile {file}: no such file: mlx.distributed_config writes one")
    launcher = Path(sys.executable).with_name("mlx.launch")
    command = [sys.executable, "-P", str(launcher), *options, "--", *_command(words)]
    code = 0
    # It reads its input without pause once that has ended: a pipe that stays open keeps it quiet.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as child:
        assert child.stderr is not None
        with forward_signals([child]):
            for line in iter(child.stderr.readline, b""):
                text = line.decode(errors="replace")
                if (found := _ENDED.search(text)) and code == 0:
                    code = int(found[2] or 1)
                with suppress(OSError):
                    sys.stderr.write(text)
                    sys.stderr.flush()
        return child.wait() or (code if code >= 0 else 1)


def _command(words: Sequence[str]) -> list[str]:
    if not words or words[0] not in TASKS:
        raise UserError(f"launch: expected what to run behind --: {' or '.join(TASKS)}, with its CONFIG and settings")
    return [sys.executable, "-P", "-m", "anarchobot", *words]  # -P: nothing of the folder it stands in


def _until_all_end(children: Sequence["subprocess.Popen[bytes]"]) -> int:
    code, died_at, stopped_at, told = 0, 0.0, 0.0, False
    running = dict(enumerate(children))
    while running:
        for rank, child in list(running.items()):
            if (ended := child.poll()) is None:
                continue
            del running[rank]
            stopped_at = stopped_at or time.monotonic()
            if ended not in (0, 130) and died_at == 0:
                died_at = time.monotonic()
                if ended < 0:
                    _say(f"rank {rank} was ended by {signal.Signals(-ended).name}: the others are stopped")
            if ended != 0 and code == 0:
                code = ended if ended > 0 else 1
        since = time.monotonic() - died_at if died_at else 0.0
        if since > KILL_AFTER:
            return code
        # A rank that still joins the others hears of no Ctrl-C; one that trains or saves takes SIGTERM for another one.
        waited = time.monotonic() - stopped_at if stopped_at and code else 0.0
        if max(since, waited) > TERM_AFTER and not told:
            told = True
            for child in running.values():
                child.terminate()
        time.sleep(0.1)
    return code


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server((ALONE, 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def forward_signals(children: Sequence["subprocess.Popen[bytes]"]) -> ExitStack:
    """A context in which signals go to the children."""
    stack = ExitStack()

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if can_handle(number):
                stack.callback(signal.signal, number, signal.signal(number, forward))
    return stack


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may have gone
        print(f"anarchobot: {text}", file=sys.stderr, flush=True)
