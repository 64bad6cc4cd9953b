"""Log-probabilities are those of the model's logits, computed without a cache, in float64; several choices."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.chat import chat_encoder
from anarchobot.inference.generation import TextBatch, prompt_ids
from anarchobot.inference.model import Model
from anarchobot.tokenizers.canonical_tokens import token_bytes
from anarchobot.tokenizers.conversation import Message
from tests.exchange.random_run import our_logits
from tests.serving.conftest import RunningServer
from tests.serving.scripted import script
from tests.serving.test_openai_client import client_of

openai = pytest.importorskip("openai")

ASK = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Any]:
    with client_of(server) as found:
        yield found


def log_softmax(model: Model, ids: list[int]) -> npt.NDArray[np.float64]:
    """Of the last position, [V]."""
    z = our_logits(model.tokenizer.files[0].parent, ids)[-1].astype(np.float64)
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def check(model: Model, ids: list[int], logprobs: list[float], tops: list[list[tuple[bytes, float]]]) -> None:
    """A greedy answer's log-probabilities, and the most likely tokens."""
    raws = token_bytes(model.tokenizer)
    for logprob, top in zip(logprobs, tops, strict=True):
        expected = log_softmax(model, ids)
        order = np.argsort(-expected)[: len(top)]
        assert logprob == pytest.approx(expected.max(), abs=2e-4)
        assert [raw for raw, _ in top] == [raws[i] for i in order]
        assert [value for _, value in top] == pytest.approx(expected[order], abs=2e-4)
        ids = [*ids, int(expected.argmax())]


def test_chat(client: Any, model: Model) -> None:
    """Also with other settings, which do not change the model's log-probabilities."""
    fields = {"model": "tiny", "messages": ASK, "max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 5}
    answer = client.chat.completions.create(**fields).choices[0]
    ids = chat_encoder(model).encode_prompt((Message("user", "Hi"),)).tolist()
    content = answer.logprobs.content
    tops = [[(bytes(top.bytes), top.logprob) for top in item.top_logprobs] for item in content]
    check(model, ids, [item.logprob for item in content], tops)
    assert len(content) == 8 and all(len(top) == 5 for top in tops)
    assert (
        b"".join(bytes(item.bytes) for item in content).decode("utf-8", "replace").strip()
        == answer.message.content.strip()
    )
    assert [item.token for item in content] == [bytes(item.bytes).decode("utf-8", "replace") for item in content]
    chunks = list(client.chat.completions.create(**fields, stream=True))
    found = [item for c in chunks if c.choices[0].logprobs for item in c.choices[0].logprobs.content]
    assert [item.token for item in found] == [item.token for item in content]
    assert [item.logprob for item in found] == pytest.approx([item.logprob for item in content], abs=1e-4)
    fields |= {"temperature": 1.7, "seed": 3, "presence_penalty": 2, "frequency_penalty": 2, "top_p": 0.1}
    raws = token_bytes(model.tokenizer)
    for item in client.chat.completions.create(**fields).choices[0].logprobs.content:
        expected = log_softmax(model, ids)
        same = [i for i, raw in enumerate(raws) if raw == bytes(item.bytes)]  # more than one for a byte
        token = min(same, key=lambda i: abs(expected[i] - item.logprob))
        assert item.logprob == pytest.approx(expected[token], abs=2e-4)
        tops = [top.logprob for top in item.top_logprobs]
        assert tops == pytest.approx(np.sort(expected)[::-1][:5], abs=2e-4)
        ids = [*ids, token]


def test_completions(client: Any, model: Model) -> None:
    fields = {"model": "tiny", "prompt": "The list of", "max_tokens": 8, "temperature": 0, "logprobs": 3}
    answer = client.completions.create(**fields).choices[0]
    got = answer.logprobs
    ids, raws = prompt_ids(model, "The list of"), token_bytes(model.tokenizer)
    for logprob, top in zip(got.token_logprobs, got.top_logprobs, strict=True):
        likely = log_softmax(model, ids)
        assert logprob == pytest.approx(likely.max(), abs=2e-4)
        first: dict[str, float] = {}  # different bytes of characters have the same text
        for i in np.argsort(-likely)[:3]:
            first.setdefault(raws[i].decode("utf-8", "replace"), likely[i])
        assert list(top) == list(first) and list(top.values()) == pytest.approx(list(first.values()), abs=2e-4)
        ids = [*ids, int(likely.argmax())]
    if "\ufffd" not in answer.text:
        assert "".join(got.tokens) == answer.text
        assert all(answer.text.startswith(t, at) for at, t in zip(got.text_offset, got.tokens, strict=True))
    chunks = [c.choices[0].logprobs for c in client.completions.create(**fields, stream=True) if c.choices[0].logprobs]
    assert [token for part in chunks for token in part.tokens] == got.tokens
    assert [at for part in chunks for at in part.text_offset] == got.text_offset
    none = client.completions.create(**fields | {"logprobs": 0}).choices[0].logprobs
    assert none.token_logprobs == pytest.approx(got.token_logprobs, abs=1e-4) and all(
        len(top) == 1 for top in none.top_logprobs
    )


def test_tokens_of_a_stop_string_are_left_out(client: Any, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, model.tokenizer, "one STOP two")
    fields = {"model": "tiny", "messages": ASK, "logprobs": True, "stop": ["STOP"], "max_tokens": 40}
    choice = client.chat.completions.create(**fields).choices[0]
    assert choice.message.content == "one " and choice.finish_reason == "stop"
    assert b"".join(bytes(item.bytes) for item in choice.logprobs.content).strip() == b"one"


def test_without_logprobs_there_are_none(client: Any) -> None:
    choice = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=2, logprobs=False).choices[0]
    assert choice.logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices(client: Any, model: Model, stream: bool) -> None:
    """Choice i is the answer to the request with seed + i alone."""
    fields = {"model": "tiny", "messages": ASK, "max_tokens": 6, "temperature": 1.5}
    alone = [client.chat.completions.create(**fields, seed=40 + i) for i in range(4)]
    expected = [answer.choices[0].message.content for answer in alone]
    assert len(set(expected)) == 4
    if stream:
        texts = [""] * 4
        for chunk in client.chat.completions.create(**fields, seed=40, n=4, stream=True):
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
        assert texts == expected
        return
    answer = client.chat.completions.create(**fields, seed=40, n=4)
    assert [choice.message.content for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    assert answer.usage.prompt_tokens == alone[0].usage.prompt_tokens


def test_scores_do_not_depend_on_the_other_rows(model: Model) -> None:
    batch, greedy = TextBatch(model), GenerationConfig(method="greedy", max_new_tokens=5)
    requests = [batch.insert(prompt_ids(model, "a " * (i + 1)), greedy, (), top_logprobs=i or None) for i in range(4)]
    scored: dict[int, list[Any]] = {request: [] for request in requests}
    while batch:
        for chunk in batch.step():
            scored[chunk.request] += chunk.scored
    assert [len(scored[request]) for request in requests] == [0, 5, 5, 5]
    assert [[len(item.top) for item in scored[request]] for request in requests[1:]] == [[i] * 5 for i in (1, 2, 3)]
    for i, request in enumerate(requests[1:], 1):
        ids = prompt_ids(model, "a " * (i + 1))
        for item in scored[request]:
            expected = log_softmax(model, ids)
            assert item.logprob == pytest.approx(expected[item.token], abs=2e-4)
            ids = [*ids, item.token]
