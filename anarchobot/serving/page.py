"""The chat page: static files without a build step, which a strict content security policy keeps to themselves."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "static"
FILES = {  # path of the URL -> file and its type
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/markdown.js": ("markdown.js", "text/javascript"),
    "/conversations.js": ("conversations.js", "text/javascript"),
}

# Only the server's own files, requests to the server, and no string that becomes HTML or a script.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    return [Route(path, _send) for path in FILES]


async def _send(request: Request) -> Response:
    name, media_type = FILES[request.scope["path"]]
    return Response((FOLDER / name).read_bytes(), headers=_HEADERS, media_type=media_type)
