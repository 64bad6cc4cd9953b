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


def test_settings_are_sent_and_answers_copied(page: Any, chatty: RunningServer) -> None:
    """Without settings, those of the model are used. A wrong temperature is not sent."""
    sent: list[dict[str, Any]] = []
    stream = 'data: {"choices": [{"delta": {"content": "One\\n two"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'

    def answer(route: Any) -> None:
        sent.append(json.loads(route.request.post_data))
        route.fulfill(body=stream, content_type="text/event-stream")

    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.route("**/v1/chat/completions", answer)
    page.goto(chatty.url)
    question = page.get_by_role("textbox", name="Your message")
    question.fill("Hello")
    question.press("Enter")
    wait_for_answers(page, 1)
    page.get_by_text("Settings").click()
    page.get_by_label("System prompt").fill(" Be\nbrief. ")
    temperature = page.get_by_label("Temperature")
    temperature.fill("3")
    question.fill("And now?")
    question.press("Enter")
    assert page.evaluate("document.activeElement.id") == "temperature" and len(sent) == 1
    page.get_by_text("Settings").click()
    temperature.evaluate("field => field.value = '0.3'")
    question.press("Enter")
    wait_for_answers(page, 2)
    first, second = [{"role": "user", "content": "Hello"}], [{"role": "assistant", "content": "One\n two"}]
    system, last = [{"role": "system", "content": "Be\nbrief."}], [{"role": "user", "content": "And now?"}]
    assert [body["messages"] for body in sent] == [first, system + first + second + last]
    assert [body["temperature"] for body in sent] == [None, 0.3]
    page.get_by_role("button", name="Copy this answer").first.click()
    wait_until(lambda: page.evaluate("navigator.clipboard.readText()") == "One\n two")
    assert page.get_by_role("button", name="Copied").count() == 1
    assert page.get_by_role("group", name="You").count() == page.get_by_role("group", name="tiny").count() == 2
    assert page.complaints == []


def test_dark_mode_and_labels(page: Any, chatty: RunningServer) -> None:
    """The colors follow the system's, and the text is readable in both: contrast as in WCAG 2.2. Everything that can
    be operated has a name for screen readers, also what is hidden at first."""
    page.goto(chatty.url)
    page.wait_for_selector("#ask:not([hidden])")
    light = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        style = "getComputedStyle(document.body)"
        colors = [page.evaluate(f"{style}.{name}") for name in ("backgroundColor", "color")]
        ground, text = (luminance([int(n) for n in re.findall(r"\d+", color)]) for color in colors)
        light[scheme] = ground > text
        assert (max(ground, text) + 0.05) / (min(ground, text) + 0.05) > 7
    assert light == {"light": True, "dark": False}
    page.evaluate("document.querySelectorAll('[hidden]').forEach(e => e.hidden = false); settings.open = true")
    fields = page.locator("input, textarea, button").all()
    assert len(fields) == 8
    named = "field => field.tagName === 'BUTTON' ? field.innerText : field.ariaLabel || field.labels.length"
    assert all(field.evaluate(named) for field in fields)


def luminance(color: list[int]) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


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
