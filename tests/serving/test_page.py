"""The chat page in a real browser (headless Chromium), if one is installed."""

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from anarchobot.inference.model import Model
from anarchobot.serving.app import Limits
from anarchobot.serving.page import FILES, FOLDER
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
    return [str(text) for text in page.locator(".assistant:not(.streaming) .answer").all_text_contents()]


def wait_for_answers(page: Any, count: int) -> None:
    """The page's security policy blocks Playwright's wait_for_function."""
    problem = page.get_by_role("alert")
    wait_until(lambda: len(answers(page)) == count or problem.count())
    assert problem.all_text_contents() == []


CHATS = "/v1/chat/completions"
SHOWN = "#ask:not([hidden])"


def answering(page: Any, *answers: Any) -> list[Any]:
    """Answers the page's requests one after the other: with a text, a status, or (text, fields of the events).
    Returns the bodies of the requests."""
    sent: list[Any] = []

    def answer(route: Any) -> None:
        sent.append(json.loads(route.request.post_data))
        given = answers[len(sent) - 1]
        if isinstance(given, int):
            code = "context_length_exceeded" if given == 400 else None
            error = {"error": {"message": f"error {given}", "code": code}}
            return route.fulfill(status=given, json=error)
        text, fields = given if isinstance(given, tuple) else (given, {})
        pieces = re.findall(r"(?s).{1,7}", text)
        events: list[Any] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]} | fields]
        events += [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
        events += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}]
        events += [{"choices": [], "usage": fields.get("usage", {"total_tokens": 9})}]
        stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return route.fulfill(body=stream, content_type="text/event-stream")

    page.route("**" + CHATS, answer)
    return sent


def send_to_server(page: Any) -> None:
    """Sends what is in the field, again while the answer of the random model is empty."""
    count, problem = len(answers(page)) + 1, page.get_by_role("alert")
    for _ in range(20):
        page.keyboard.press("Enter")
        wait_until(lambda: len(answers(page)) == count or problem.count())
        if len(answers(page)) == count:
            return
        assert problem.all_text_contents() == ["(empty answer)"]
    raise AssertionError("no answer")


def ask(page: Any, *questions: str) -> None:
    for question in questions:
        count = len(answers(page))
        page.fill("#question", question)
        page.press("#question", "Enter")
        wait_for_answers(page, count + 1)


def turns(page: Any) -> list[str]:
    return [str(text) for text in page.locator(".message .body").all_inner_texts()]


def press(page: Any, name: str, nth: int = -1) -> None:
    page.get_by_role("button", name=name, exact=True).nth(nth).click()


def test_a_conversation(page: Any, chatty: RunningServer) -> None:
    """With the server itself, and kept when the page is loaded again."""
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if CHATS in request.url else None)
    page.goto(chatty.url)
    page.wait_for_selector(SHOWN)
    assert page.title() == "tiny"
    assert page.evaluate("document.activeElement.id") == "question"  # ready for typing
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    send_to_server(page)
    assert page.locator(".user .body").all_text_contents() == ["Hello\nthere"]
    assert answers(page)[0]
    page.keyboard.type("And now?")
    send_to_server(page)
    assert [message["role"] for message in sent[-1]["messages"]] == ["user", "assistant", "user"]
    assert sent[-1]["messages"][0] == {"role": "user", "content": "Hello\nthere"} == sent[0]["messages"][0]
    shown = turns(page)
    page.reload()
    page.wait_for_selector(SHOWN)
    assert turns(page) == shown
    press(page, "New chat")
    assert page.locator("#talk > *").count() == 0
    assert page.complaints == []


