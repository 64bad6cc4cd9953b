"""The official OpenAI client gets the same text as `generate` and `chat`."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.chat import ChatSession
from anarchobot.inference.generation import generate
from anarchobot.inference.model import Model
from tests.serving.conftest import DEFAULTS, KEY, RunningServer, run_server

openai = pytest.importorskip("openai")


def client_of(server: RunningServer, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Any:
    with client_of(server) as found:
        yield found


def settings(**changes: Any) -> GenerationConfig:
    return GenerationConfig(**DEFAULTS.model_dump() | changes)


PENALTIES = {"frequency_penalty": 1.5, "presence_penalty": 0.5}
# Request fields, and the settings they mean.
REQUESTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0}, {"method": "greedy"}),
    ({"temperature": 0, "max_tokens": 30}, {"method": "greedy", "max_new_tokens": 30}),
    ({"seed": 7}, {"seed": 7}),
    ({"seed": -1}, {"seed": 2**32 - 1}),
    ({"seed": 8, "temperature": 1.3}, {"seed": 8, "temperature": 1.3}),
    ({"seed": 9, "top_p": 0.5}, {"seed": 9, "top_p": 0.5}),
    ({"seed": 9, "top_p": 0}, {"method": "greedy"}),
    ({"seed": 9, "extra_body": {"top_k": 3}}, {"seed": 9, "method": "combined", "top_k": 3, "min_p": 0.0}),
    ({"seed": 9, "top_p": 1, "extra_body": {"top_k": -1, "min_p": 0.5}}, {"seed": 9, "method": "min_p", "min_p": 0.5}),
    ({"seed": 9, "top_p": 1, "extra_body": {"min_p": 0}}, {"seed": 9, "method": "random"}),
    ({"seed": 9, "extra_body": {"top_k": 0}}, {"seed": 9}),
    ({"temperature": 0, "max_tokens": 30} | PENALTIES, {"method": "greedy", "max_new_tokens": 30} | PENALTIES),
    ({"temperature": 0, "extra_body": {"repetition_penalty": 9}}, {"method": "greedy", "repetition_penalty": 9.0}),
    ({"seed": 10, "stop": "e", "max_tokens": 40}, {"seed": 10, "stop": ["e"], "max_new_tokens": 40}),
    ({"seed": 11, "stop": ["t", " "], "max_tokens": 40}, {"seed": 11, "stop": ["t", " "], "max_new_tokens": 40}),
]


@pytest.mark.parametrize(("fields", "changes"), REQUESTS, ids=[str(fields) for fields, _ in REQUESTS])
def test_completions_equal_generate(model: Model, client: Any, fields: Any, changes: Any) -> None:
    expected = generate(model, settings(prompt="The list of ", **changes))
    answer = client.completions.create(model="tiny", prompt="The list of ", **fields)
    assert answer.object == "text_completion" and answer.model == "tiny"
    assert answer.choices[0].text == expected
    limit = changes.get("max_new_tokens", DEFAULTS.max_new_tokens)
    used = answer.usage
    assert used.total_tokens == used.prompt_tokens + used.completion_tokens
    assert used.prompt_tokens == 1 + len(model.tokenizer.encode_batch(["The list of"])[0])  # the answer has the space
    assert answer.choices[0].finish_reason == ("length" if used.completion_tokens == limit else "stop")

    chunks = list(
        client.completions.create(
            model="tiny", prompt="The list of ", stream=True, stream_options={"include_usage": True}, **fields
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == answer.choices[0].finish_reason
    assert chunks[-1].choices == []
    counts = [(u.prompt_tokens, u.completion_tokens, u.total_tokens) for u in (used, chunks[-1].usage)]
    assert counts[0] == counts[1]
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_completions_equal_chat(model: Model, client: Any) -> None:
    """Turn by turn, with the history kept by the client."""
    session = ChatSession(model, settings(seed=5))
    session.set_system("Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for turn, question in enumerate(("Hello?", "What is <|im_end|> a list?")):
        expected = session.answer(question)
        messages.append({"role": "user", "content": question})
        answer = client.chat.completions.create(model="tiny", messages=messages, seed=5 + turn)
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content.rstrip() == expected
        chunks = list(client.chat.completions.create(model="tiny", messages=messages, seed=5 + turn, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content
        assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
        messages.append({"role": "assistant", "content": expected})


def test_message_forms_that_clients_send(client: Any) -> None:
    """An assistant message with all its empty fields, a developer message, and content in parts."""
    ask = client.chat.completions.create
    first = ask(model="tiny", messages=[{"role": "user", "content": "Hi"}], seed=1, max_completion_tokens=5)
    assert first.usage.completion_tokens <= 5
    parts = [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]
    reply = first.choices[0].message.model_dump()
    before, behind = {"role": "user", "content": "Hi"}, {"role": "user", "content": "And now?"}
    one = ask(model="tiny", messages=[{"role": "developer", "content": "x"}, before, reply, behind], seed=2)
    two = ask(
        model="tiny", messages=[{"role": "system", "content": "x"}, before, reply, behind | {"content": parts}], seed=2
    )
    assert one.choices[0].message == two.choices[0].message


def test_two_hundred_requests_by_sixteen_clients(model: Model, server: RunningServer) -> None:
    """No response is lost or mixed up: each has its own prompt and seed, and a known result."""
    requests = [
        {"prompt": f"def number_{i}(", "seed": i, "temperature": (0, 0.7, 1.2)[i % 3], "max_tokens": 4 + i % 9}
        for i in range(200)
    ]
    expected = [
        generate(
            model,
            settings(
                prompt=a["prompt"],
                seed=a["seed"],
                max_new_tokens=a["max_tokens"],
                **({"temperature": a["temperature"]} if a["temperature"] else {"method": "greedy"}),
            ),
        )
        for a in requests
    ]
    assert len(set(expected)) > 150

    def one_client(number: int) -> dict[int, str]:
        found = {}
        with client_of(server) as client:
            for i in range(number, 200, 16):
                request: dict[str, Any] = {"model": "tiny", **requests[i]}
                if i % 2:
                    found[i] = "".join(c.choices[0].text for c in client.completions.create(stream=True, **request))
                else:
                    found[i] = client.completions.create(**request).choices[0].text
        return found

    with ThreadPoolExecutor(16) as pool:
        found = {i: text for part in pool.map(one_client, range(16)) for i, text in part.items()}
    assert [found[i] for i in range(200)] == expected
    assert server.active_requests() == 0


def test_models_and_unknown_names(client: Any) -> None:
    (only,) = client.models.list().data
    assert (only.id, only.object, only.max_model_len) == ("tiny", "model", 4096)
    assert client.models.retrieve("tiny") == only
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("gpt-5")
    assert raised.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_any_model_name_is_answered_with_a_warning(client: Any, stream: bool) -> None:
    """The headers name the model that answered, and nothing of the request."""
    for name in ("gpt-4o", "x\r\nSet-Cookie: a=b", "é" * 1000, ""):
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "stream": stream}
        raw = client.chat.completions.with_raw_response.create(model=name, **chat)
        assert raw.headers["x-warning"] == 'answered by "tiny", the only model for this path'
        assert "set-cookie" not in raw.headers
        answer = next(iter(raw.parse())) if stream else raw.parse()
        assert answer.model == "tiny"
    assert "x-warning" not in client.completions.with_raw_response.create(model="tiny", prompt="x").headers


def test_the_name_of_a_model_may_have_any_character(model: Model) -> None:
    with run_server(model, name='é"\n') as server, client_of(server) as client:
        headers = client.completions.with_raw_response.create(model="tiny", prompt="x", max_tokens=1).headers
        assert json.loads(headers["x-warning"].removeprefix("answered by ").partition(",")[0]) == 'é"\n'


def test_the_api_key_is_checked(locked_server: RunningServer) -> None:
    with client_of(locked_server, KEY) as authorized, client_of(locked_server, KEY + "x") as unauthorized:
        assert authorized.completions.create(model="tiny", prompt="Hi", max_tokens=1).choices
        with pytest.raises(openai.AuthenticationError):
            unauthorized.completions.create(model="tiny", prompt="Hi", max_tokens=1)


def test_errors_match_openai(client: Any) -> None:
    def error_of(**fields: Any) -> Any:
        with pytest.raises(openai.BadRequestError) as raised:
            client.completions.create(**{"model": "tiny", "prompt": "x"} | fields)
        return raised.value

    error = error_of(prompt="x y " * 4000)
    assert error.code == "context_length_exceeded" and "4096" in error.message
    assert "4000" in error_of(max_tokens=4001).message
    assert error_of(best_of=2).param == "best_of"
    assert error_of(logit_bias={"1": 2}).code == "unsupported_parameter"
    assert error_of(extra_body={"temprature": 1}).code == "unknown_parameter"
    assert error_of(extra_body={"mirostat": 2}).code == "unsupported_parameter"
    assert error_of(extra_body={"top_k": -2}).param == "top_k"
    assert error_of(prompt=["a", "b"]).param == "prompt"
