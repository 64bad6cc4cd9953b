"""A server with a knowledge base: chats are answered with passages, and the answer names them."""

import json
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig, KnowledgeBaseConfig
from anarchobot.data.sources.documents import DocumentCounts
from anarchobot.inference.chat import ChatSession
from anarchobot.inference.model import Model
from anarchobot.inference.text_encoder import TextEncoder
from anarchobot.knowledge.knowledge_base import KnowledgeBase, prompt_with_passages
from anarchobot.serving.passages import PassageSearch
from anarchobot.tokenizers.conversation import Message
from tests.inference.encoder_folders import write_encoder
from tests.serving.conftest import DEFAULTS, RunningServer, run_server

PATH = "/v1/chat/completions"
QUESTION = "How many wings have bees?"
TEXTS = {"ants.txt": "Ants have six legs.", "bees.txt": "Bees have six legs and four wings."}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("passages")
    with KnowledgeBase(folder / "kb.sqlite", KnowledgeBaseConfig(), create=True) as base:
        for name, text in TEXTS.items():
            (folder / name).write_text(text)
            base.add(folder / name, DataConfig(), DocumentCounts())
    return folder / "kb.sqlite"


@pytest.fixture(scope="module")
def with_passages(model: Model, file: Path) -> Iterator[RunningServer]:
    opened = PassageSearch(partial(KnowledgeBase, file, KnowledgeBaseConfig()))
    with opened as search, run_server(model, knowledge_base=search) as server:
        yield server


def ask(*contents: str, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return {"model": "tiny", "messages": messages, "temperature": 0} | fields


def test_answers_are_those_of_chat(with_passages: RunningServer, model: Model, file: Path) -> None:
    """In both forms; sources and their texts are in the response."""
    status, answer = with_passages.post(PATH, ask(QUESTION))
    assert status == 200
    with KnowledgeBase(file, KnowledgeBaseConfig()) as base:
        session = ChatSession(model, DEFAULTS.model_copy(update={"method": "greedy"}), base)
        assert answer["choices"][0]["message"]["content"].rstrip() == session.answer(QUESTION)
        hits = base.search(QUESTION)
    assert hits[0].text == TEXTS["bees.txt"] and session.hits == hits
    assert answer["sources"] == [hit._asdict() for hit in hits] and answer["dropped_passages"] == 0
    body = json.dumps(ask(QUESTION, stream=True)).encode()
    events = with_passages.request("POST", PATH, body)[2].decode().split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    assert [chunk.get("sources") for chunk in chunks] == [answer["sources"]] + [None] * (len(chunks) - 1)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == answer["choices"][0]["message"]["content"]


def test_sources_are_in_messages_of_anthropics_form(with_passages: RunningServer) -> None:
    sources = with_passages.post(PATH, ask(QUESTION))[1]["sources"]
    fields = ask(QUESTION, max_tokens=12)
    status, message = with_passages.post("/v1/messages", fields)
    assert (status, message["sources"], message["dropped_passages"]) == (200, sources, 0) and sources
    body = json.dumps(fields | {"stream": True}).encode()
    first, *rest = with_passages.request("POST", "/v1/messages", body)[2].decode().split("\n\n")
    start = json.loads(first.partition("data: ")[2])["message"]
    assert (start["sources"], start["content"]) == (sources, []) and "sources" not in "".join(rest)


def test_sources_in_the_official_clients(with_passages: RunningServer) -> None:
    anthropic = pytest.importorskip("anthropic")
    fields = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": QUESTION}]}
    with anthropic.Anthropic(base_url=with_passages.url, api_key="none", max_retries=0) as client:
        complete = client.messages.create(**fields)
        with client.messages.stream(**fields) as stream:
            streamed = stream.get_final_message()
    assert [hit["text"] for hit in complete.sources][:1] == [TEXTS["bees.txt"]]
    assert streamed.sources == complete.sources


def test_passages_are_for_the_last_question(with_passages: RunningServer) -> None:
    answer = with_passages.post(PATH, ask(QUESTION, "Four.", "And legs of ants?"))[1]
    assert [source["text"] for source in answer["sources"]] == [TEXTS["ants.txt"], TEXTS["bees.txt"]]
    assert with_passages.post(PATH, ask("zzz"))[1]["sources"] == []
    system = {"messages": [{"role": "system", "content": QUESTION}]}
    assert with_passages.post(PATH, ask() | system)[1]["sources"] == []
    completion = {"model": "tiny", "prompt": QUESTION, "max_tokens": 1}
    assert "sources" not in with_passages.post("/v1/completions", completion)[1]


def test_a_server_without_one_sends_no_sources(server: RunningServer) -> None:
    for path in (PATH, "/v1/messages"):
        assert "sources" not in server.post(path, ask(QUESTION, max_tokens=1))[1]


def test_passages_that_do_not_fit_are_dropped_from_the_last(file: Path) -> None:
    """The prompt's length is counted in characters here."""
    question = "Which legs?"
    with PassageSearch(partial(KnowledgeBase, file, KnowledgeBaseConfig())) as search:
        with KnowledgeBase(file, KnowledgeBaseConfig()) as base:
            hits = base.search(question)
        sizes = [len(prompt_with_passages(question, hits[:used])) for used in range(3)]
        assert len(hits) == 2
        for room, used in ((sizes[2], 2), (sizes[2] - 1, 1), (sizes[1], 1), (sizes[1] - 1, 0), (1, 0)):
            turns = [Message("user", "legs"), Message("assistant", ""), Message("user", question)]
            ids, passages = search.encode(turns, lambda turns: list(map(ord, turns[-1].content)), room)
            assert list(passages.hits) == hits[:used] and passages.dropped == 2 - used
            assert "".join(map(chr, ids)) == prompt_with_passages(question, hits[:used])


def test_search_by_meaning(model: Model, tmp_path: Path) -> None:
    """MLX and SQLite work in the thread of the knowledge base, while the model has its own."""
    encoder = write_encoder(tmp_path / "encoder")
    (tmp_path / "a.txt").write_text("the beaver builds a dam")

    def open_base() -> KnowledgeBase:
        base = KnowledgeBase(tmp_path / "kb", KnowledgeBaseConfig(), create=True, encoder=TextEncoder(encoder))
        base.add(tmp_path / "a.txt", DataConfig(), DocumentCounts())
        assert sum(base.embed()) == 1
        return base

    with PassageSearch(open_base) as search, run_server(model, knowledge_base=search) as server:
        for question in ("red apple", "river query"):  # no word in common
            assert len(server.post(PATH, ask(question))[1]["sources"]) == 1


def test_a_knowledge_base_that_fails(model: Model, file: Path, tmp_path: Path) -> None:
    """When it is opened, an error for the user; later, one for the client, without the path of the file."""
    with pytest.raises(UserError, match="no such knowledge base"):
        PassageSearch(partial(KnowledgeBase, tmp_path / "none", KnowledgeBaseConfig()))
    copy = tmp_path / "copy.sqlite"
    copy.write_bytes(file.read_bytes())
    opened = PassageSearch(partial(KnowledgeBase, copy, KnowledgeBaseConfig()))
    with opened as search, run_server(model, knowledge_base=search) as server:
        with sqlite3.connect(copy) as database:
            database.execute("DELETE FROM passages")
        status, answer = server.post(PATH, ask(QUESTION))
        assert status == 503 and "knowledge base" in answer["error"]["message"]
        assert "copy" not in answer["error"]["message"]
        assert server.is_healthy()
