"""A look-alike of llama-swap: it runs what its YAML says, of a swapping group one at a time."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from stand_in_router import answers


class Swap:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.ports = {n: settings["startPort"] + at for at, n in enumerate(settings["models"])}
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.ready: set[str] = set()
        self.turn = threading.Lock()

    def running(self) -> list[dict[str, str]]:
        there = [name for name, child in [*self.children.items()] if child.poll() is None]
        states = {True: "ready", False: "starting"}
        return [{"model": name, "state": states[name in self.ready]} for name in there]

    def use(self, name: str) -> bool:
        """Have a model loaded; return whether it is."""
        with self.turn:
            child = self.children.get(name)
            if child is None or child.poll() is not None:
                group = next(g for g in self.settings["groups"].values() if name in g["members"])
                for other in group["members"] if group["swap"] else ():
                    self.stop(other)
                command = shlex.split(self.settings["models"][name]["cmd"])
                port = str(self.ports[name])
                self.ready.discard(name)
                child = subprocess.Popen([port if one == "${PORT}" else one for one in command])
                self.children[name] = child
            while child.poll() is None and not answers(self.ports[name]):
                time.sleep(0.02)
            self.ready.add(name)
            return child.poll() is None

    def stop(self, name: str) -> None:
        if child := self.children.get(name):
            child.terminate()
            child.wait()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        swap = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.startswith("/upstream/"):
                    self.answer({} if swap.use(self.path.split("/")[2]) else None)
                    return
                listed = {"data": [{"id": name} for name in swap.ports]}
                there = {"/health": {}, "/running": {"running": swap.running()}}
                self.answer({**there, "/v1/models": listed}.get(self.path))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                if self.path.startswith("/api/models/unload/"):
                    swap.stop(self.path.rpartition("/")[2])
                    self.answer({})
                    return
                name = json.loads(body)["model"]
                if not swap.use(name):
                    self.answer(None)
                    return
                url = f"http://127.0.0.1:{swap.ports[name]}{self.path}"
                request = urllib.request.Request(url, body, dict(self.headers))
                with urllib.request.urlopen(request) as response:
                    self.send_response(200)
                    self.send_header("Content-Type", response.headers["Content-Type"])
                    self.end_headers()
                    self.wfile.write(response.read())

            def answer(self, body: object) -> None:
                self.send_response(404 if body is None else 200)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: object) -> None:
                pass

        return Handler


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--listen")
    parser.add_argument("-version", action="version", version="version: 250 (look-alike)")
    options = parser.parse_args()
    swap = Swap(yaml.safe_load(options.config.read_text()))
    host, _, port = options.listen.rpartition(":")
    server = ThreadingHTTPServer((host, int(port)), swap.handler())
    server.daemon_threads = True
    for name in swap.settings["hooks"]["on_startup"]["preload"]:
        threading.Thread(target=swap.use, args=(name,), daemon=True).start()
    server.serve_forever()
