"""The texts of the benchmarks (benchmarks/corpora.py), downloaded from a server on loopback."""

import hashlib
import importlib
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
corpora: Any = importlib.import_module("corpora")

BODY = "<front><p>no</p></front><body><p>Ein <hi>W</hi>ort\n da</p></body>"
TEI = f'<TEI xmlns="http://www.tei-c.org/ns/1.0"><text>{BODY}</text></TEI>'
FILES = {"a/b/one.txt": "one\r\nline\r\n", "a/b/two.xml": TEI}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    class Files(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(FILES[self.path[1:]].encode())

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    digests = {path: hashlib.sha256(content.encode()).hexdigest() for path, content in FILES.items()}
    catalog = {
        "text/one.txt": {"form": "text", "sources": {"a/b/one.txt": digests["a/b/one.txt"]}},
        "tei.txt": {"form": "tei", "sources": {"a/b/two.xml": digests["a/b/two.xml"]}},
        "changed.txt": {"form": "text", "sources": {"a/b/one.txt": "0" * 64}},
    }
    url = f"http://127.0.0.1:{server.server_port}/"
    for name, value in {"CATALOG": catalog, "DOWNLOADED": tmp_path / "texts", "HOST": url}.items():
        monkeypatch.setattr(corpora, name, value)
    yield url
    server.shutdown()
    server.server_close()


def test_texts_are_downloaded_once_and_converted(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, tei = corpora.find(None, "text/one.txt", "tei.txt")
    assert one.read_bytes() == b"one\nline\n"
    assert tei.read_text(encoding="utf-8") == "Ein Wort da\n"
    monkeypatch.setattr(corpora, "HOST", "http://127.0.0.1:9/")  # where nothing listens
    assert corpora.find(None, "text/one.txt") == [one]
    with pytest.raises(SystemExit, match=r"^http://127\.0\.0\.1:9/a/b/one\.txt: can't download it: .*refused"):
        corpora.find(None, "changed.txt")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("changed.txt", "a/b/one.txt: other content than expected (SHA-256)"),
        ("no such.txt", "no such.txt: can't be downloaded"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line_and_leaves_nothing(host: str, name: str, problem: str) -> None:
    with pytest.raises(SystemExit) as exit:
        corpora.find(None, name)
    assert problem in str(exit.value.code) and "--data" in str(exit.value.code) and "\n" not in str(exit.value.code)
    assert [path for path in corpora.DOWNLOADED.rglob("*") if path.is_file()] == []


def test_a_folder_of_ones_own_is_read_and_its_missing_files_named(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("own")
    assert corpora.find(tmp_path, "one.txt") == [tmp_path / "one.txt"]
    with pytest.raises(SystemExit, match=r"two\.txt: no such file"):
        corpora.find(tmp_path, "one.txt", "two.txt")


def test_every_source_is_pinned_and_every_form_known() -> None:
    for text in corpora.CATALOG.values():
        assert text["form"] in corpora.FORMS
        for source, digest in text["sources"].items():
            assert [len(part) for part in (source.split("/")[2], digest)] == [40, 64]
