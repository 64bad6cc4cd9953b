"""The server from its start to its end."""

import asyncio
import logging
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.model import Model
from anarchobot.serving.app import Limits, Service
from anarchobot.serving.gate import KEY_VARIABLE, allowed_hosts, is_loopback
from anarchobot.serving.prompts import Prompts
from anarchobot.serving.worker import Worker

CONNECTIONS = 1000
GRACE = 5.0  # seconds: what is under way at Ctrl-C may go on for so long


@dataclass(frozen=True)
class Options:
    """`waiting`: requests beyond those being answered; `hosts` and `origins`: who may ask, as gate has them."""

    name: str
    host: str = "127.0.0.1"
    port: int = 8080
    key: str | None = field(default=None, repr=False)
    hosts: frozenset[str] = allowed_hosts("127.0.0.1")
    origins: frozenset[str] = frozenset()
    waiting: int = 64
    limits: Limits = field(default_factory=Limits)


def listen(options: Options) -> socket.socket:
    """The bound socket. Raises UserError when the address can't be had, and for one that other machines reach while
    there is no key."""
    host, port = options.host, options.port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: no address of this machine's: expected one, such as 127.0.0.1") from error
    if options.key is None and not is_loopback(str(address[0])):
        raise UserError(
            f"--host {host}: other machines could use the server, and it has no key: put one into a file "
            f"(--api-key-file) or into the environment's {KEY_VARIABLE}, or stay on 127.0.0.1"
        )
    try:
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        told = error.strerror or str(error)
        raise UserError(f"{host}, port {port}: can't be served on: {told}: take another --port") from error


def serve(
    model: Model, trained: GenerationConfig, options: Options, bound: socket.socket, on_start: Callable[[str], None]
) -> None:
    """Serves until it is stopped by SIGINT or SIGTERM, which it then passes on; `on_start` gets the address.

    Raises UserError when the chat template can't be used.
    """
    with Worker(model, options.waiting) as worker:
        server = HttpServer(make_app(model, trained, options, worker), worker)
        on_start(url(bound))
        server.run([bound])


def make_app(model: Model, trained: GenerationConfig, options: Options, worker: Worker) -> ASGIApp:
    prompts = Prompts(model)
    for warning in prompts.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    service = Service(worker, prompts, options.name, model.shape.max_seq_len, trained, options.limits)
    return service.app(options.hosts, options.origins, options.key)


def url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


class HttpServer(uvicorn.Server):
    """uvicorn, that tells those who still wait after GRACE that it is over, instead of cutting them off."""

    def __init__(self, app: ASGIApp, worker: Worker) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_level="error",
                access_log=False,
                server_header=False,
                headers=[("X-Content-Type-Options", "nosniff")],
                proxy_headers=False,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=int(GRACE) + 30,  # for those who are told to hear of it
            )
        )
        self._worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # a second Ctrl-C cuts off what is under way, which is no fault to tell of
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(GRACE, self._worker.abandon)
        await super().shutdown(sockets)
