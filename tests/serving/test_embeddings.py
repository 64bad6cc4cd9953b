"""/v1/embeddings through OpenAI's official client; the vectors are those of the encoder, which are transformers'."""

import base64
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anarchobot.config.schema import DataConfig, KnowledgeBaseConfig
from anarchobot.data.sources.documents import DocumentCounts
from anarchobot.inference.model import Model
from anarchobot.inference.text_encoder import TextEncoder
from anarchobot.knowledge.knowledge_base import KnowledgeBase
from anarchobot.serving.app import Limits
from anarchobot.serving.embeddings import MAX_TEXTS, Embedder
from anarchobot.serving.passages import PassageSearch
from tests.fuzz.openapi import description
from tests.inference.encoder_folders import write_encoder
from tests.serving.conftest import RunningServer, run_server, wait_until
from tests.serving.test_fuzz import anything, check, fuzzed, texts
from tests.serving.test_openai_client import client_of

openai = pytest.importorskip("openai")

PATH = "/v1/embeddings"
TEXTS = ["the beaver builds a dam", "a red apple", "river"]
PROMPTS = {"config_sentence_transformers.json": {"prompts": {"query": "query: ", "document": "a "}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("embeddings") / "small", files=PROMPTS)


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Iterator[Embedder]:
    with Embedder(partial(TextEncoder, str(folder)), queue_size=1) as found:
        yield found


@pytest.fixture(scope="module")
def embedding_server(model: Model, embedder: Embedder) -> Iterator[RunningServer]:
    with run_server(model, Limits(body_bytes=2**16), embedder=embedder) as server:
        yield server


@pytest.fixture(scope="module")
def client(embedding_server: RunningServer) -> Iterator[Any]:
    with client_of(embedding_server) as found:
        yield found


def test_vectors_are_those_of_the_encoder(client: Any, tmp_path: Path) -> None:
    """In both encodings, alone and together, without the model's prompts."""
    expected = TextEncoder(str(write_encoder(tmp_path))).encode_passages(TEXTS)
    for kind in ({}, {"encoding_format": "float"}):
        answer = client.embeddings.create(model="small", input=TEXTS, **kind)
        found = np.array([item.embedding for item in answer.data])
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert [item.index for item in answer.data] == [0, 1, 2] and answer.model == "small"
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == (5 + 2) + (3 + 2) + (1 + 2)
    alone = client.embeddings.create(model="small", input=TEXTS[1]).data
    np.testing.assert_allclose([item.embedding for item in alone], expected[1:2], atol=1e-6)


@pytest.mark.parametrize("kind", ["float", "base64"])
def test_the_response_is_as_described(embedding_server: RunningServer, kind: str) -> None:
    described = description()
    operation = described["paths"][PATH]["post"]
    body = {"model": "small", "input": TEXTS, "encoding_format": kind}
    _, answer = embedding_server.post(PATH, body)
    jsonschema.validate(answer, operation["responses"]["200"]["content"]["application/json"]["schema"])
    jsonschema.validate(body, operation["requestBody"]["content"]["application/json"]["schema"])


def test_base64_is_little_endian_float32(embedding_server: RunningServer) -> None:
    fields = {"model": "small", "input": TEXTS[0]}
    (floats, raw) = (
        embedding_server.post(PATH, fields | {"encoding_format": kind})[1]["data"][0]["embedding"]
        for kind in ("float", "base64")
    )
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(raw), "<f4"), np.array(floats, np.float32))
    np.testing.assert_allclose(np.linalg.norm(floats), 1, rtol=1e-6)


def test_more_texts_than_a_batch(client: Any) -> None:
    many = [TEXTS[i % 3] for i in range(70)]
    few = [item.embedding for item in client.embeddings.create(model="small", input=TEXTS).data]
    found = [item.embedding for item in client.embeddings.create(model="small", input=many).data]
    np.testing.assert_allclose(found, [few[i % 3] for i in range(70)], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [[1, 2]]}, "input"), ({"input": [1, 2]}, "input"), ({"input": []}, "input"),
        ({"input": ""}, "input.0"), ({"input": ["a", 5]}, "input.1"), ({"input": ["a", "red " * 20]}, "input"),
        ({"input": ["a"] * (MAX_TEXTS + 1)}, "input"), ({"dimensions": 8}, "dimensions"), ({"input": None}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"), ({"max_tokens": 5}, "max_tokens"),
    ],
)  # fmt: skip
def test_bad_requests_are_named(embedding_server: RunningServer, fields: Any, param: str) -> None:
    status, answer = embedding_server.post(PATH, {"model": "small", "input": "a"} | fields)
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert "\n" not in answer["error"]["message"]


