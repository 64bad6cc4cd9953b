"""The HTTP application: OpenAI's /v1/models, /v1/completions, /v1/chat/completions and /v1/embeddings; Anthropic's
/v1/messages; the chat page at /; /health."""

import asyncio
import json
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
from anarchobot.inference.generation import NUM_SEEDS
from anarchobot.inference.model import Model
from anarchobot.serving import page
from anarchobot.serving.auth import ApiKeyMiddleware, HostMiddleware
from anarchobot.serving.chat_schema import ChatRequest
from anarchobot.serving.embeddings import Embedder, EmbeddingsRequest
from anarchobot.serving.errors import ApiError, json_response
from anarchobot.serving.messages_schema import CountRequest, MessagesRequest
from anarchobot.serving.messages_writer import MessagesWriter
from anarchobot.serving.passages import PassageSearch
from anarchobot.serving.prompts import EncodedPrompt, PromptEncoder
from anarchobot.serving.request_log import DISCONNECTED, Usage
from anarchobot.serving.responses import ResponseWriter
from anarchobot.serving.schema import BaseRequest, CompletionRequest, ConversationRequest, parse_request
from anarchobot.serving.worker import GenerationStream, Worker

WARNING = "X-Warning"  # header


@dataclass(frozen=True)
class Limits:
    """Limits per request: generated tokens, bytes of the body, seconds to receive the body."""

    tokens: int = 2048
    body_bytes: int = 2**20
    body_seconds: float = 30


