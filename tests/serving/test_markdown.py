"""The page's scripts that need no browser: Markdown, compared with markdown-it, and the kept conversations. In Node."""

import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import Any

import pytest
from markdown_it import MarkdownIt

from anarchobot.serving.page import FOLDER

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="Node.js is not installed")
LOAD = """
import { readFileSync } from "node:fs";
const [source, data] = JSON.parse(readFileSync(0, "utf8"));
const script = await import("data:text/javascript;base64," + Buffer.from(source).toString("base64"));
const use = %s;
console.log(JSON.stringify(use(script, data)));
"""


def in_node(script: str, function: str, data: Any = None) -> Any:
    """The result of a JavaScript function of the script's exports and `data`."""
    given = json.dumps([(FOLDER / script).read_text(encoding="utf-8"), data])
    words = [str(NODE), "--input-type=module", "-e", LOAD % function]
    done = subprocess.run(words, input=given, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def trees(texts: list[str]) -> list[Any]:
    """The nodes of each text."""
    found: list[Any] = in_node(
        "markdown.js", "(m, texts) => texts.map(text => m.split(text).map(source => m.parseBlock(source)))", texts
    )
    return found


# --- Markdown

SAMPLES = [
    "Plain text.\nA second line.\n\nA second paragraph.",
    "# One\n## Two ##\n###### Six\n####### no heading\n#hashtag\ntext\n# After text",
    "*em* _em_ **strong** __strong__ ***both*** ~~gone~~ **a *b* c** *a **b** c*",
    "snake_case_name 2 * 3 * 4 5*6*7 ** not ** a_b _c_ \\*not\\* \\\\ 100% * _ **open",
    "`code` ``a ` b`` `` ` `` `*no em*` `open *em* ``x`",
    "[link](http://a.example/x?y=1&z=(2)) [**bold** `c`](https://b.example) <https://c.example/a_b_c>",
    "[text] [a](relative) [b](javascript:alert) ![](x) a](/c)",
    "- one\n- two\n  more\n- three\n\n* other\n\nafter",
    "1. one\n2. two\n   - inner\n   - inner 2\n     1. deep\n3. three",
    "7. seven\n8. eight\n\ntext\n2. not a list\n1. a list",
    "- a\n\n  second paragraph\n\n  ```\n  code\n\n    indented\n  ```\n- b\n-\n- d",
    "> quote\n> more **bold**\n>\n> > inner\n>\n> - item\n\nafter",
    "```python\ndef f(x):\n    return x * 2  # *no em*\n\n```\nafter",
    "~~~\n```\n<b>\n~~~\n````\n```\n````\n```sh\nnever closed\n",
    "before\n```\nx\n```\n---\n***\n- - -\n_ _ _\n-- -",
    "| a | b | c |\n|:--|:-:|--:|\n| 1 | `x` | **y** |\n| 2 | p\\|q | r |\n\nafter | this",
    "text\n\na | b\n--|--\n1 | 2\n\n| no | table |\n| --- |",
    "<b>HTML</b> <script>alert(1)</script> 1 < 2 && a > b",
    "line one  \nline two\\\nline three",
    "一**粗体**二 ÄÖ *é* 👋*👋*",
    "\r\n# CRLF\r\n\r\n- a\r\n- b\r\n",
    "- [ ] task\n- [x] done\n+ other *em\nlazy* line",
    "",
]  # fmt: skip


class Events(HTMLParser):
    """HTML as a list of tags and texts, in our terms."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag == "code" and self.found[-1:] == [("pre", {})] and "class" in given:
            self.found[-1] = ("pre", {"language": str(given.pop("class")).removeprefix("language-")})
        if "style" in given:
            align = str(given.pop("style")).removeprefix("text-align:")
            given |= {} if align == "left" else {"align": align}
        self.found.append((self.ours(tag), given))

    def handle_endtag(self, tag: str) -> None:
        self.found.append("/" + self.ours(tag))

    def ours(self, tag: str) -> str:
        """Headings are a level lower, and GitHub's tag for strikethrough is used."""
        levels = {f"h{level}": f"h{min(level + 1, 6)}" for level in range(1, 7)}
        return (levels | {"s": "del"}).get(tag, tag)

    def handle_data(self, text: str) -> None:
        self.found.append(["text", text])


def events(node: Any) -> list[Any]:
    if isinstance(node, str):
        return [["text", node]]
    tag, properties, *children = node
    properties = {k: str(v) for k, v in properties.items() if (k, v) != ("start", 1)}
    inside = [event for child in children for event in events(child)]
    return [(tag, properties), *inside, "/" + tag]


def normalized(found: list[Any]) -> list[Any]:
    """Without white space at ends and line breaks, which are text here, without ends of empty tags, and without
    paragraphs, which CommonMark has only in lists with blank lines."""
    result: list[Any] = []
    for event in found:
        if event in (("p", {}), "/p", ("br", {}), "/br", "/hr"):
            continue
        if isinstance(event, list):
            text = re.sub(r"\s+", " ", event[1]).strip()
            if not text:
                continue
            if result and isinstance(result[-1], list):
                result[-1] = ["text", f"{result[-1][1]} {text}"]
                continue
            event = ["text", text]
        result.append(event)
    return [event for event in result if event not in (("tbody", {}), "/tbody")]


def test_markdown_is_that_of_commonmark() -> None:
    """With the tables and the strikethrough of markdown-it. Links with foreign targets are compared elsewhere."""
    reference = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    for text, blocks in zip(SAMPLES, trees(SAMPLES), strict=True):
        expected = Events(re.sub(r'<a href="(?!http)[^"]*">(.*?)</a>|<img[^>]*>', r"\1", reference.render(text))).found
        found = [event for block in blocks for event in events(block)]
        if "relative" in text:
            assert [event for event in found if event[0] == "a"] == []
            continue
        assert normalized(found) == normalized(expected), text


def strings(node: Any) -> str:
    """The text of a node, with the targets of links that it does not show, and the languages of code."""
    if isinstance(node, str):
        return node
    inside = "".join(map(strings, node[2:]))
    hidden = node[1].get("href", "")
    return f"{node[1].get('language', '')} {inside}{'' if hidden == inside else hidden} "


def tags(node: Any) -> set[str]:
    return set() if isinstance(node, str) else {node[0]}.union(*map(tags, node[2:]))


def soup(seed: int) -> str:
    draw = random.Random(seed)
    pieces = [
        "a", "word ", " ", "\n", "\n\n", "  ", "*", "**", "_", "`", "```", "\n```py\n", "~~", "[", "](http://u.example)",
        "]", "![", "\n- ", "\n1. ", "\n  - ", "\n> ", "\n# ", "|", "\n|-|-|\n", "\\", "<b>", "<img src=x onerror=y>",
        "http://v.example ", "\n---\n", "\t", "(", ")", "é", "👋", "\n2) ", "<https://w.example>", "[x](javascript:z)",
        "&lt;", "\r\n",
    ]  # fmt: skip
    return "".join(draw.choice(pieces) for _ in range(draw.randrange(1, 60)))


def test_no_letter_is_lost_and_no_tag_is_made_up() -> None:
    """Of random texts. Marks, and the numbers of lists, are what the page shows in another way."""
    texts = [*SAMPLES, *map(soup, range(3000))]
    allowed = {
        "p", "h2", "h3", "h4", "h5", "h6", "hr", "blockquote", "ul", "ol", "li", "pre", "code", "table", "thead",
        "tbody", "tr", "th", "td", "a", "em", "strong", "del",
    }  # fmt: skip
    for text, blocks in zip(texts, trees(texts), strict=True):
        shown = "".join(strings(block) for block in blocks)
        letters = ["".join(filter(str.isalpha, t)) for t in (text, shown)]
        assert letters[0] == letters[1], text
        assert set().union(*map(tags, blocks)) <= allowed


def targets(node: Any) -> list[str]:
    return [] if isinstance(node, str) else sum(map(targets, node[2:]), [node[1]["href"]] if node[0] == "a" else [])


def test_links_lead_to_http_only() -> None:
    evil = (
        "javascript:alert(1)", "JaVaScRiPt:alert(1)", "data:text/html,x", "vbscript:x", "file:///etc/passwd",
        "//evil.example", "/v1/models", "#x", "mailto:a@b.example", "java\tscript:alert(1)", "&#106;avascript:x",
        "http:evil", "ftp://a.example", " javascript:alert(1)", "\x01javascript:alert(1)", "hxxps://a.example",
    )  # fmt: skip
    for blocks in trees([form % url for url in evil for form in ("[x](%s)", "<%s>", "![x](%s)", "[x](<%s>)")]):
        assert targets(["p", {}, *blocks]) == []
    good = ["HTTP://a.example", "https://b.example", "https://c.example/b_c_(d)", "http://d.example/?"]
    (block,) = trees(["[x]({}) <{}> (see {}). ![x]( {} )".format(*good)])[0]
    assert targets(block) == good


def test_while_an_answer_grows_only_its_last_two_blocks_change() -> None:
    """The others have been read aloud."""
    function = """(m, texts) => texts.filter(text => {
        const blocks = Array.from({ length: text.length + 1 }, (_, n) => m.split(text.slice(0, n)));
        return blocks.some((now, n) => n && blocks[n - 1].slice(0, -2).some((block, i) => block !== now[i]));
    })"""
    assert in_node("markdown.js", function, [*SAMPLES, "1. a\n\n2. b\n\n\n3. c", *map(soup, range(200))]) == []


def test_long_and_deep_texts_take_linear_time() -> None:
    """Quadratic time would take minutes for one of these; the time limit is that of `in_node`."""
    marks = (
        "*", "_", "**a ", "*a ", "_a*", "`", "` `` ", "[", "![", "[a](", "[](http://a", "](http://a \"", "> ", "- ",
        "1. ", "~~a", "# #", "|", "a|\n|-\n", "http://a)", "https://", "<http://", "\\", "\n", "- a\n", "  - a\n",
        "```\n", "*_", "[*", "a b\n", "(a)", "]()", " ", "\t- a\n",
    )  # fmt: skip
    texts = [(mark * (100_000 // len(mark)))[:100_000] for mark in marks]
    texts += ["".join(" " * i + "- a\n" for i in range(400)), "[x](http://a" + "(b)" * 30_000, "- " * 500 + "a"]
    sizes = in_node("markdown.js", "(m, texts) => texts.map(t => m.split(t).map(s => m.parseBlock(s)).length)", texts)
    assert len(sizes) == len(texts)


def test_emphasis_nests_50_deep() -> None:
    """What is deeper is text: 20,000 levels would overflow the stack of what reads the nodes aloud and shows them."""
    counts = [2, 50, 52, 20_000]
    texts = ["*a _b " * (count // 2) + "x" + " b_ a*" * (count // 2) for count in counts]
    function = """(m, texts) => {
      const depth = node => typeof node === "string" ? 0 : 1 + Math.max(...node.slice(2).map(depth));
      return texts.map(text => m.parseBlock(text)).map(block => [depth(block) - 1, m.textOf(block).length]); }"""
    expected = [[min(count, 50), 4 * count + 1 + 2 * max(count - 50, 0)] for count in counts]
    assert in_node("markdown.js", function, texts) == expected


def test_what_is_read_aloud_has_no_marks() -> None:
    text = "- **one**\n- two\n  - three\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```\nx = 1\n```"
    found = in_node("markdown.js", "(m, text) => m.split(text).map(s => m.textOf(m.parseBlock(s)))", text)
    assert found == ["one\ntwo\nthree", "a, b\n1, 2", "x = 1"]


# --- Kept conversations

STORAGE = """
const storage = new m.MemoryStorage(), kept = new m.Conversations(storage);
const chat = (text, updated = 0) => {
  const made = m.newConversation();
  made.messages = [{ role: "user", content: text }, { role: "assistant", content: "Yes." }];
  return made;
};
"""


def with_storage(code: str, data: Any = None) -> Any:
    return in_node("conversations.js", f"(m, data) => {{ {STORAGE} {code} }}", data)


def test_conversations_are_kept_renamed_and_deleted() -> None:
    first, second, third = with_storage("""
        const a = chat("First\\nquestion"), b = chat("Second");
        const state = () => kept.read().conversations.map(m.titleOf).sort();
        kept.save(a); kept.save(b);
        const first = state();
        a.title = "Renamed"; a.messages[1].sources = [{ source: "notes.txt:3", text: "..." }]; kept.save(a);
        kept.delete(b.id);
        const [stored] = kept.read().conversations;
        const second = JSON.stringify(stored) === JSON.stringify(a) ? state() : null;
        kept.deleteAll();
        return [first, second, storage.length];""")
    assert (first, second, third) == (["First", "Second"], ["Renamed"], 0)


def test_the_oldest_make_room() -> None:
    """Of more than 100 conversations or two million characters; one that can never fit deletes none."""
    counts, deleted, titles, error = with_storage("""
        Date.now = (now => () => now++)(1);
        storage.setItem("another program's", "x".repeat(3e6));
        const deleted = [], add = made => deleted.push(...kept.save(made).map(m.titleOf));
        for (let i = 0; i < m.MAX_CONVERSATIONS + 2; i++) add(chat(`${i}`));
        const counts = [kept.read().conversations.length];
        add(kept.read().conversations.at(-1));  // saved again: now the newest
        add(chat("long " + "x".repeat(m.MAX_CHARACTERS - 500)));
        counts.push(kept.read().conversations.length);
        const titles = kept.read().conversations.map(c => m.titleOf(c).slice(0, 6));
        let error = null;
        try { kept.save(chat("x".repeat(m.MAX_CHARACTERS))); } catch (raised) { error = raised.message; }
        return [counts, deleted, titles, error];""")
    assert counts[0] == 100 and 1 <= counts[1] <= 4
    assert deleted == [str(n) for n in (0, 1, *range(3, 3 + len(deleted) - 2))]
    assert titles[:2] == ["long x", "2"]
    assert "too long to be kept" in error


def test_damaged_entries_are_counted_and_left_alone() -> None:
    good = {"id": "x", "title": "", "system": "", "messages": [], "density": 0, "updated": 0}
    user = {"role": "user", "content": "?"}
    damaged: list[Any] = [
        None, [], "text", {}, good | {"title": 1}, good | {"system": None}, good | {"messages": {}}, good | {"id": "y"},
        good | {"density": "1"}, good | {"messages": [user]}, good | {"messages": [user, user]},
        good | {"messages": [user, None]},
        good | {"messages": [user, {"role": "assistant", "content": ["a"]}]},
        good | {"messages": [user, {"role": "assistant", "content": "a", "notes": [1]}]},
        good | {"messages": [user, {"role": "assistant", "content": "a", "sources": [{"source": "s"}]}]},
        good | {"messages": [user, {"role": "assistant", "content": "a", "sources": "s"}]},
    ]  # fmt: skip
    code = """return data.map(text => {
        storage.setItem("anarchobot/conversation/x", text);
        const { conversations, damaged } = kept.read();
        return [conversations.length, damaged, storage.getItem("anarchobot/conversation/x") === text];
    })"""
    texts = ["", "{", *map(json.dumps, damaged)]
    assert with_storage(code, [*texts, json.dumps(good)]) == [[0, 1, True]] * len(texts) + [[1, 0, True]]


def test_a_full_storage_is_an_error() -> None:
    message = with_storage("""
        storage.setItem = () => { throw new Error("QuotaExceededError"); };
        try { kept.save(chat("a")); } catch (error) { return error.message; }""")
    assert "storage is full" in message
