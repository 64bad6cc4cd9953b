"""PDF, DOCX, EPUB, HTML and PPTX files become text."""

import zlib
from pathlib import Path

import pytest

from anarchobot.config.schema import DataConfig, KnowledgeBaseConfig
from anarchobot.data.sources import files
from anarchobot.data.sources.document_files import MAX_EXPANSION
from anarchobot.knowledge.knowledge_base import KnowledgeBase, add_files
from tests.data.sources.document_formats import docx, epub, line, paragraph, pdf, pptx, zipped
from tests.data.sources.reading import problem, read

pypdf = pytest.importorskip("pypdf")
pytest.importorskip("markitdown")
pytest.importorskip("trafilatura")


def encrypt(source: Path, path: Path, password: str) -> None:
    writer = pypdf.PdfWriter(clone_from=source)
    writer.encrypt(password, "owner", algorithm="AES-256")
    writer.write(path)


NAVIGATION = "<nav><a href='/'>Home</a> <a href='/about'>About us</a></nav>"
ARTICLE = "<article><h1>Beavers</h1><p>{}</p><ul><li>bark_1 * &lt;2</li></ul></article>".format(
    "Beavers build dams. " * 8
)
FOOTER = "<footer>All rights reserved</footer><script>track()</script>"


def test_every_format_is_read(tmp_path: Path) -> None:
    """A PDF file with an owner's password can be opened by anyone."""
    pdf(tmp_path / "a.pdf", line("Größe: 5 €"), line("page two"))
    encrypt(tmp_path / "a.pdf", tmp_path / "b.pdf", "")
    cell = f"<w:tc>{paragraph('1')}</w:tc><w:tc>{paragraph('2')}</w:tc>"
    heading = '<w:p><w:pPr><w:pStyle w:val="Heading1"/></w:pPr><w:r><w:t>Title</w:t></w:r></w:p>'
    body = heading + paragraph("x_1 * ŷ &lt; 東京") + f"<w:tbl><w:tr>{cell}</w:tr><w:tr>{cell}</w:tr></w:tbl>"
    docx(tmp_path / "c.docx", body)
    epub(tmp_path / "d.epub", "<h2>One</h2><p>Çà <a href='x'>et</a> là</p>", "<p>Two<img src='i.png'/></p>")
    pptx(tmp_path / "e.PPTX", "first", "second &amp; third")
    page = f"<html><head><title>T</title></head><body>{NAVIGATION}{ARTICLE}{FOOTER}</body></html>"
    (tmp_path / "f.html").write_text(page)
    (tmp_path / "g.htm").write_bytes("<html><body><p>Grüße</p></body></html>".encode())
    texts, counts = read(tmp_path)
    assert not counts.details()
    assert [" ".join(text.split()) for text in texts] == [
        "Größe: 5 € page two",
        "# Title x_1 * ŷ < 東京 | | | | --- | --- | | 1 | 2 | | 1 | 2 |",
        "## One Çà et là Two",
        "first second & third",
        f"Beavers {'Beavers build dams. ' * 8}- bark_1 * <2",
        "Grüße",
    ]
    assert counts.read == 7 and counts.duplicates == 1
    assert texts[0] == "Größe: 5 €\n\npage two"


