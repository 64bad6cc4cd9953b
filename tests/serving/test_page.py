"""The chat page in a real browser (headless Chromium), if one is installed."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from anarchobot.inference.model import Model
from anarchobot.serving.app import CHAT_PAGE, Limits
from tests.serving.conftest import KEY, RunningServer, run_server, wait_until

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SLOW = 60_000  # milliseconds, for a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Playwright's own Chromium, or the system's."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
        try:
            browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("no Chromium here: playwright install chromium")
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """`page.complaints` collects console messages and requests to other servers."""
    context = browser.new_context(viewport={"width": 700, "height": 600})
    context.set_default_timeout(SLOW)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request", lambda r: complaints.append(r.url) if not r.url.startswith(("http://127.0.0.1:", "data:")) else None
    )
    page.complaints = complaints
    yield page
    context.close()


@pytest.fixture(scope="module")
def chatty(model: Model) -> Iterator[RunningServer]:
    with run_server(model, Limits(tokens=4000)) as server:
        yield server


def answers(page: Any) -> list[str]:
    return [str(text) for text in page.locator(".assistant:not(.streaming)").all_text_contents()]


def wait_for_answers(page: Any, count: int) -> None:
    wait_until(lambda: len(answers(page)) == count)  # the page's security policy blocks Playwright's wait_for_function


def test_a_conversation(page: Any, chatty: RunningServer) -> None:
    page.goto(chatty.url)
    page.wait_for_selector("#ask:not([hidden])")
    assert page.title() == "tiny"
    assert page.evaluate("document.activeElement.id") == "question"  # ready for typing
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    wait_for_answers(page, 1)
    assert page.locator(".user").all_text_contents() == ["Hello\nthere"]
    assert answers(page)[0]
    page.keyboard.type("And now?")
    page.keyboard.press("Enter")
    wait_for_answers(page, 2)
    turns = page.evaluate("turns")
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert [turn["content"] for turn in turns[1::2]] == answers(page)
    page.click("#new-chat")
    assert page.locator("#talk > *").count() == 0 and page.evaluate("turns") == []
    assert page.complaints == []


def test_messages_are_plain_text(page: Any, chatty: RunningServer) -> None:
    """From the user and from the model, whose answer is replaced in transit here."""
    evil = "<img src=x onerror=\"document.title='gone'\"><script>document.title='gone'</script>"
    event = '{"choices": [{"delta": {"content": %s}, "finish_reason": "stop"}]}'
    stream = f"data: {event % json.dumps(evil)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    page.goto(chatty.url)
    page.fill("#question", evil)
    page.keyboard.press("Enter")
    wait_for_answers(page, 1)
    assert answers(page) == [evil] == page.locator(".user").all_text_contents()
    assert page.locator("#talk img, #talk script").count() == 0
    assert page.title() == "tiny" and page.complaints == []


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_an_answer_can_be_stopped(page: Any, chatty: RunningServer, how: str) -> None:
    def longer(route: Any) -> None:
        route.continue_(post_data=route.request.post_data[:-1] + ', "max_tokens": 4000, "temperature": 0}')

    page.route("**/v1/chat/completions", longer)
    page.goto(chatty.url)
    page.wait_for_selector("#ask:not([hidden])")
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    wait_until(lambda: len(page.locator(".assistant.streaming").text_content()) > 20)
    assert page.locator("#send").is_hidden() and page.locator("#stop").is_visible()
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.click("#stop")
    wait_for_answers(page, 1)
    wait_until(lambda: chatty.worker.active_requests == 0)
    assert len(answers(page)[0]) > 20
    assert page.evaluate("document.activeElement.id") == "question"
    assert page.locator(".note").count() == 0 and page.complaints == []


def test_it_asks_for_the_api_key(page: Any, locked_server: RunningServer) -> None:
    page.goto(locked_server.url)
    page.wait_for_selector("#unlock:not([hidden])")
    page.keyboard.type("not it")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Invalid API key.")
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#ask:not([hidden])")
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    wait_for_answers(page, 1)
    assert all("401" in complaint for complaint in page.complaints)  # logged by the browser itself


def test_the_oldest_turns_are_dropped(page: Any, chatty: RunningServer) -> None:
    """Once the conversation fills half of the 4096-token context window; a question too long by itself is an error."""
    page.goto(chatty.url)
    page.wait_for_selector("#ask:not([hidden])")
    for number in range(3):
        page.fill("#question", f"{number} " + "xy " * 700)
        page.keyboard.press("Enter")
        wait_for_answers(page, number + 1)
    page.wait_for_selector("text=turns that no longer fit")
    assert page.evaluate("turns[0].content").startswith(("1 ", "2 "))
    page.fill("#question", "xy " * 9000)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=max_seq_len is 4096")


def test_the_security_policy_allows_only_the_pages_own_code(chatty: RunningServer) -> None:
    status, headers, body = chatty.request("GET", "/")
    assert status == 200 and body.decode() == CHAT_PAGE.read_text(encoding="utf-8")
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    for tag in ("script", "style"):
        inside = re.search(rf"<{tag}>(.*)</{tag}>", body.decode(), re.DOTALL)
        assert inside is not None
        digest = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert not re.search(rb"https?://|innerHTML|insertAdjacent|eval\(", body)
