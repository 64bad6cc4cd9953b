"""The page to chat in: one file, which may load nothing, run nothing and send nothing but what is in it."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

HTML = Path(__file__).with_name("page.html")


def page() -> Response:
    text = HTML.read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash(text, 'script')}; style-src {_hash(text, 'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "Cache-Control": "no-cache",
    }
    return Response(text, headers=headers, media_type="text/html")


def _hash(text: str, tag: str) -> str:
    """Of what stands between the page's one pair of tags, in the policy's words."""
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
