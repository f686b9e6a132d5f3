"""A look-alike of llama-server's router: it starts a stand-in server for each model asked for.

Like the real one with a mapped model, it tells that nothing of it is there, and then that all is.
What it is told behind `--` its children are told too.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STAND_IN = Path(__file__).with_name("stand_in_server.py")
TOLD = {"stages": ["text_model"], "current": "text_model"}


class Router:
    def __init__(self, folder: Path, flags: list[str], *, silent: bool) -> None:
        self.silent = silent
        self.asked = 0
        self.models = {path.stem: path for path in sorted(folder.glob("*.gguf"))}
        self.status = dict.fromkeys(self.models, "unloaded")
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.flags = flags
        self.listeners: list[queue.Queue[bytes]] = []

    def tell(self, name: str, event: str, status: str, **more: object) -> None:
        self.status[name] = status
        data = {"model": name, "event": event, "data": {"status": status, **more}}
        for listener in self.listeners:
            listener.put(f"data: {json.dumps(data)}\n\n".encode())

    def load(self, name: str) -> None:
        port = free_port()
        command = [sys.executable, "-P", str(STAND_IN), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--alias", name, "--model", str(self.models[name]), *self.flags]
        self.children[name] = child = subprocess.Popen(command)
        self.tell(name, "status_change", "loading", progress={**TOLD, "value": 0.0})
        while child.poll() is None and not answers(port):
            time.sleep(0.02)
        if child.poll() is None:
            self.tell(name, "status_change", "loading", progress={**TOLD, "value": 1.0})
            self.tell(name, "status_change", "loaded", info={})
        self.tell(name, "status_change", "unloaded", exit_code=child.wait())

    def handler(self) -> type[BaseHTTPRequestHandler]:
        router = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/models/sse" and not router.silent:
                    self.listen()
                models = [
                    {"id": name, "status": {"value": router.status[name]}} for name in router.models
                ]
                answers = {
                    "/health": {"status": "ok"},
                    "/props": {"role": "router"},
                    "/v1/models": {"data": models},
                }
                self.answer(None if self.busy() else answers.get(self.path))

            def busy(self) -> bool:
                router.asked += self.path == "/v1/models"
                return self.path == "/v1/models" and router.silent and router.asked % 2 == 0

            def do_POST(self) -> None:
                name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"]
                if self.path == "/models/load":
                    router.children.pop(name, None)
                    router.tell(name, "model_status", "loading")
                    threading.Thread(target=router.load, args=(name,), daemon=True).start()
                else:
                    while name not in router.children:  # it is about to be started
                        time.sleep(0.01)
                    router.children[name].terminate()
                self.answer({"success": True})

            def answer(self, body: object) -> None:
                self.send_response(404 if body is None else 200)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def listen(self) -> None:
                events: queue.Queue[bytes] = queue.Queue()
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                self.wfile.flush()
                router.listeners.append(events)
                while True:
                    self.wfile.write(events.get())

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def free_port() -> int:
    """A port below those that systems give to connections. The package can't be imported here."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
            return response.status == 200
    except OSError:  # not there yet, or just gone
        return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--models-dir", type=Path)
    parser.add_argument("--silent", action="store_true", help="have no /models/sse, seldom a list")
    parser.add_argument("flags", nargs="*")
    options = parser.parse_args()
    router = Router(options.models_dir, options.flags, silent=options.silent)
    server = ThreadingHTTPServer(("127.0.0.1", options.port), router.handler())
    server.daemon_threads = True
    try:
        server.serve_forever()
    finally:
        for child in router.children.values():
            child.terminate()
