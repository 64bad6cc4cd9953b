"""Reads PDF, DOCX, EPUB, HTML and PPTX files with the packages of the extra `documents`. Each file is one document.

Lists and tables become Markdown, and so do headings except in web pages; PDF files mark none of them. Of a web page,
only the main text is kept. Images and link targets are left out. The same file gives the same text; nothing is
downloaded.
"""

import logging
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anarchobot.data.sources.files import EmptyFile, UnreadableFile, lower_suffix

# DOCX, EPUB and PPTX files are archives. XML takes up to 200 times its size in memory once it is parsed.
MAX_EXPANSION = 2**24  # bytes by which an archive may grow; images hardly do
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # an Office file with a password is wrapped in this format
_RIGHTS = {"META-INF/rights.xml", "META-INF/sinf.xml", "META-INF/license.lcpl"}  # in an EPUB file with DRM
_MARKDOWN = {"strip": ["a", "img"], "escape_asterisks": False, "escape_underscores": False}
_SLIDE_MARKS = re.compile(r"<!-- Slide number: \d+ -->\n?|!\[[^\]]*\]\([^)]*\)\n?")  # also the names of images


def read_text(path: Path) -> str:
    """Raises EmptyFile; UnreadableFile when the file is damaged, encrypted, too large or has no text; OSError."""
    if not path.stat().st_size:
        raise EmptyFile(f"{path}: the file is empty")
    suffix = lower_suffix(path)
    for package in ("pypdf", "trafilatura"):
        logging.getLogger(package).setLevel(logging.CRITICAL)  # they report details of damage that they can read past
    try:
        with warnings.catch_warnings(action="ignore"):
            text = _READERS[suffix](path)
    except (OSError, UnreadableFile):
        raise
    except Exception as error:  # these packages raise errors of any type for damaged files
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnreadableFile(
            path, f"damaged {suffix} files", f"damaged or not a {suffix} file ({reason}): save it again"
        ) from error
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "")
    if not text or text.isspace():
        advice = "if it is a scan, recognize its text first, for example with ocrmypdf" if suffix == ".pdf" else ""
        raise UnreadableFile(path, f"{suffix} files without text", f"no text found{advice and ': ' + advice}")
    return text


def _read_pdf(path: Path) -> str:
    """pypdf limits what a compressed stream expands to."""
    from pypdf import PdfReader
    from pypdf.errors import FileNotDecryptedError

    try:
        with PdfReader(path) as reader:
            return "\n\n".join(page.extract_text() for page in reader.pages)
    except FileNotDecryptedError as error:
        raise _encrypted(path) from error


def _read_html(path: Path) -> str:
    from trafilatura import extract

    # The format "markdown" would have a backslash before each _, * and <.
    return extract(path.read_bytes(), output_format="txt", include_comments=False) or ""


def _read_archive(path: Path) -> str:
    """By format instead of through `MarkItDown`, which guesses the format from the content."""
    from markitdown import StreamInfo
    from markitdown.converters import DocxConverter, EpubConverter, PptxConverter

    with path.open("rb") as file:
        if file.read(len(_OLE)) == _OLE:
            raise _encrypted(path)
    with zipfile.ZipFile(path) as archive:
        if _RIGHTS.intersection(archive.namelist()):
            raise _encrypted(path)
        grows = sum(member.file_size - member.compress_size for member in archive.infolist())
    if grows > MAX_EXPANSION:
        problem = f"expands by {grows:,} bytes, more than {MAX_EXPANSION:,}: split it"
        raise UnreadableFile(path, f"{lower_suffix(path)} files that expand too much", problem)
    converters: dict[str, Any] = {".docx": DocxConverter, ".epub": EpubConverter, ".pptx": PptxConverter}
    with path.open("rb") as file:
        text: str = converters[lower_suffix(path)]().convert(file, StreamInfo(), **_MARKDOWN).markdown
    return _SLIDE_MARKS.sub("", text) if lower_suffix(path) == ".pptx" else text


def _encrypted(path: Path) -> UnreadableFile:
    return UnreadableFile(path, f"encrypted {lower_suffix(path)} files", "encrypted: save it without a password")


_READERS: dict[str, Callable[[Path], str]] = {
    ".pdf": _read_pdf,
    ".html": _read_html,
    ".htm": _read_html,
    ".docx": _read_archive,
    ".epub": _read_archive,
    ".pptx": _read_archive,
}
