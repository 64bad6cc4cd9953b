"""Who may ask. A page of another site, opened in a browser on this machine, can reach a server on loopback too: by its
own name turned to 127.0.0.1 (DNS rebinding: a foreign Host), or across sites (a foreign Origin). Both are refused."""

import hashlib
import hmac
import os
import re
from collections.abc import Collection
from ipaddress import ip_address
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from anarchobot.config.errors import UserError
from anarchobot.serving.refusals import ApiError

KEY_VARIABLE = "ANARCHOBOT_API_KEY"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.ASCII)
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.ASCII)


class HostGate:
    """Answers for its own names alone, and only pages of its own or of `origins`."""

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        self._app, self._hosts, self._origins = app, hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        refusal = None
        if host_name(host) not in self._hosts:
            told = "this server has no such name: start it with --allow-host NAME to let it answer to another"
            refusal = ApiError(403, f"Host: {told}", code="host_not_allowed")
        elif any(origin not in (f"http://{host}", *self._origins) for origin in origins):
            told = "pages of other sites may not ask this server: start it with --allow-origin ORIGIN to let one"
            refusal = ApiError(403, f"Origin: {told}", code="origin_not_allowed")
        await (self._app if refusal is None else refusal.response())(scope, receive, send)


class KeyGate:
    """Lets nobody to /v1/ without the key. The page is for everybody: it asks for the key."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._digest = app, None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = self._digest is None or scope["path"] in ("/", "/health")
        if is_open or self._knows(Headers(scope=scope).getlist("authorization")):
            return await self._app(scope, receive, send)
        told = "expected the server's API key, as in Authorization: Bearer KEY"
        refusal = ApiError(401, told, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await refusal.response()(scope, receive, send)

    def _knows(self, given: list[str]) -> bool:
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        # Of digests, so that the time says nothing of the key, not even its length.
        right = hmac.compare_digest(_digest(key.strip().encode("latin-1")), self._digest or b"")
        return right and scheme.lower() == "bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def host_name(host: str) -> str | None:
    """The name in a Host header, in small letters, without its port; None when it is none."""
    found = _HOST.fullmatch(host.lower())
    return found[1].removesuffix(".") if found else None


def allowed_hosts(bound: str, named: Collection[str] = ()) -> frozenset[str]:
    """The names that are answered to. Raises UserError for one of `named` (--allow-host) that is no name."""
    for name in named:
        found = _HOST.fullmatch(name.lower())
        if not found or found[0] != found[1]:
            raise UserError(
                f"--allow-host '{name}': expected a name or an address without a port, such as my-mac.local"
            )
    own = f"[{bound}]" if ":" in bound else bound.lower()
    return frozenset({*LOOPBACK_NAMES, own, *(name.lower() for name in named)})


def allowed_origins(named: Collection[str]) -> frozenset[str]:
    """Raises UserError for one of `named` (--allow-origin) that is no origin."""
    for name in named:
        if not _ORIGIN.fullmatch(name.lower()):
            raise UserError(f"--allow-origin '{name}': expected scheme, name and port, such as http://localhost:3000")
    return frozenset(name.lower() for name in named)


def read_key(file: Path | None) -> str | None:
    """The key in `file`, or in the environment; None: there is none. Raises UserError for one that can't be sent."""
    if file is not None:
        where, raw = str(file), file.read_bytes().decode("utf-8", "replace")
    elif KEY_VARIABLE in os.environ:
        where, raw = f"the environment's {KEY_VARIABLE}", os.environ[KEY_VARIABLE]
    else:
        return None
    key = raw.strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError(f"{where}: no API key: expected one word of plain letters, digits and signs")
    return key


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach it; `address` is numeric."""
    return ip_address(address.partition("%")[0]).is_loopback