def unreadable(folder: Path) -> dict[str, str]:
    """Writes files that can't be read. Returns a part of each file's message."""
    folder.mkdir(exist_ok=True)
    pdf(folder / "text.pdf", line("text"))
    raw = (folder / "text.pdf").read_bytes()
    encrypt(folder / "text.pdf", folder / "password.pdf", "secret")
    (folder / "text.pdf").unlink()
    (folder / "damaged.pdf").write_bytes(raw[:200])
    pdf(folder / "scan.pdf", b"", b"")
    pdf(folder / "bomb.pdf", line("a") + b" " * 2**20)
    blanks = zlib.compressobj(1)
    huge = b"".join(blanks.compress(b" " * 2**20) for _ in range(80)) + blanks.flush()
    stream = zlib.compress(line("a") + b" " * 2**20)
    bomb = (folder / "bomb.pdf").read_bytes()
    bomb = bomb.replace(b"/Length %d" % len(stream), b"/Length %d" % len(huge)).replace(stream, huge)
    (folder / "bomb.pdf").write_bytes(bomb)
    whole = docx(folder / "damaged.docx", paragraph("text")).read_bytes()
    (folder / "damaged.docx").write_bytes(whole[: len(whole) // 2])
    (folder / "password.docx").write_bytes(bytes.fromhex("d0cf11e0a1b11ae1") + bytes(512))
    docx(folder / "bomb.docx", paragraph("text") + " " * (MAX_EXPANSION + 2**20))
    docx(folder / "blank.docx", paragraph(" "))
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 10))
    page = f'<!DOCTYPE x [<!ENTITY e0 "lol">{entities}]><x>&e9;</x>'
    epub(folder / "entities.epub", "<p>x</p>", **{"META-INF/container.xml": page})
    epub(folder / "rights.epub", "<p>\x9f\x8e</p>", **{"META-INF/rights.xml": "<rights/>"})
    zipped(folder / "other.pptx", {"a.txt": "no slides"})
    (folder / "none.html").write_bytes(bytes(range(256)))
    return {
        "password.pdf": "encrypted: save it without a password",
        "damaged.pdf": "damaged or not a .pdf file (",
        "scan.pdf": "no text found: if it is a scan, recognize its text first",
        "bomb.pdf": "damaged or not a .pdf file (LimitReachedError",
        "damaged.docx": "damaged or not a .docx file (BadZipFile",
        "password.docx": "encrypted: save it without a password",
        "bomb.docx": f"more than {MAX_EXPANSION:,}: split it",
        "blank.docx": "no text found",
        "entities.epub": "damaged or not a .epub file (EntitiesForbidden",
        "rights.epub": "encrypted: save it without a password",
        "other.pptx": "damaged or not a .pptx file (",
        "none.html": "no text found",
    }


def test_unreadable_file_is_an_error_if_named_and_counted_in_a_folder(tmp_path: Path) -> None:
    messages = unreadable(tmp_path / "files")
    (tmp_path / "files" / "good.txt").write_text("good")
    for name, message in messages.items():
        assert message in problem(tmp_path / "files" / name), name
    texts, counts = read(tmp_path / "files")
    assert texts == ["good"] and counts.read == 1
    assert sorted(Path(path).name for path, _ in counts.unread) == sorted(messages)
    docx_files = f"encrypted .docx files not read: 1 ({tmp_path / 'files' / 'password.docx'})"
    assert docx_files in counts.details()


def test_empty_files_are_counted_with_the_others(tmp_path: Path) -> None:
    for name in ("a.pdf", "b.docx", "c.html"):
        (tmp_path / name).touch()
    (tmp_path / "d.txt").write_text("text")
    texts, counts = read(tmp_path)
    assert texts == ["text"] and counts.empty_files == 3 and not counts.unread
    assert problem(tmp_path / "a.pdf") == f"{tmp_path / 'a.pdf'}: the file is empty"


def test_knowledge_base_counts_unreadable_files_of_a_folder(tmp_path: Path) -> None:
    messages = unreadable(tmp_path / "files")
    pdf(tmp_path / "files" / "good.pdf", line("a beaver builds dams"))
    with KnowledgeBase(tmp_path / "kb.db", KnowledgeBaseConfig(), create=True) as base:
        found = files.find([str(tmp_path / "files")])
        named = tmp_path / "files" / "scan.pdf"
        result = add_files(base, found, [str(tmp_path / "files"), str(named)], DataConfig(), log=lambda line: None)
        assert [hit.source for hit in base.search("beaver")] == [str(tmp_path / "files" / "good.pdf")]
    assert result.added == [str(tmp_path / "files" / "good.pdf")]
    assert len(result.failed) == 1 and result.failed[0].startswith(f"{named}: no text found")
    assert sorted(Path(path).name for path, _ in result.counts.unread) == sorted(messages.keys() - {"scan.pdf"})


def test_text_that_is_not_valid_unicode_is_replaced(tmp_path: Path) -> None:
    """The font of a PDF file may map its characters to anything."""
    raw = pdf(tmp_path / "a.pdf", line("A b")).read_bytes()
    codes = b"1 begincodespacerange <00> <FF> endcodespacerange 1 beginbfchar <41> <D800> endbfchar"
    cmap = b"begincmap %s endcmap" % codes
    table = b"9 0 obj\n<</Length %d>>stream\n%s\nendstream\nendobj\nxref\n" % (len(cmap), cmap)
    raw = raw.replace(b"/WinAnsiEncoding>>", b"/WinAnsiEncoding/ToUnicode 9 0 R>>").replace(b"xref\n", table, 1)
    (tmp_path / "a.pdf").write_bytes(raw)
    assert read(tmp_path / "a.pdf")[0] == ["\ufffd b"]
