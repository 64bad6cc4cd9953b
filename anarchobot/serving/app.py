"""The server's paths: OpenAI's /v1/models, /v1/completions and /v1/chat/completions, the page at /, and /health."""

import asyncio
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from anarchobot.config.schema import GenerationConfig
from anarchobot.serving.answers import Form, Kind
from anarchobot.serving.body import gone, read_body
from anarchobot.serving.gate import HostGate, KeyGate
from anarchobot.serving.page import page
from anarchobot.serving.prompts import Prompt, Prompts
from anarchobot.serving.protocol import ChatRequest, CompletionRequest, parse
from anarchobot.serving.refusals import ApiError, json_response
from anarchobot.serving.worker import Answer, Worker


@dataclass(frozen=True)
class Limits:
    """Of one request: tokens of its answer, bytes of its body, and seconds until that is there."""

    tokens: int = 2048
    body_bytes: int = 2**20
    body_seconds: float = 30


class Service:
    """One model, known as `name`; `settings`: of what a request leaves out. `context`: the most tokens it sees."""

    def __init__(
        self, worker: Worker, prompts: Prompts, name: str, context: int, settings: GenerationConfig, limits: Limits
    ) -> None:
        self._worker, self._prompts, self._name, self._context = worker, prompts, name, context
        self._settings, self._limits, self._since = settings, limits, int(time.time())

    def app(self, hosts: Collection[str], origins: Collection[str], key: str | None) -> Starlette:
        """`hosts`: the names it answers to; `origins`: other sites whose pages may ask; `key`: None: no key."""
        return Starlette(
            routes=[
                Route("/", self._page),
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            middleware=[
                Middleware(HostGate, hosts, origins),
                Middleware(CORSMiddleware, [*origins], allow_methods=["GET", "POST"], allow_headers=["*"]),
                Middleware(KeyGate, key),
            ],
            exception_handlers={
                ApiError: _refused,
                ClientDisconnect: _nobody,
                HTTPException: _no_such_path,
                Exception: _fault,
            },
        )

    async def _page(self, request: Request) -> Response:
        return page()

    async def _health(self, request: Request) -> Response:
        return json_response({"status": "ok", "under_way": self._worker.under_way})

    async def _models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return json_response(self._described())

    async def _completions(self, request: Request) -> Response:
        asked = parse(await self._body(request), CompletionRequest)
        return await self._answered(request, asked, "text_completion")

    async def _chat(self, request: Request) -> Response:
        asked = parse(await self._body(request), ChatRequest)
        return await self._answered(request, asked, "chat.completion")

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._limits.body_bytes, self._limits.body_seconds)

    async def _answered(self, request: Request, asked: CompletionRequest | ChatRequest, kind: Kind) -> Response:
        self._check_name(asked.model)
        settings = asked.settings(self._settings, self._limits.tokens)
        prompt = await asyncio.to_thread(self._prompt, asked)
        form = Form(kind, self._name, len(prompt.ids))
        answer = self._worker.ask(prompt.ids, settings, prompt.stop)
        if asked.stream:
            return _EventStream(form.stream(answer, asked.usage_wanted), answer)
        whole = asyncio.ensure_future(form.whole(answer))
        hung_up = asyncio.ensure_future(gone(request))
        try:
            await asyncio.wait({whole, hung_up}, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise ClientDisconnect
            return json_response(whole.result())
        finally:
            whole.cancel()
            hung_up.cancel()
            answer.close()

    def _prompt(self, asked: CompletionRequest | ChatRequest) -> Prompt:
        if isinstance(asked, ChatRequest):
            return self._prompts.of_messages(asked.conversation())
        return self._prompts.of_text(asked.prompt)

    def _check_name(self, name: str) -> None:
        if name != self._name:
            told = f"model: there is none of that name: this server has '{self._name}'"
            raise ApiError(404, told, "model", "model_not_found")

    def _described(self) -> dict[str, object]:
        described = {"id": self._name, "object": "model", "created": self._since, "owned_by": "anarchobot"}
        return described | {"max_model_len": self._context}  # as vLLM names it


class _EventStream(StreamingResponse):
    """Server-sent events; the answer is closed however this ends."""

    def __init__(self, events: AsyncIterator[bytes], answer: Answer) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store"}, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    return ApiError(
        error.status_code, f"{request.method} {request.url.path}: {error.detail}", headers=headers
    ).response()


async def _fault(request: Request, error: Exception) -> Response:
    return ApiError(500, "a fault of the server's: it is in its log").response()