def test_conversations_are_listed_renamed_and_deleted(page: Any, chatty: RunningServer) -> None:
    def listed() -> list[str]:
        return [str(text) for text in page.locator("#list li button:first-child").all_text_contents()]

    page.set_viewport_size({"width": 1000, "height": 600})
    page.on("dialog", lambda dialog: dialog.accept())
    answering(page, "One", "Two", "Three")
    page.goto(chatty.url)
    page.wait_for_selector(SHOWN)
    ask(page, "First")
    press(page, "New chat")
    ask(page, "Second")
    assert listed() == ["Second", "First"]
    page.get_by_role("button", name="First", exact=True).click()
    assert turns(page) == ["First", "One"] and page.locator("#list [aria-current]").all_text_contents() == ["First"]
    ask(page, "More")
    assert listed() == ["First", "Second"]
    press(page, "Rename First")
    page.keyboard.type("New name")
    page.keyboard.press("Enter")
    assert listed() == ["New name", "Second"]
    press(page, "Rename Second")
    page.keyboard.type("Other")
    page.keyboard.press("Escape")
    other = page.context.new_page()
    other.goto(page.url)
    assert turns(other) == turns(page) == ["First", "One", "More", "Three"]
    press(page, "Delete Second")
    wait_until(lambda: other.locator("#list li").count() == 1)  # tabs tell each other
    press(page, "Delete New name")
    assert listed() == [] and turns(page) == [] and "#" not in page.url
    assert page.complaints == []


EVIL = """<img src=x onerror="pwned=1"><script>pwned=1</script>
<svg onload=pwned=1> [a](javascript:pwned=1) ![b](javascript:pwned=1) <javascript:pwned=1> [c](data:text/html,x)
[d](http://a.example" onmouseover="pwned=1) ![e](http://a.example/e.png) <iframe srcdoc="x"></iframe>

- <b>bold</b> `<b>`

| <i>x</i> |
|---|
| <img src=y> |

```"><script>pwned=1</script>
</code></pre><script>pwned=1</script>
```"""


def check_that_nothing_ran(page: Any) -> None:
    assert page.evaluate("typeof pwned") == "undefined"
    assert page.locator("body :is(img, script, iframe, svg, b, i, [onmouseover], [srcdoc])").count() == 0
    links = page.locator("a").all()
    assert links and all(link.get_attribute("href").startswith("http://a.example") for link in links)
    assert all("noopener" in link.get_attribute("rel") for link in links)
    for trick in ("<script>pwned=1</script>", "<svg onload=pwned=1>", "[a](javascript:pwned=1)", "<b>bold</b>"):
        assert trick in page.locator(".answer").first.inner_text()
    assert page.complaints == []


def test_markup_from_the_model_the_user_and_the_knowledge_base_is_text(page: Any, chatty: RunningServer) -> None:
    page.set_viewport_size({"width": 1000, "height": 600})
    answering(page, (EVIL, {"sources": [{"source": EVIL, "text": EVIL}]}))
    page.goto(chatty.url)
    page.wait_for_selector(SHOWN)
    ask(page, EVIL)
    assert page.locator(".user .body").text_content() == EVIL
    assert page.locator(".sources cite, .sources blockquote").all_text_contents() == [EVIL, EVIL]
    assert page.locator("#list li button:first-child").text_content() == EVIL.split("\n")[0][:80]
    check_that_nothing_ran(page)
    page.reload()
    page.wait_for_selector(SHOWN)
    check_that_nothing_ran(page)


def test_markup_in_what_is_stored_is_text(page: Any, chatty: RunningServer) -> None:
    """Also what is damaged, or has fields and values that the page would not write; damaged entries stay."""
    reply = {"role": "assistant", "content": EVIL, "notes": [EVIL], "sources": [{"source": EVIL, "text": EVIL}]}
    reply["reasoning"] = EVIL
    stored = {"id": "a", "title": EVIL, "system": EVIL, "density": 1, "updated": 1, "innerHTML": EVIL, "onclick": EVIL}
    entries = {
        "anarchobot/conversation/a": stored | {"messages": [{"role": "user", "content": EVIL}, reply]},
        "anarchobot/conversation/b": stored | {"id": "b", "messages": [{"role": EVIL, "content": EVIL}] * 2},
        "anarchobot/conversation/c": [EVIL],
        "anarchobot/conversation/e": stored
        | {"id": "e", "messages": [{"role": "user", "content": EVIL}, reply | {"reasoning": {"innerHTML": EVIL}}]},
        "anarchobot/settings": {"temperature": EVIL, "stop": EVIL, "theme": EVIL, "top_p": [EVIL]},
        "anarchobot/other": EVIL,
    }
    page.goto(chatty.url)
    for name, entry in entries.items():
        page.evaluate("([name, text]) => localStorage.setItem(name, text)", [name, json.dumps(entry)])
    page.evaluate("localStorage.setItem('anarchobot/conversation/d', '{')")
    page.goto(chatty.url + "/#a")
    page.reload()
    page.set_viewport_size({"width": 1000, "height": 600})
    page.wait_for_selector(SHOWN)
    assert page.locator(".user .body").text_content() == EVIL and page.locator("#list li").count() == 1
    assert page.locator(".note").text_content() == EVIL
    assert page.locator(".reasoning blockquote").text_content() == EVIL
    assert "Damaged, not shown: 4" in page.locator("#list-note").text_content()
    assert page.evaluate("Object.keys(localStorage).length") == 7
    check_that_nothing_ran(page)


