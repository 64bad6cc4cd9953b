"""Access control: allowed hosts, allowed origins, and the API key.

A website opened in a browser on this machine can reach a loopback server: through one of its own host names that
resolves to 127.0.0.1 (DNS rebinding: a foreign Host header), or cross-site (a foreign Origin). Both are rejected.
"""

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
from anarchobot.serving.errors import ApiError

KEY_VARIABLE = "ANARCHOBOT_API_KEY"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.ASCII)
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.ASCII)


class HostMiddleware:
    """Accepts only the Host names in `hosts`, and only pages of this server or of `origins`."""

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        self._app, self._hosts, self._origins = app, hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        error = None
        if parse_host(host) not in self._hosts:
            message = "Host: name not allowed; to allow it, start the server with --allow-host NAME"
            error = ApiError(403, message, code="host_not_allowed")
        elif any(origin not in (f"http://{host}", *self._origins) for origin in origins):
            message = "Origin: not allowed; to allow it, start the server with --allow-origin ORIGIN"
            error = ApiError(403, message, code="origin_not_allowed")
        await (self._app if error is None else error.response())(scope, receive, send)


class ApiKeyMiddleware:
    """Requires the API key, except for `public` paths."""

    def __init__(self, app: ASGIApp, api_key: str | None, public: Collection[str]) -> None:
        self._app, self._public = app, public
        self._digest = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_public = self._digest is None or scope["path"] in self._public
        if is_public or self._is_authorized(Headers(scope=scope)):
            return await self._app(scope, receive, send)
        message = "missing or invalid API key; expected the header Authorization: Bearer KEY"
        error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await error.response()(scope, receive, send)

    def _is_authorized(self, headers: Headers) -> bool:
        """By the header of OpenAI's clients, or that of Anthropic's."""
        given, anthropic = headers.getlist("authorization"), headers.getlist("x-api-key")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        bearer = key.strip() if scheme.lower() == "bearer" else ""
        keys = [bearer, anthropic[0] if len(anthropic) == 1 else ""]
        # Compares digests, so that timing reveals nothing about the key, not even its length.
        matches = [hmac.compare_digest(_digest(key.encode("latin-1")), self._digest or b"") for key in keys]
        return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def parse_host(host: str) -> str | None:
    """The lower-case name in a Host header, without its port; None if invalid."""
    match = _HOST.fullmatch(host.lower())
    return match[1].removesuffix(".") if match else None


def allowed_hosts(bound: str, names: Collection[str] = ()) -> frozenset[str]:
    """The accepted Host names. Raises UserError if one of `names` (--allow-host) is not a host name."""
    for name in names:
        match = _HOST.fullmatch(name.lower())
        if not match or match[0] != match[1]:
            raise UserError(
                f"--allow-host '{name}': expected a host name or address without a port, such as my-mac.local"
            )
    bound_name = f"[{bound}]" if ":" in bound else bound.lower()
    return frozenset({*LOOPBACK_NAMES, bound_name, *(name.lower() for name in names)})


def allowed_origins(names: Collection[str]) -> frozenset[str]:
    """Raises UserError if one of `names` (--allow-origin) is not an origin."""
    for name in names:
        if not _ORIGIN.fullmatch(name.lower()):
            raise UserError(f"--allow-origin '{name}': expected scheme, host and port, such as http://localhost:3000")
    return frozenset(name.lower() for name in names)


def read_api_key(file: Path | None) -> str | None:
    """The API key from `file` or the environment, or None. Raises UserError if it is not a valid header value."""
    if file is not None:
        where, raw = str(file), file.read_bytes().decode("utf-8", "replace")
    elif KEY_VARIABLE in os.environ:
        where, raw = KEY_VARIABLE, os.environ[KEY_VARIABLE]
    else:
        return None
    key = raw.strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError(f"{where}: not a valid API key; expected printable ASCII characters without spaces")
    return key


def is_loopback(address: str) -> bool:
    """Whether a numeric address is reachable from this machine only."""
    return ip_address(address.partition("%")[0]).is_loopback