class Service:
    """Serves one model as `name`. `defaults`: settings for fields that a request omits. Questions of chats are answered
    with passages from `knowledge_base`, and texts are embedded by `embedder`."""

    def __init__(
        self,
        model: Model,
        worker: Worker,
        name: str,
        defaults: GenerationConfig,
        limits: Limits,
        knowledge_base: PassageSearch | None = None,
        embedder: Embedder | None = None,
    ) -> None:
        """Raises UserError if the chat template cannot be used."""
        self._worker, self._name, self._defaults, self._limits = worker, name, defaults, limits
        self._embedder = embedder
        self._model, self._prompts = model, PromptEncoder(model, knowledge_base)
        self._created = int(time.time())
        self._tokenizing = asyncio.Lock()

    def warnings(self) -> list[str]:
        return self._prompts.warnings()

    def app(self, hosts: Collection[str], origins: Collection[str], api_key: str | None) -> Starlette:
        """`hosts`: accepted Host names; `origins`: other sites whose pages may send requests."""
        return Starlette(
            routes=[
                *page.routes(),
                Route("/health", self._health),
                Route("/v1/models", self._list_models),
                Route("/v1/models/{name:path}", self._get_model),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/embeddings", self._embeddings, methods=["POST"]),
                Route("/v1/messages", self._messages, methods=["POST"]),
                Route("/v1/messages/count_tokens", self._count_tokens, methods=["POST"]),
            ],
            middleware=[
                Middleware(HostMiddleware, hosts, origins),
                Middleware(CORSMiddleware, [*origins], ["GET", "POST"], ["*"], expose_headers=[WARNING]),
                Middleware(ApiKeyMiddleware, api_key, {*page.FILES, "/health"}),  # the page asks for the key
            ],
            exception_handlers={
                ApiError: _api_error,
                ClientDisconnect: _client_disconnected,
                HTTPException: _http_error,
                Exception: _internal_error,
            },
        )

    async def _health(self, request: Request) -> Response:
        return json_response({"status": "ok", "under_way": self._worker.active_requests})

    async def _list_models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": self._models()})

    async def _get_model(self, request: Request) -> Response:
        models = {model["id"]: model for model in reversed(self._models())}
        if request.path_params["name"] not in models:
            available = ", ".join(f"'{model['id']}'" for model in self._models())
            raise ApiError(404, f"model not found; available: {available}", "model", "model_not_found")
        return json_response(models[request.path_params["name"]])

    async def _completions(self, request: Request) -> Response:
        return await self._generate(request, parse_request(await self._body(request), CompletionRequest))

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, parse_request(await self._body(request), ChatRequest))

    async def _messages(self, request: Request) -> Response:
        return await self._generate(request, parse_request(await self._body(request), MessagesRequest))

    async def _embeddings(self, request: Request) -> Response:
        parsed = parse_request(await self._body(request), EmbeddingsRequest)
        if self._embedder is None:
            message = "this server has no embedding model; start it with --embedding-model MODEL"
            raise ApiError(404, message, "model", "model_not_found")
        response = await self._embedder.respond(request, parsed)
        return json_response(response, headers=self._warning(parsed, self._embedder.name))

    async def _count_tokens(self, request: Request) -> Response:
        parsed = parse_request(await self._body(request), CountRequest)
        place = self._worker.open()
        try:
            encoded = await self._tokenize(request, parsed)
        finally:
            place.close()
        return json_response({"input_tokens": len(encoded.prompt.ids)}, headers=self._warning(parsed))

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._limits.body_bytes, self._limits.body_seconds)

    async def _generate(self, request: Request, parsed: CompletionRequest | ChatRequest | MessagesRequest) -> Response:
        settings = parsed.settings(self._defaults, self._limits.tokens)
        generation = self._worker.open(parsed.choices())
        try:
            encoded = await self._tokenize(request, parsed, settings.max_new_tokens)
            request.state.usage = usage = Usage(encoded.text, len(encoded.prompt.ids))
            seeds = [(settings.seed + i) % NUM_SEEDS for i in range(parsed.choices())]
            generation.start(encoded.prompt, [settings.model_copy(update={"seed": seed}) for seed in seeds])
        except BaseException:
            generation.close()
            raise
        writer, headers = self._writer(parsed, encoded, usage), self._warning(parsed)
        if parsed.stream:
            return _EventStream(writer.stream(generation), generation, headers)
        response = asyncio.ensure_future(writer.complete(generation))
        disconnected = asyncio.ensure_future(wait_for_disconnect(request))
        try:
            await asyncio.wait({response, disconnected}, return_when=asyncio.FIRST_COMPLETED)
            if not response.done():
                raise ClientDisconnect
            return json_response(response.result(), headers=headers)
        finally:
            response.cancel()
            disconnected.cancel()
            generation.close()

    def _writer(
        self, parsed: CompletionRequest | ChatRequest | MessagesRequest, encoded: EncodedPrompt, usage: Usage
    ) -> ResponseWriter | MessagesWriter:
        passages = {} if encoded.passages is None else encoded.passages.fields()
        if isinstance(parsed, MessagesRequest):
            return MessagesWriter(self._name, usage, encoded.form, passages)
        return ResponseWriter(
            "chat.completion" if isinstance(parsed, ChatRequest) else "text_completion",
            self._name,
            usage,
            self._model.tokenizer,
            parsed.n,
            encoded.form,
            encoded.prompt.top_logprobs is not None,
            encoded.prompt.after_space,
            parsed.include_usage,
            passages,
        )

    async def _tokenize(
        self, request: Request, parsed: CompletionRequest | ConversationRequest, new_tokens: int = 0
    ) -> EncodedPrompt:
        """Encodes the prompt in a thread. One at a time, so that long prompts occupy one core, and not for a client
        that disconnected while it waited."""
        async with self._tokenizing:
            if await request.is_disconnected():
                raise ClientDisconnect
            return await asyncio.to_thread(self._prompts.encode, parsed, new_tokens)

    def _warning(self, parsed: BaseRequest, name: str | None = None) -> dict[str, str]:
        """The header of an answer to a request for another model than `name`, by default the one that generates; many
        clients have one of OpenAI's as default."""
        name = name or self._name
        if parsed.model == name:
            return {}
        return {WARNING: f"answered by {json.dumps(name)}, the only model for this path"}

    def _models(self) -> list[dict[str, object]]:
        """The model that generates, then the one that embeds. `max_model_len` is vLLM's name."""
        lengths = [(self._name, self._model.config.max_seq_len)]
        if self._embedder is not None:
            lengths.append((self._embedder.name, self._embedder.encoder.max_tokens))
        info = {"object": "model", "created": self._created, "owned_by": "anarchobot"}
        return [{"id": name, **info, "max_model_len": length} for name, length in lengths]


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """Reads a request's body; never holds more than `max_bytes`.

    Raises ApiError if it is larger (413) or not received within `seconds` (408), and ClientDisconnect.
    """
    declared = request.headers.get("content-length", "0")
    if not declared.isascii() or not declared.isdigit():
        raise ApiError(400, "Content-Length: expected a number of bytes")
    too_large = ApiError(413, f"request body too large; the limit is {max_bytes} bytes")
    if int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():  # a chunked body declares no length
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"request body not received within {seconds:g} seconds") from error
    return bytes(body)


async def wait_for_disconnect(request: Request) -> None:
    """Returns when the client disconnects; call it after reading the body."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """Server-sent events; closes the generation when the response ends for any reason."""

    def __init__(self, events: AsyncIterator[bytes], generation: GenerationStream, headers: dict[str, str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", **headers}, media_type="text/event-stream")
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _client_disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=DISCONNECTED)  # never sent


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()


async def _internal_error(request: Request, error: Exception) -> Response:
    return ApiError(500, "internal server error; see the server's log").response()