def test_reasoning_is_folded_kept_and_not_sent(page: Any, chatty: RunningServer) -> None:
    first = {"choices": [{"delta": {"role": "assistant", "reasoning_content": f"They ask. {EVIL}"}}]}
    sent = answering(page, ("Four.", first), "Five.")
    page.goto(chatty.url)
    page.wait_for_selector(SHOWN)
    ask(page, "2 + 2?")
    for _ in range(2):
        reasoning = page.locator(".reasoning blockquote")
        assert answers(page) == ["Four."] and not reasoning.is_visible()
        page.get_by_text("Reasoning", exact=True).click()
        assert reasoning.is_visible() and reasoning.text_content() == f"They ask. {EVIL}"
        page.reload()
        page.wait_for_selector(SHOWN)
    ask(page, "2 + 3?")
    assert sent[1]["messages"][1] == {"role": "assistant", "content": "Four."}
    assert page.locator(".reasoning:visible").count() == 1  # the second answer has none
    assert page.evaluate("window.pwned") is None and page.complaints == []


def test_regenerate_and_edit(page: Any, chatty: RunningServer) -> None:
    sent = answering(page, "One", "Two", "Two again", 503, "New one", 503, "Last")
    page.goto(chatty.url)
    page.wait_for_selector(SHOWN)
    ask(page, "First", "Second")
    press(page, "Regenerate this answer")
    page.wait_for_selector("text=Two again")
    assert turns(page) == ["First", "One", "Second", "Two again"]
    press(page, "Regenerate this answer")
    page.wait_for_selector("[role=alert]")
    assert turns(page) == ["First", "One", "Second", "Two again"]  # a failure changes nothing
    press(page, "Edit this message", 0)
    assert page.get_by_label("Edit your message").input_value() == "First"
    assert "3 messages" in page.locator(".edit .hint").text_content()
    page.keyboard.press("Escape")
    assert turns(page) == ["First", "One", "Second", "Two again"]
    press(page, "Edit this message", 0)
    page.get_by_label("Edit your message").fill("First, edited")
    page.keyboard.press("Enter")
    wait_for_answers(page, 1)
    assert turns(page) == ["First, edited", "New one"]
    page.press("#question", "ArrowUp")
    page.keyboard.type("!")
    page.keyboard.press("Enter")
    page.wait_for_selector("[role=alert]")
    assert page.get_by_label("Edit your message").input_value() == "First, edited!"  # not lost
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Last")
    first, one, second = ("user", "First"), ("assistant", "One"), ("user", "Second")
    edited = [("user", "First, edited")]
    assert [[(m["role"], m["content"]) for m in body["messages"]] for body in sent] == [
        [first], [first, one, second], [first, one, second], [first, one, second], edited,
        [("user", "First, edited!")], [("user", "First, edited!")],
    ]  # fmt: skip
    assert turns(page) == ["First, edited!", "Last"]
    assert all("503" in complaint for complaint in page.complaints)  # logged by the browser itself


def test_a_question_without_an_answer_is_not_lost(page: Any, chatty: RunningServer) -> None:
    """Not by an error of the server, nor without a connection."""
    answering(page, 503, "", "Now.")
    page.goto(chatty.url)
    page.wait_for_selector(SHOWN)
    for problem in ("error 503", "(empty answer)"):
        page.fill("#question", "Hello")
        page.press("#question", "Enter")
        page.wait_for_selector(f"[role=alert] >> text={problem}")
        assert page.input_value("#question") == "Hello" and turns(page) == []
    assert page.evaluate("localStorage.length") == 0
    page.unroute("**" + CHATS)
    page.route("**" + CHATS, lambda route: route.abort())
    page.press("#question", "Enter")
    page.wait_for_selector("[role=alert] >> text=cannot be reached")
    page.unroute("**" + CHATS)
    cut = "data: " + json.dumps({"choices": [{"delta": {"content": "Half an"}}]}) + "\n\n"
    page.route("**" + CHATS, lambda route: route.fulfill(body=cut, content_type="text/event-stream"))
    page.press("#question", "Enter")
    page.wait_for_selector("text=The connection was lost.")
    page.reload()
    page.wait_for_selector("text=The connection was lost.")
    assert turns(page) == ["Hello", "Half an"]


