"""A server on loopback that speaks the part of the Hugging Face Hub's API that huggingface_hub downloads and uploads
with."""

import base64
import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secretsecretsecretsecretsecretsecret"


@dataclass
class Repo:
    """`revisions` maps branches and tags to commits, `commits` to the folder with a commit's files. `gated`: files need
    TOKEN; `huge`: weights claim to have an exabyte. `messages` are those of uploaded commits."""

    revisions: dict[str, str]
    commits: dict[str, Path]
    gated: bool = False
    huge: bool = False
    private: bool = False
    messages: list[str] = field(default_factory=list)


@dataclass
class FakeHub:
    """`requests` has the method and path of each request, `ranges` the Range headers. The next transfer of the file
    `broken` stops halfway; with `stall`, the connection is closed only when `resume` is set. `refusal`: the status and
    message of every answer, or of the requests that match the pattern `refused`. `large` has the content of files
    that were uploaded by their digest."""

    url: str
    uploads: Path
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    broken: str = ""
    stall: bool = False
    refusal: tuple[int, str] | None = None
    refused: str = ".*"
    large: dict[str, bytes] = field(default_factory=dict)
    stalled: threading.Event = field(default_factory=threading.Event)
    resume: threading.Event = field(default_factory=threading.Event)

    def add(self, name: str, folder: Path, **options: bool) -> str:
        """Serves the files of `folder` as revision main of `name`; returns its commit."""
        self.repos[name] = Repo({}, {}, **options)
        return self.move_main(name, folder)

    def move_main(self, name: str, folder: Path) -> str:
        """Publishes the files of `folder` as a new commit of branch main."""
        commit = hashlib.sha1(f"{name} {folder}".encode()).hexdigest()
        self.repos[name].revisions["main"] = commit
        self.repos[name].commits[commit] = folder
        return commit

    def downloads(self, name: str) -> list[str]:
        """The files of a repository that were requested, in order of their names."""
        pattern = re.compile(rf"GET /{name}/resolve/[^/]+/(.+)")
        return sorted(match[1] for request in self.requests if (match := pattern.fullmatch(request)))


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if (path := self._path()) is None:
            return None
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            return self._json({"name": "me", "type": "user"}) if known else self._error(401, "", "Invalid token")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            name, kind, revision = match.groups()
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = match.groups()
            kind = "file"
        else:
            return self._error(404, "", "not found")
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._error(401, "RepoNotFound", "Invalid username or password.")
        commit = repo.revisions.get(revision or "main", revision)
        if commit not in repo.commits:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        folder = repo.commits[commit]
        if kind == "tree":
            return self._json([_tree_entry(folder, file) for file in sorted(folder.rglob("*")) if file.is_file()])
        if kind != "file":
            siblings = [{"rfilename": file.name} for file in sorted(folder.iterdir()) if file.is_file()]
            return self._json({"id": name, "sha": commit, "private": repo.private, "siblings": siblings})
        if repo.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, "GatedRepo", f"Access to model {name} is restricted.")
        self._send_file(folder / file, commit, repo.huge)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self._body()
        if (path := self._path()) is None:
            return None
        if path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values['organization']}/{values['name']}"
            if name in self.hub.repos:
                return self._json({"url": f"{self.hub.url}/{name}"}, 409)
            self.hub.repos[name] = Repo({}, {}, private=values["visibility"] == "private")
            self.hub.move_main(name, Path(tempfile.mkdtemp(dir=self.hub.uploads)))
            return self._json({"url": f"{self.hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            modes = [
                (file["path"], file["path"].endswith((".safetensors", ".gguf"))) for file in json.loads(body)["files"]
            ]
            files = [
                {"path": file, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                for file, large in modes
            ]
            return self._json({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/large/{entry['oid']}"}}
            return self._json({"transfer": "basic", "objects": objects})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path)
        assert match is not None, path
        folder = Path(tempfile.mkdtemp(dir=self.hub.uploads))
        for line in body.splitlines():
            key, value = json.loads(line).values()
            if key == "header":
                self.hub.repos[match[1]].messages.append(value["summary"])
            else:
                large = self.hub.large.get(value.get("oid", ""))
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]) if large is None else large)
        commit = self.hub.move_main(match[1], folder)
        return self._json({"commitUrl": f"{self.hub.url}/{match[1]}/commit/{commit}", "commitOid": commit})

    def do_PUT(self) -> None:
        body = self._body()
        if (path := self._path()) is not None:
            assert path == f"/large/{hashlib.sha256(body).hexdigest()}"
            self.hub.large[path.rpartition("/")[2]] = body
            self._json({})

    def _path(self) -> str | None:
        """The path of the request; None if it was refused."""
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.refusal is None or not re.fullmatch(self.hub.refused, path):
            return path
        self._error(self.hub.refusal[0], "", self.hub.refusal[1])
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send_file(self, file: Path, commit: str, huge: bool) -> None:
        content = file.read_bytes()
        start, status = 0, 200
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        if huge and file.suffix == ".safetensors":
            headers["X-Linked-Size"] = str(10**18)
        if requested := self.headers.get("Range"):
            self.hub.ranges.append(requested)
            start, status = int(requested.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._head(status, len(content) - start, headers)
        if self.command == "HEAD":
            return
        if file.name != self.hub.broken:
            self.wfile.write(content[start:])
            return
        self.hub.broken = ""
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True
        if self.hub.stall:
            self.hub.stalled.set()
            self.hub.resume.wait(60)

    def _json(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self._head(status, len(content), {"Content-Type": "application/json"})
        self.wfile.write(content)

    def _error(self, status: int, code: str, message: str) -> None:
        self._head(status, 0, {"X-Error-Code": code, "X-Error-Message": message})

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def _tree_entry(folder: Path, file: Path) -> dict[str, object]:
    content, path = file.read_bytes(), file.relative_to(folder).as_posix()
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def serve_hub() -> Iterator[FakeHub]:
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    uploads = tempfile.TemporaryDirectory()
    handler.hub = FakeHub(f"http://127.0.0.1:{server.server_port}", Path(uploads.name))  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield handler.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        uploads.cleanup()