def test_a_text_that_is_too_long_is_named(embedding_server: RunningServer) -> None:
    texts = ["a"] * 40 + ["red " * 20]
    _, answer = embedding_server.post(PATH, {"model": "small", "input": texts})
    assert answer["error"]["message"].startswith("input.40: 22 tokens") and " 12;" in answer["error"]["message"]
    assert embedding_server.post(PATH, {"model": "small", "input": "red " * 10})[0] == 200  # with both ends, 12


def test_the_size_of_vectors_and_of_the_body(embedding_server: RunningServer) -> None:
    assert embedding_server.post(PATH, {"model": "small", "input": "a", "dimensions": 16, "user": "x"})[0] == 200
    assert embedding_server.post(PATH, {"model": "small", "input": "a " * 2**15})[0] == 413


@fuzzed
@given(
    texts | st.lists(st.text(max_size=5), max_size=4) | anything,
    st.sampled_from([{}, {"dimensions": 16}, {"dimensions": 15}, {"encoding_format": "base64"}])
    | st.fixed_dictionaries({"dimensions": anything, "encoding_format": anything}),
)
def test_any_text_is_embedded(embedding_server: RunningServer, value: Any, fields: dict[str, Any]) -> None:
    """The model takes 12 tokens."""
    status = check(embedding_server, PATH, {"model": "small", "input": value} | fields)
    parts = [value] if isinstance(value, str) else value
    if isinstance(parts, list) and all(isinstance(text, str) and len(text) < 6 for text in parts) and len(fields) < 2:
        assert (status == 200) == (all(parts) and parts != [] and fields.get("dimensions") != 15), (value, fields)


def test_the_model_is_listed(embedding_server: RunningServer) -> None:
    models = json.loads(embedding_server.request("GET", "/v1/models")[2])["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("tiny", 4096), ("small", 12)]
    one = json.loads(embedding_server.request("GET", "/v1/models/small")[2])
    assert one == models[1]
    body = json.dumps({"model": "text-embedding-3-small", "input": "a"}).encode()
    _, headers, _ = embedding_server.request("POST", PATH, body)
    assert '"small"' in headers["x-warning"]


def test_without_an_embedding_model(server: RunningServer) -> None:
    status, answer = server.post(PATH, {"model": "tiny", "input": "a"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "--embedding-model" in answer["error"]["message"]


def test_too_many_requests(embedding_server: RunningServer, embedder: Embedder) -> None:
    """While the thread is busy, two requests wait, and the third is refused."""
    release = Event()
    embedder.thread.submit(release.wait)
    statuses: list[int] = []
    ask = lambda: statuses.append(embedding_server.post(PATH, {"model": "small", "input": "a"})[0])  # noqa: E731
    waiting = [Thread(target=ask) for _ in range(2)]
    for thread in waiting:
        thread.start()
    try:
        wait_until(lambda: embedder._active == 2)
        status, answer = embedding_server.post(PATH, {"model": "small", "input": "a"})
    finally:
        release.set()
    for thread in waiting:
        thread.join()
    assert (status, answer["error"]["code"], statuses) == (429, "rate_limit_exceeded", [200, 200])


def test_the_model_of_a_knowledge_base(model: Model, folder: Path, embedder: Embedder, tmp_path: Path) -> None:
    """Both are computed by one encoder, in one thread."""
    file = tmp_path / "kb.sqlite"
    (tmp_path / "a.txt").write_text("the beaver builds")
    with KnowledgeBase(file, KnowledgeBaseConfig(), create=True, encoder=TextEncoder(str(folder))) as base:
        base.add(tmp_path / "a.txt", DataConfig(), DocumentCounts())
        list(base.embed())
    opened = partial(KnowledgeBase, file, KnowledgeBaseConfig(), encoder=embedder.encoder)
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "dam"}], "max_tokens": 1}
    with (
        PassageSearch(opened, embedder.thread) as search,
        run_server(model, knowledge_base=search, embedder=embedder) as server,
    ):
        status, answer = server.post("/v1/chat/completions", ask)
        assert (status, [hit["text"] for hit in answer["sources"]]) == (200, ["the beaver builds"])
        assert server.post(PATH, {"model": "small", "input": "a"})[0] == 200
