"""A request's body, within limits: however it is sent, no more than that is kept."""

import asyncio

from starlette.requests import Request

from anarchobot.serving.refusals import ApiError


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """Raises ApiError for more than `most` bytes (413) and for a body that is not there after `seconds` (408), and
    starlette's ClientDisconnect for a client that has gone."""
    told = request.headers.get("content-length", "0")
    if not told.isascii() or not told.isdigit():
        raise ApiError(400, "Content-Length: expected a number of bytes")
    if int(told) > most:
        raise _too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():  # a chunked body has no length beforehand
                body += chunk
                if len(body) > most:
                    raise _too_large(most)
    except TimeoutError as error:
        raise ApiError(408, f"the body was not there after {seconds:g} seconds") from error
    return bytes(body)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is too large: at most {most} bytes are taken")


async def gone(request: Request) -> None:
    """Returns when the client hangs up, once its body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
