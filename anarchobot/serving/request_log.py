"""The request log: one line per request on stderr, without prompts unless asked for."""

import json
import logging
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

DISCONNECTED = 499  # the status of a request whose client disconnected before the end of the response

logger = logging.getLogger(__name__)


@dataclass
class Usage:
    """Tokens of one request so far. The application puts it into `request.state.usage`. `cached_tokens` are those of
    the prompt that were not computed, because an earlier prompt started with them."""

    prompt: str
    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0


def configure_logging(level: str) -> None:
    """Logs the server's and uvicorn's messages from `level` on to stderr; uvicorn's from "warning" on at least."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    chosen = getattr(logging, level.upper())
    for name, lowest in (("anarchobot.serving", chosen), ("uvicorn.error", max(chosen, logging.WARNING))):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(lowest)


class RequestLogMiddleware:
    """Logs the client, method, path, status, prompt and generated tokens, and duration of each request."""

    def __init__(self, app: ASGIApp, log_prompts: bool) -> None:
        self._app, self._log_prompts = app, log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status, is_complete = time.monotonic(), DISCONNECTED, False

        async def observe(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                is_complete = True
            await send(message)

        try:
            await self._app(scope, receive, observe)
        finally:
            self._log(scope, status if is_complete else DISCONNECTED, time.monotonic() - start)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        client = scope["client"][0] if scope["client"] else "-"
        path = scope["raw_path"].decode("ascii", "backslashreplace")[:200]  # still percent-encoded: it is one word
        usage = scope["state"].get("usage")
        tokens = (
            f" in={usage.prompt_tokens} cached={usage.cached_tokens} out={usage.completion_tokens}" if usage else ""
        )
        # ASCII only, so that a prompt cannot forge a line or reach the terminal as an escape sequence.
        prompt = f" prompt={json.dumps(usage.prompt)}" if usage and self._log_prompts else ""
        logger.info("%s %s %s %d%s %.0f ms%s", client, scope["method"], path, status, tokens, seconds * 1000, prompt)
