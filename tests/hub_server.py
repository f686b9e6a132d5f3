"""A Hugging Face Hub on loopback: what its clients ask of it, and what can go wrong.

Two addresses, as on the real Hub: one that knows the repositories and sends clients that want a
large file on to the other, which has the bytes and must not see anybody's token.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_token_for_tests"
ONE = "maker/Tiny-GGUF"
SPLIT = "maker/Split-VL-GGUF"
MB = 10**6
_BLOCK = 1 << 14


@dataclass
class Repo:
    """A repository.

    Attributes:
        files: Contents by path.
        claimed: Sizes that are announced instead of the real ones.
        in_git: Paths of files that are kept in git itself.
        gated: Whether only who has the token may have the files.
        private: Whether only who has the token may know of it.
    """

    files: dict[str, bytes]
    claimed: dict[str, int] = field(default_factory=dict)
    in_git: set[str] = field(default_factory=set)
    gated: bool = False
    private: bool = False


@dataclass(frozen=True)
class Asked:
    """One request for bytes: the path in the repository, and the first and last byte."""

    path: str
    first: int
    last: int


class Hub:
    """The server's files, its misbehaviour, and the requests that it got.

    Attributes:
        repos: Repositories by name.
        rate: Bytes per second at which files are sent at most; None for as fast as can be.
        silent_after: After so many bytes of an answer no more is sent, until this is None.
        cuts: After so many bytes of an answer the connection is cut, one entry per answer.
        wrong: Paths of which other bytes are sent.
        refusals: Statuses to answer the next requests for bytes with.
        deaf: Whether ranges are ignored.
        asked: Requests for bytes, in order.
        renamed: What it answers that repositories are called.
        leaked: Paths for which the server that has the bytes was sent a token.
    """

    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos = repos
        self.rate: float | None = None
        self.silent_after: int | None = None
        self.cuts: list[int] = []
        self.wrong: set[str] = set()
        self.refusals: list[int] = []
        self.deaf = False
        self.renamed: dict[str, str] = {}
        self.asked: list[Asked] = []
        self.leaked: list[str] = []
        self.closing = threading.Event()
        self.url = self.content_url = ""

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, c)) for c in (0, 1)]
        self.url, self.content_url = (f"http://127.0.0.1:{s.server_port}" for s in servers)
        threads = [threading.Thread(target=s.serve_forever, args=(0.05,)) for s in servers]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self.closing.set()
            for server, thread in zip(servers, threads, strict=True):
                server.shutdown()
                server.server_close()
                thread.join()


def some_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


def usual_repositories() -> dict[str, Repo]:
    """One with two quantizations, and one with shards, projectors and a model with a hole."""
    one = Repo(
        {
            "README.md": b"# Tiny",
            "tiny-Q4_K_M.gguf": some_bytes(3 * MB),
            "tiny-Q8_0.gguf": some_bytes(5 * MB, 1),
            "tiny.imatrix.gguf": b"no model",
        },
        in_git={"README.md"},
    )
    split = Repo(
        {
            "Q4_K_M/vl-Q4_K_M-00001-of-00002.gguf": some_bytes(300_000, 2),
            "Q4_K_M/vl-Q4_K_M-00002-of-00002.gguf": some_bytes(200_000, 3),
            "Q8_0/vl-Q8_0-00001-of-00002.gguf": b"its second shard is missing",
            "mmproj-F16.gguf": some_bytes(100_000, 4),
            "mmproj-F32.gguf": some_bytes(150_000, 5),
        }
    )
    return {ONE: one, SPLIT: split}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _handler(hub: Hub, has_bytes: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            token = self.headers.get("Authorization")
            if has_bytes and token:
                hub.leaked.append(path)
            knows = token == f"Bearer {TOKEN}"
            if has_bytes:
                owner, name, _, _, file = path.split("/", 4)
                self.send_file(f"{owner}/{name}", file)
            elif path.startswith("api/models/"):
                _, _, owner, name, *rest = path.split("/", 5)
                self.send_info(f"{owner}/{name}", rest, knows)
            else:
                owner, name, _, revision, file = path.split("/", 4)
                self.resolve(f"{owner}/{name}", revision, file, knows)

        def repo(self, name: str, knows: bool) -> Repo | None:
            repo = hub.repos.get(name)
            if repo is None or (repo.private and not knows):
                self.refuse(401 if not knows else 404, "RepoNotFound")
                return None
            return repo

        def send_info(self, name: str, rest: list[str], knows: bool) -> None:
            repo = self.repo(name, knows)
            if repo is None:
                return
            if rest and rest != ["revision", "main"]:
                self.refuse(404, "RevisionNotFound")
                return
            siblings = []
            for path, data in repo.files.items():
                size = repo.claimed.get(path, len(data))
                row = {"rfilename": path, "size": size, "blobId": _git_sha1(data)}
                if path not in repo.in_git:
                    row["lfs"] = {"sha256": sha256(data), "size": size, "pointerSize": 134}
                siblings.append(row)
            info = {
                "id": hub.renamed.get(name, name),
                "sha": COMMIT,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "tags": ["gguf"],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
            body = json.dumps(info).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def resolve(self, name: str, revision: str, file: str, knows: bool) -> None:
            repo = self.repo(name, knows)
            if repo is None:
                return
            if revision not in {"main", COMMIT}:
                self.refuse(404, "RevisionNotFound")
            elif file not in repo.files:
                self.refuse(404, "EntryNotFound")
            elif repo.gated and not knows:
                self.refuse(401, "GatedRepo")
            elif file in repo.in_git:
                self.send_file(name, file)
            else:
                data = repo.files[file]
                self.send_response(302)
                self.send_header("Location", f"{hub.content_url}/{self.path.lstrip('/')}")
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("X-Linked-Size", str(len(data)))
                self.send_header("X-Linked-Etag", f'"{sha256(data)}"')
                self.send_header("Content-Length", "0")
                self.end_headers()

        def send_file(self, name: str, file: str) -> None:
            data = hub.repos[name].files[file]
            if file in hub.wrong:
                data = bytes(len(data))
            first, last = 0, len(data) - 1
            wanted = self.headers.get("Range")
            if wanted and not hub.deaf:
                begin, _, end = wanted.removeprefix("bytes=").partition("-")
                first, last = int(begin), min(int(end) if end else last, last)
            if self.command == "GET":
                hub.asked.append(Asked(file, first, last))
            if self.command == "GET" and hub.refusals:
                self.refuse(hub.refusals.pop(0), "")
                return
            body = data[first : last + 1]
            self.send_response(206 if wanted and not hub.deaf else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{_git_sha1(data)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if wanted and not hub.deaf:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.end_headers()
            if self.command == "GET":
                self.pour(body)

        def pour(self, body: bytes) -> None:
            cut = hub.cuts.pop(0) if hub.cuts else None
            if cut is not None:
                body, self.close_connection = body[:cut], True
            for start in range(0, len(body), _BLOCK):
                while hub.silent_after is not None and start >= hub.silent_after:
                    if hub.closing.wait(0.01):
                        self.close_connection = True
                        return
                try:
                    self.wfile.write(body[start : start + _BLOCK])
                except OSError:
                    self.close_connection = True
                    return
                if hub.rate is not None and hub.closing.wait(_BLOCK / hub.rate):
                    self.close_connection = True
                    return

        def refuse(self, status: int, code: str) -> None:
            body = json.dumps({"error": code or "no"}).encode()
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    return Handler