def test_settings_are_sent_and_kept(page: Any, chatty: RunningServer) -> None:
    """Without settings, those of the model are used. Wrong ones are not sent."""
    sent = answering(page, "One\n two", "Two", "Three")
    page.goto(chatty.url)
    page.wait_for_selector(SHOWN)
    ask(page, "Hello")
    press(page, "Settings")
    page.get_by_label("System prompt").fill(" Be\nbrief. ")
    page.get_by_label("Temperature").fill("3")
    page.get_by_label("Top-p").fill("0.9")
    page.get_by_label("Maximum tokens").fill("50")
    page.get_by_label("Stop before").fill("END\n\n\\n\\n")
    page.keyboard.press("Escape")
    page.fill("#question", "And now?")
    page.press("#question", "Enter")
    assert page.evaluate("document.activeElement.id") == "temperature" and len(sent) == 1
    page.keyboard.press("Control+A")
    page.keyboard.type("0.3")
    page.keyboard.press("Enter")  # closes
    page.press("#question", "Enter")
    wait_for_answers(page, 2)
    page.reload()
    page.wait_for_selector(SHOWN)
    ask(page, "Again")
    names = ("temperature", "top_p", "max_tokens", "stop")
    chosen = [0.3, 0.9, 50, ["END", "\n\n"]]
    assert [[body[name] for name in names] for body in sent] == [[None] * 4, chosen, chosen]
    first = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "One\n two"}]
    system, last = [{"role": "system", "content": "Be\nbrief."}], [{"role": "user", "content": "And now?"}]
    assert [body["messages"] for body in sent[:2]] == [first[:1], system + first + last]
    assert sent[2]["messages"][0] == system[0]
    assert page.complaints == []


CODE = "Look:\n\n```python\nprint('*x*')\n```\n\n1. *one*\n2. two\n\n[link](http://a.example)"


def test_answers_are_rendered_copied_and_read_aloud(page: Any, chatty: RunningServer) -> None:
    """Each block is read once; an answer is copied as the model wrote it, and code as it is."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answering(page, CODE)
    page.goto(chatty.url)
    page.wait_for_selector(SHOWN)
    ask(page, "Hello")
    assert page.locator("figcaption").text_content() == "pythonCopy"
    assert page.locator(".answer pre code").text_content() == "print('*x*')"
    assert page.locator(".answer ol > li").all_text_contents() == ["one", "two"]
    assert page.locator(".answer em").all_text_contents() == ["one"]
    aloud = page.locator("#spoken > p")
    assert aloud.all_text_contents() == ["Look:", "print('*x*')", "one\ntwo", "link"]
    for name, text in (("Copy this code", "print('*x*')"), ("Copy this answer", CODE), ("Copy this message", "Hello")):
        press(page, name)
        wait_until(lambda text=text: page.evaluate("navigator.clipboard.readText()") == text)
    assert page.get_by_role("button", name="Copied").count() == 3
    assert page.get_by_role("article", name="You").count() == page.get_by_role("article", name="tiny").count() == 1
    assert page.complaints == []


STREAM = """const real = fetch;
window.fetch = async (path, options) => path !== "/v1/chat/completions" ? real(path, options)
  : new Response(new ReadableStream({ start(controller) { window.stream = controller; } }));
