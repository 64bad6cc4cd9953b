"""Runs the HTTP server from binding its socket to graceful shutdown."""

import asyncio
import logging
import math
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.model import Model
from anarchobot.inference.speculative import Draft
from anarchobot.serving.app import Limits, Service
from anarchobot.serving.auth import KEY_VARIABLE, allowed_hosts, is_loopback
from anarchobot.serving.connections import Connection, ConnectionLimits, Connections, allow_open_files
from anarchobot.serving.embeddings import Embedder
from anarchobot.serving.passages import PassageSearch
from anarchobot.serving.request_log import RequestLogMiddleware
from anarchobot.serving.worker import Worker

MAX_OTHER_FILES = 100  # open files that are not connections
GRACE_SECONDS = 5.0  # time for active requests to finish after Ctrl-C


@dataclass(frozen=True)
class ServerOptions:
    """`queue_size`: requests that may wait for the batch; `hosts` and `origins`: see auth.HostMiddleware;
    `prefix_bytes`: see KeptPrefixes."""

    name: str
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = field(default=None, repr=False)
    hosts: frozenset[str] = allowed_hosts("127.0.0.1")
    origins: frozenset[str] = frozenset()
    queue_size: int = 64
    prefix_bytes: int = 2**30
    limits: Limits = field(default_factory=Limits)
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    log_prompts: bool = False


def bind(options: ServerOptions) -> socket.socket:
    """The bound socket. Raises UserError if the address is unavailable, or public without an API key."""
    host, port = options.host, options.port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: not an address of this machine; expected one such as 127.0.0.1") from error
    if options.api_key is None and not is_loopback(str(address[0])):
        raise UserError(
            f"--host {host}: an API key is required to serve other machines; set --api-key-file or {KEY_VARIABLE}, "
            "or use 127.0.0.1"
        )
    try:
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from error


def serve(
    model: Model,
    defaults: GenerationConfig,
    options: ServerOptions,
    bound: socket.socket,
    on_start: Callable[[str], None],
    knowledge_base: PassageSearch | None = None,
    embedder: Embedder | None = None,
    draft: Draft | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM, which it then re-raises. `on_start` is called with the URL.

    Raises UserError if the chat template cannot be used.
    """
    allow_open_files(options.connections.total + MAX_OTHER_FILES)
    with Worker(model, options.queue_size, prefix_bytes=options.prefix_bytes, draft=draft) as worker:
        server = HttpServer(
            make_app(model, defaults, options, worker, knowledge_base, embedder), worker, options.connections
        )
        on_start(url(bound))
        server.run([bound])


def make_app(
    model: Model,
    defaults: GenerationConfig,
    options: ServerOptions,
    worker: Worker,
    knowledge_base: PassageSearch | None = None,
    embedder: Embedder | None = None,
) -> ASGIApp:
    service = Service(model, worker, options.name, defaults, options.limits, knowledge_base, embedder)
    for warning in service.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    return RequestLogMiddleware(
        service.app(options.hosts, options.origins, options.api_key), log_prompts=options.log_prompts
    )


def url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


class HttpServer(uvicorn.Server):
    """A uvicorn server that sends an error to requests still active after GRACE_SECONDS instead of cutting them off."""

    def __init__(self, app: ASGIApp, worker: Worker, limits: ConnectionLimits) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Connection, Connections(limits)),  # type: ignore[arg-type]  # any callable will do
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                headers=[("X-Content-Type-Options", "nosniff")],
                proxy_headers=False,
                timeout_keep_alive=math.ceil(limits.idle_seconds),
                timeout_graceful_shutdown=int(GRACE_SECONDS) + 30,  # time to deliver those errors
            )
        )
        self._worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # a second Ctrl-C cancels active requests; that is not an error to log
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._worker.abort_all)
        await super().shutdown(sockets)
