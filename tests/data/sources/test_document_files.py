"""PDF, DOCX, EPUB, HTML and PPTX files become text. The files are written here, byte by byte or as XML."""

import zipfile
import zlib
from pathlib import Path

import pytest

from anarchobot.config.schema import DataConfig, KnowledgeBaseConfig
from anarchobot.data.sources import files
from anarchobot.data.sources.document_files import MAX_EXPANSION
from anarchobot.knowledge.knowledge_base import KnowledgeBase, add_files
from tests.data.sources.reading import problem, read

W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
A = 'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main"'
P = 'xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main"'
R = 'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"'
RELATIONSHIPS = "http://schemas.openxmlformats.org/package/2006/relationships"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
TYPES = "application/vnd.openxmlformats-officedocument"

pypdf = pytest.importorskip("pypdf")
pytest.importorskip("markitdown")
pytest.importorskip("trafilatura")


def zipped(path: Path, parts: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


def office(path: Path, main: str, content_type: str, parts: dict[str, str], others: dict[str, str]) -> Path:
    """`others`: content types of further parts."""
    overrides = {main: content_type, **others}
    types = "".join(f'<Override PartName="/{name}" ContentType="{TYPES}.{kind}"/>' for name, kind in overrides.items())
    default = '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    content_types = "http://schemas.openxmlformats.org/package/2006/content-types"
    return zipped(
        path,
        {
            "[Content_Types].xml": f'<Types xmlns="{content_types}">{default}{types}</Types>',
            "_rels/.rels": relationships("officeDocument", main),
            **parts,
        },
    )


def relationships(kind: str, target: str) -> str:
    relationship = f'<Relationship Id="rId1" Type="{OFFICE}/{kind}" Target="{target}"/>'
    return f'<Relationships xmlns="{RELATIONSHIPS}">{relationship}</Relationships>'


def docx(path: Path, body: str) -> Path:
    document = f"<w:document {W}><w:body>{body}</w:body></w:document>"
    kind = "wordprocessingml.document.main+xml"
    return office(path, "word/document.xml", kind, {"word/document.xml": document}, {})


def paragraph(text: str) -> str:
    return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"


def pptx(path: Path, *texts: str) -> Path:
    shapes = "".join(
        f'<p:sp><p:nvSpPr><p:cNvPr id="{i}" name="s{i}"/><p:cNvSpPr txBox="1"/><p:nvPr/></p:nvSpPr><p:spPr/>'
        f"<p:txBody><a:bodyPr/><a:p><a:r><a:t>{text}</a:t></a:r></a:p></p:txBody></p:sp>"
        for i, text in enumerate(texts, start=2)
    )
    group = '<p:nvGrpSpPr><p:cNvPr id="1" name=""/><p:cNvGrpSpPr/><p:nvPr/></p:nvGrpSpPr><p:grpSpPr/>'
    slides = '<p:sldIdLst><p:sldId id="256" r:id="rId1"/></p:sldIdLst>'
    parts = {
        "ppt/presentation.xml": f"<p:presentation {P} {A} {R}>{slides}</p:presentation>",
        "ppt/_rels/presentation.xml.rels": relationships("slide", "slides/slide1.xml"),
        "ppt/slides/slide1.xml": f"<p:sld {P} {A}><p:cSld><p:spTree>{group}{shapes}</p:spTree></p:cSld></p:sld>",
    }
    kind = "presentationml.presentation.main+xml"
    return office(path, "ppt/presentation.xml", kind, parts, {"ppt/slides/slide1.xml": "presentationml.slide+xml"})


def epub(path: Path, *chapters: str, **others: str) -> Path:
    """The chapters are in the order of the spine, which is not the one of their names."""
    names = [f"c{len(chapters) - i}.xhtml" for i in range(len(chapters))]
    items = "".join(f'<item id="{name}" href="{name}"/>' for name in sorted(names))
    spine = "".join(f'<itemref idref="{name}"/>' for name in names)
    container = '<container><rootfiles><rootfile full-path="book.opf"/></rootfiles></container>'
    page = '<?xml version="1.0" encoding="utf-8"?><html xmlns="http://www.w3.org/1999/xhtml"><body>{}</body></html>'
    return zipped(
        path,
        {
            "META-INF/container.xml": container,
            "book.opf": f"<package><manifest>{items}</manifest><spine>{spine}</spine></package>",
            **{name: page.format(chapter) for name, chapter in zip(names, chapters, strict=True)},
            **others,
        },
    )


def pdf(path: Path, *pages: bytes) -> Path:
    """Each page is a compressed content stream."""
    first = 4  # objects 1 to 3: catalog, pages, font
    kids = b" ".join(b"%d 0 R" % (first + 2 * i) for i in range(len(pages)))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Count %d/Kids[%s]>>" % (len(pages), kids),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
    ]
    for i, page in enumerate(pages):
        contents = zlib.compress(page)
        at = first + 2 * i + 1
        objects.append(
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 300]/Resources<</Font<</F 3 0 R>>>>/Contents %d 0 R>>" % at
        )
        objects.append(b"<</Filter/FlateDecode/Length %d>>stream\n%s\nendstream" % (len(contents), contents))
    raw, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(raw))
        raw += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    trailer = b"xref\n0 %d\n0000000000 65535 f \n%strailer<</Size %d/Root 1 0 R>>\n" % (size, table, size)
    path.write_bytes(raw + trailer + b"startxref\n%d\n%%%%EOF" % len(raw))
    return path


def line(text: str) -> bytes:
    return b"BT /F 12 Tf 20 200 Td (%s) Tj ET\n" % text.encode("cp1252")


def encrypt(source: Path, path: Path, password: str) -> None:
    writer = pypdf.PdfWriter(clone_from=source)
    writer.encrypt(password, "owner", algorithm="AES-256")
    writer.write(path)


NAVIGATION = "<nav><a href='/'>Home</a> <a href='/about'>About us</a></nav>"
ARTICLE = "<article><h1>Beavers</h1><p>{}</p><ul><li>bark</li></ul></article>".format("Beavers build dams. " * 8)
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
        f"# Beavers {'Beavers build dams. ' * 8}- bark",
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
