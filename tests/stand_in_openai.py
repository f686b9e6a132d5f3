"""A server that answers as Ollama or vLLM do, as their documentation records it; TLS before one."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from typing import Any


def ollama_models(*names: str) -> dict[str, Any]:
    about = {"object": "model", "created": 1727352332, "owned_by": "library"}
    return {"object": "list", "data": [{"id": name, **about} for name in names] or None}


def vllm_models(name: str) -> dict[str, Any]:
    about = {"object": "model", "created": 1727352332, "owned_by": "vllm", "root": name}
    more = {"parent": None, "max_model_len": 40960, "permission": [{"id": "modelperm-1"}]}
    return {"object": "list", "data": [{"id": name, **about, **more}]}


@dataclass
class Shape:
    """What a server answers.

    Attributes:
        models: To `/v1/models`.
        key: What it asks for.
        prefix: What all its paths begin with.
        redirect: Where it sends everybody.
        thinking: The name of the field with a model's thoughts.
        endless: Whether a list of models never ends.
        unavailable: What it says instead, with status 503.
        before_answer: Called before each answer to a chat.
        tokens: How many tokens each answer to a chat has.
        held: Whether answers wait after their first word.
        seen: Path, key and body of each request.
    """

    models: Any
    key: str | None = None
    prefix: str = ""
    redirect: str | None = None
    thinking: str = "reasoning"
    endless: bool = False
    unavailable: object = None
    before_answer: Callable[[], object] = lambda: None
    tokens: Iterator[int] = field(default_factory=partial(repeat, 5))
    held: bool = False
    seen: list[tuple[str, str | None, Any]] = field(default_factory=list)

    @property
    def posts(self) -> list[tuple[str, str | None, Any]]:
        """Those with a body, which health checks are not."""
        return [one for one in self.seen if one[2] is not None]

    @contextmanager
    def serving(self, port: int = 0) -> Iterator[str]:
        with _Server(("127.0.0.1", port), _handler(self)) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}{self.prefix}"
            finally:
                self.held = False
                server.shutdown()
                thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 512  # with five, connections of a hundred clients take seconds


def _handler(shape: Shape) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.take(None)

        def do_POST(self) -> None:
            self.take(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def take(self, body: Any) -> None:
            shape.seen.append((self.path, self.headers["Authorization"], body))
            path = self.path.removeprefix(shape.prefix)
            if shape.redirect:
                self.send_response(307)
                self.send_header("Location", f"{shape.redirect}{path}?token=secret")
                self.end_headers()
            elif shape.key and self.headers["Authorization"] != f"Bearer {shape.key}":
                self.answer(401, {"error": "Unauthorized"})
            elif not self.path.startswith(shape.prefix):
                self.answer(404, "404 page not found")
            elif shape.unavailable:
                self.answer(503, shape.unavailable)
            elif path == "/v1/models":
                self.answer(200, shape.models)
                while shape.endless:
                    self.wfile.write(b" ")
                    time.sleep(0.01)
            elif path == "/v1/chat/completions":
                self.chat(body)
            elif path == "/v1/embeddings" and body["model"] == "unknown":
                missing = 'model "unknown" not found, try pulling it first'
                self.answer(404, {"error": {"message": missing, "type": "api_error"}})
            elif path == "/v1/embeddings":
                rows = [{"index": n, "embedding": [0.5, n]} for n in range(len(body["input"]))]
                self.answer(200, {"object": "list", "data": rows, "model": body["model"]})
            else:
                self.answer(404, "404 page not found")

        def chat(self, body: dict[str, Any]) -> None:
            shape.before_answer()
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            head = {"id": "chatcmpl-287", "object": "chat.completion.chunk", "model": body["model"]}
            deltas = [{"role": "assistant", shape.thinking: "Hm."}, {"content": "Blue"}]
            for delta in [*deltas, {"content": " sky."}]:
                self.event({**head, "choices": [{"index": 0, "delta": delta}]})
                while shape.held:
                    time.sleep(0.01)
            last = {"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}
            self.event({**head, "choices": [last]})
            if (body.get("stream_options") or {}).get("include_usage"):
                tokens = next(shape.tokens)
                usage = {"prompt_tokens": 11, "completion_tokens": tokens}
                usage["total_tokens"] = sum(usage.values())
                self.event({**head, "choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")

        def event(self, part: object) -> None:
            self.wfile.write(f"data: {json.dumps(part)}\n\n".encode())

        def answer(self, status: int, body: object) -> None:
            text = body if isinstance(body, str) else json.dumps(body)
            self.send_response(status)
            kind = "text/plain" if isinstance(body, str) else "application/json"
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def certificate(folder: Path) -> Path:
    """Make a certificate for 127.0.0.1 that signs itself, with its key in the same file."""
    path = folder / "front.pem"
    subject = ("-subj", "/CN=front", "-addext", "subjectAltName=IP:127.0.0.1")
    made = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    files = ("-keyout", str(path), "-out", str(path.with_suffix(".crt")))
    subprocess.run(["openssl", *made, *subject, *files], check=True, capture_output=True)
    path.write_text(path.read_text() + path.with_suffix(".crt").read_text())
    return path


@contextmanager
def tls_front(pem: Path, port: int) -> Iterator[str]:
    """Accept TLS connections, and pass what comes through them on to a port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    threads: list[threading.Thread] = []
    ended = threading.Event()

    def copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def converse(plain: socket.socket) -> None:
        with (
            suppress(OSError),
            plain,
            context.wrap_socket(plain, server_side=True) as client,
            socket.create_connection(("127.0.0.1", port)) as server,
        ):
            back = threading.Thread(target=copy, args=(server, client))
            back.start()
            copy(client, server)
            back.join()

    def accept(listener: socket.socket) -> None:
        while not ended.is_set():
            with suppress(TimeoutError):
                plain, _ = listener.accept()
                plain.settimeout(None)
                threads.append(threading.Thread(target=converse, args=(plain,)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        accepting = threading.Thread(target=accept, args=(listener,))
        accepting.start()
        try:
            yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()
            for thread in (accepting, *threads):
                thread.join()
