"""/v1/embeddings: vectors of texts, in OpenAI's form, from the embedding model of the server."""

import base64
from asyncio import get_running_loop
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field
from starlette.requests import ClientDisconnect, Request

from anarchobot.inference.text_encoder import BATCH, TextEncoder
from anarchobot.serving.errors import ApiError
from anarchobot.serving.request_log import Usage
from anarchobot.serving.schema import Accepted, BaseRequest, Items

MAX_TEXTS = 2048  # per request, as OpenAI's


def _texts(value: object) -> object:
    if isinstance(value, list) and value and not isinstance(value[0], str):
        raise ValueError("expected texts; token ids are not supported, because those of other models would be accepted")
    return [value] if isinstance(value, str) else value


class EmbeddingsRequest(BaseRequest):
    UNSUPPORTED: ClassVar[Accepted] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset({"user"})

    input: Annotated[
        Items[Annotated[str, Field(min_length=1)]],
        Field(min_length=1, max_length=MAX_TEXTS),
        BeforeValidator(_texts, json_schema_input_type=str | Annotated[list[str], Field(max_length=MAX_TEXTS)]),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class Embedder:
    """The embedding model, loaded in a thread of its own, which computes for one request at a time; a context manager.
    Up to `queue_size` requests wait. Call the methods from the thread of one event loop."""

    def __init__(self, load: Callable[[], TextEncoder], queue_size: int = 64) -> None:
        """Raises what `load` raises."""
        self.thread = ThreadPoolExecutor(1, "embeddings")
        try:
            self.encoder = self.thread.submit(load).result()
        except BaseException:
            self.thread.shutdown()
            raise
        self.name = Path(self.encoder.name).name.partition("@")[0]  # of the folder, or on the Hub
        self._limit, self._active = queue_size + 1, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.thread.submit(mx.clear_streams)  # otherwise MLX aborts the process at exit
        self.thread.shutdown()

    async def respond(self, request: Request, parsed: EmbeddingsRequest) -> dict[str, object]:
        """The response. Raises ApiError (400) for a text with too many tokens, and (429) if too many requests wait."""
        if parsed.dimensions not in (None, self.encoder.dimensions):
            message = f"dimensions: this model has {self.encoder.dimensions}; omit it"
            raise ApiError(400, message, "dimensions", "unsupported_parameter")
        if self._active >= self._limit:
            message = f"too many requests: {self._active} active, the limit is {self._limit}; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})
        self._active += 1
        try:
            vectors, tokens = await self._encode(request, parsed.input)
        finally:
            self._active -= 1
        request.state.usage = Usage("\n".join(parsed.input), tokens)
        rows = vectors.tolist() if parsed.encoding_format == "float" else map(_base64, vectors)
        data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self.name, "usage": usage}

    async def _encode(self, request: Request, texts: list[str]) -> tuple[npt.NDArray[np.float32], int]:
        """Vectors, and the number of tokens. Requests take turns after each batch; a client that disconnected has no
        further one."""
        vectors, tokens = [], 0
        for start in range(0, len(texts), BATCH):
            if await request.is_disconnected():
                raise ClientDisconnect
            batch = texts[start : start + BATCH]
            found, counts = await get_running_loop().run_in_executor(self.thread, self.encoder.encode_texts, batch)
            if (longest := max(counts)) > self.encoder.max_tokens:
                place = start + counts.index(longest)
                message = f"input.{place}: {longest} tokens, the model's maximum is {self.encoder.max_tokens}; split it"
                raise ApiError(400, message, "input", "context_length_exceeded")
            vectors.append(found)
            tokens += sum(counts)
        return np.concatenate(vectors), tokens


def _base64(vector: npt.NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