window.write = data => stream.enqueue(new TextEncoder().encode(`data: ${data}\\n\\n`));"""


def test_a_growing_answer_is_read_aloud_once(page: Any, chatty: RunningServer) -> None:
    """A block is read when it can't change any more: the last two are read at the end, with the notes."""
    page.add_init_script(STREAM)
    page.goto(chatty.url)
    page.wait_for_selector(SHOWN)
    blocks, aloud = page.locator(".message:last-child .answer > *"), page.locator("#spoken > p")

    def write(text: str, reason: str | None = None) -> None:
        page.evaluate("write", json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": reason}]}))

    for _ in range(2):  # the second time, nothing of the first answer is left
        page.fill("#question", "Hello")
        page.press("#question", "Enter")
        wait_until(lambda: page.locator(".streaming").count())
        for text, shown, read in (
            ("One.\n\nTw", ["One.", "Tw"], []),
            ("o.\n\n- th", ["One.", "Two.", "th"], ["One."]),
            ("ree", ["One.", "Two.", "three"], ["One."]),
        ):
            write(text)
            wait_until(lambda shown=shown: blocks.all_text_contents() == shown)
            assert aloud.all_text_contents() == read
        write("", "length")
        page.evaluate("write", "[DONE]")
        wait_until(lambda: not page.locator(".streaming").count())
        assert aloud.all_text_contents() == ["One.", "Two.", "three", "(truncated at the token limit)"]
    assert page.complaints == []


def test_sources_of_the_knowledge_base_are_shown_and_kept(page: Any, chatty: RunningServer) -> None:
    hits = [{"passage_id": n, "source": f"notes.txt:{n}", "text": f"Passage\n{n}", "score": 1.0} for n in (3, 8)]
    answering(page, ("Four.", {"sources": hits, "dropped_passages": 1}), ("Two.", {"sources": []}))
    page.goto(chatty.url)
    page.wait_for_selector(SHOWN)
    ask(page, "How many?", "And now?")
    for _ in range(2):
        page.get_by_text("2 sources").click()
        assert page.locator(".sources cite").all_inner_texts() == ["notes.txt:3", "notes.txt:8"]
        assert page.locator(".sources blockquote").all_inner_texts() == ["Passage\n3", "Passage\n8"]
        assert page.locator(".note").all_text_contents() == ["(1 passages did not fit in the context window)"]
        page.reload()
        page.wait_for_selector(SHOWN)


def test_dark_mode(page: Any, chatty: RunningServer) -> None:
    """The colors follow the system's or the user's choice, and the text is readable: contrast as in WCAG 2.2."""
    page.goto(chatty.url)
    page.wait_for_selector(SHOWN)

    def is_dark() -> bool:
        colors = [page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")]
        ground, text = (luminance([int(n) for n in re.findall(r"\d+", color)]) for color in colors)
        assert (max(ground, text) + 0.05) / (min(ground, text) + 0.05) > 7
        return ground < text

    assert not is_dark()
    page.emulate_media(color_scheme="dark")
    assert is_dark()
    press(page, "Settings")
    choice = page.get_by_role("checkbox", name="Dark mode")
    assert choice.is_checked()
    choice.uncheck()
    assert not is_dark()
    page.reload()
    assert not is_dark()
    page.emulate_media(color_scheme="light")
    assert not is_dark()
    press(page, "Settings")
    choice.check()
    assert is_dark()
    choice.uncheck()  # as the system's: followed again
    page.emulate_media(color_scheme="dark")
    assert is_dark()


def test_keyboard_and_labels(page: Any, chatty: RunningServer) -> None:
    """Everything that can be operated has a name for screen readers, also what is hidden at first, and is reached by
    Tab in the order in which it is seen."""
    answering(page, CODE)
    page.goto(chatty.url)
    page.wait_for_selector(SHOWN)
    ask(page, "Hello")
    page.focus("#show-chats")
    reached = []
    for _ in range(12):
        reached.append(page.evaluate("(e => e.id || e.ariaLabel || e.textContent)(document.activeElement)"))
        page.keyboard.press("Tab")
    expected = ["show-chats", "show-settings", "new-chat", "talk", "Copy this message", "Edit this message"]
    expected += ["Copy this code", "print('*x*')", "link", "Copy this answer", "Regenerate this answer", "question"]
    assert reached == expected
    page.keyboard.press("Control+/")
    assert page.locator("#settings").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#settings").is_hidden()
    press(page, "Chats")
    assert page.get_by_role("button", name="Chats").get_attribute("aria-expanded") == "true"
    page.keyboard.press("Escape")
    assert page.locator("#chats").is_hidden()
    page.keyboard.press("Control+Shift+O")
    assert turns(page) == [] and page.evaluate("document.activeElement.id") == "question"
    page.evaluate("document.querySelectorAll('[hidden]').forEach(e => e.hidden = false); settings.showModal()")
    fields = page.locator("input, textarea, button, nav, dialog").all()
    named = """e => e.tagName === 'BUTTON' ? e.innerText || e.ariaLabel : e.ariaLabel || e.labels?.length
        || document.getElementById(e.getAttribute('aria-labelledby'))"""
    assert len(fields) == 21 and all(field.evaluate(named) for field in fields)


@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_is_wider_than_the_window(page: Any, chatty: RunningServer, width: int) -> None:
    """Long lines of code and tables scroll by themselves."""
    wide = "x" * 300
    text = f"{wide}\n\n```\n{wide}\n```\n\n|{wide}|{wide}|\n|-|-|\n\n- `{wide}`\n\n# {wide}"
    answering(page, (text, {"sources": [{"source": wide, "text": wide}]}))
    page.set_viewport_size({"width": width, "height": 600})
    page.goto(chatty.url)
    page.wait_for_selector(SHOWN)
    ask(page, wide)
    page.locator(".sources summary").click()
    for outer in ("document.documentElement", "document.querySelector('#talk')"):
        assert page.evaluate(f"{outer}.scrollWidth <= {outer}.clientWidth")
    scrolled = "name => (e => (e.scrollLeft = 9, e.scrollLeft))(document.querySelector(`.answer ${name}`))"
    assert [page.evaluate(scrolled, name) for name in ("pre", ".table")] == [9, 9]


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
    page.wait_for_selector(SHOWN)
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    wait_until(lambda: len(page.locator(".assistant.streaming .answer").text_content()) > 20)
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
    page.wait_for_selector(SHOWN)
    page.keyboard.type("Hello")
    send_to_server(page)
    assert all("401" in complaint for complaint in page.complaints)  # logged by the browser itself


def test_the_oldest_turns_are_not_sent(page: Any, chatty: RunningServer) -> None:
    """Once they fill half of the 4096-token context window, by the last answer's tokens, or do not fit; they stay on
    screen. A question that does not fit alone is an error."""
    usage = {"usage": {"total_tokens": 1500}}
    sent = answering(page, ("One", usage), ("Two", usage), ("Three", {"usage": {"total_tokens": 9}}), 400, 400, "Four")
    page.goto(chatty.url)
    page.wait_for_selector(SHOWN)
    ask(page, *(f"{number} " + "xy " * 100 for number in range(4)))
    assert [[message["content"][0] for message in body["messages"]] for body in sent] == [
        ["0"], ["1"], ["2"], ["0", "O", "1", "T", "2", "T", "3"], ["1", "T", "2", "T", "3"], ["2", "T", "3"]
    ]  # fmt: skip
    notes = [f"(the first {count} messages no longer fit in the context window)" for count in (2, 4, 4)]
    assert page.locator(".note").all_text_contents() == notes
    assert [turn[0] for turn in page.locator(".user .body").all_text_contents()] == ["0", "1", "2", "3"]
    page.unroute("**" + CHATS)
    press(page, "New chat")
    page.fill("#question", "xy " * 9000)
    page.keyboard.press("Enter")
    page.wait_for_selector("[role=alert] >> text=max_seq_len is 4096")
    assert page.input_value("#question") == ("xy " * 9000).strip()


def test_the_security_policy_allows_only_the_servers_own_files(page: Any, locked_server: RunningServer) -> None:
    """Each file is served by name, also where a key is needed. No string becomes HTML or a script."""
    for path, (name, media_type) in FILES.items():
        status, headers, body = locked_server.request("GET", path)
        assert status == 200 and body == (FOLDER / name).read_bytes()
        assert headers["content-type"].startswith(media_type) and headers["x-content-type-options"] == "nosniff"
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert not re.search(rb"<script>|<style|style=|innerHTML|insertAdjacent|document\.write|eval\(", body)
    assert {name for name, _ in FILES.values()} == {file.name for file in FOLDER.iterdir()}
    page.goto(locked_server.url)
    write = "(() => { try { document.body.innerHTML = '<b>x</b>'; return 'written' } catch (e) { return e.name } })()"
    assert page.evaluate(write) == "TypeError"
