"""Small PDF, DOCX, EPUB and PPTX files, written byte by byte or as XML."""

import zipfile
import zlib
from pathlib import Path

W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
A = 'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main"'
P = 'xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main"'
R = 'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"'
RELATIONSHIPS = "http://schemas.openxmlformats.org/package/2006/relationships"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
TYPES = "application/vnd.openxmlformats-officedocument"


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
