"""A hub on this machine: what huggingface_hub asks a server for, served from a folder, with a brake. And a long run to
compare disturbed ones with.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from tests.scripts import runs

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "hub").mkdir()
    server = Hub(tmp_path / "hub")
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def long_run(tiny_corpus, tmp_path_factory):
    """Flags, less --output_root and --exp_name, of a run of thousands of steps, several in a second."""
    return runs.long_run(tiny_corpus, tmp_path_factory.mktemp("long_run"))


@pytest.fixture(scope="session")
def undisturbed(long_run, tmp_path_factory):
    """A function of n: the first n losses of that run on two ranks."""
    longest = []

    def first(steps: int) -> list[tuple[int, float]]:
        nonlocal longest
        if len(longest) < steps:
            longest = runs.undisturbed(long_run, tmp_path_factory.mktemp("undisturbed"), steps)
        return longest[:steps]

    return first


class Hub(ThreadingHTTPServer):
    """Serves `folder` as the dataset org/texts; org/gated is gated, every other name unknown.

    Attributes:
        commit: the newest commit.  served: (path, first byte) of every download.
        corrupt: path of a file that arrives with one byte changed.
        brake: path of a file of which only half is sent; then `braked` is set, and the server waits for `release`.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.commit, self.served, self.corrupt = folder, COMMIT, [], None
        self.brake, self.braked, self.release = None, threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        if path.startswith("/api/datasets/org/gated"):
            self.refuse(403, "GatedRepo")
        elif not path.startswith(("/api/datasets/org/texts", "/datasets/org/texts/resolve/")):
            self.refuse(404 if path.startswith("/api/datasets/") else 401, "RepoNotFound")
        elif path.startswith("/datasets/"):
            self.file(path.split("/resolve/")[1].partition("/")[2])
        elif "/tree/" in path:
            self.tree(path.split("/tree/")[1].partition("/")[2], "recursive=true" in self.path.lower())
        elif path.endswith("/revision/nowhere"):
            self.refuse(404, "RevisionNotFound")
        else:
            self.answer({"id": "org/texts", "sha": self.server.commit})

    def tree(self, name, recursive):
        folder = self.server.folder / name
        if not folder.is_dir():
            return self.refuse(404, "EntryNotFound")
        entries = []
        for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
            entry = {"path": path.relative_to(self.server.folder).as_posix(), "oid": "a" * 40, "size": 0}
            if path.is_file():
                content = path.read_bytes()
                lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
                entry |= {"type": "file", "size": len(content), "lfs": lfs}
            else:
                entry["type"] = "directory"
            entries.append(entry)
        return self.answer(entries)

    def file(self, name):
        content = (self.server.folder / name).read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        if name == self.server.corrupt:
            content = content[:99] + bytes([content[99] ^ 1]) + content[100:]
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        self.server.served.append((name, first))
        if name == self.server.brake:
            self.wfile.write(content[first : len(content) // 2])
            self.wfile.flush()
            self.server.braked.set()
            self.server.release.wait()
            return
        self.wfile.write(content[first:])

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass
