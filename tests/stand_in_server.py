"""A scriptable llama-server look-alike, for faults and timing that the real engine cannot produce.

It speaks the part of llama-server that kitty_nb uses; its own flags say how it misbehaves. Tests
hand those over as EXTRA_ARGS, so they travel the same way as any user's.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FLAGS = [
    (("-m", "--model"), "FNAME", "model path to load"),
    (("--host",), "HOST", "ip address to listen"),
    (("--port",), "PORT", "port to listen"),
    (("-a", "--alias"), "STRING", "set alias for model name"),
    (("-c", "--ctx-size"), "N", "size of the prompt context"),
    (("-n", "--predict", "--n-predict"), "N", "number of tokens to predict"),
    (("-t", "--threads"), "N", "number of threads"),
    (("-b", "--batch-size"), "N", "logical maximum batch size"),
    (("-ub", "--ubatch-size"), "N", "physical maximum batch size"),
    (("-np", "--parallel"), "N", "number of server slots"),
    (("-ngl", "--gpu-layers", "--n-gpu-layers"), "N", "layers in VRAM"),
    (("-fa", "--flash-attn"), "[on|off|auto]", "set Flash Attention use"),
    (("--bind-after",), "SECONDS", "say nothing and bind nothing for so long"),
    (("--load-seconds",), "SECONDS", "read the model at an even pace for so long"),
    (("--prepare-seconds",), "SECONDS", "keep answering 503 for so long after the weights"),
    (("--compile",), "SECONDS", "then keep a core busy for so long, without a word"),
    (("--never-ready",), None, "answer 503 for ever"),
    (("--answer-as",), "STRING", "list another model than the one asked for"),
    (("--exit-after",), "SECONDS", "end by itself so long after the weights are there"),
    (("--exit-code",), "N", "with this code, or by this signal when negative"),
    (("--last-words",), "STRING", "after writing this line"),
    (("--ignore-sigterm",), None, "do not end when asked"),
    (("--tidy-up",), "FILE", "when asked to end, make this file half a second later, then end"),
    (("--spawn-child",), "FILE", "start a child process and write its pid there"),
    (("--chatter",), "N", "write so many log lines a second once it is ready"),
    (("--flood",), "N", "write so many log lines a second, many at once, once it is ready"),
    (("--work",), "SECONDS", "keep a core busy for so long once it is ready"),
    (("--blurt",), "FILE", "write what this file holds to the log once it is ready"),
    (("--tell-keys",), "FILE", "write each path that was asked for, and whether with the key"),
    (("--first-answer",), "SECONDS", "let the first request wait for so long"),
    (("--later-answers",), "SECONDS", "let every other request wait for so long"),
    (("--tokens",), "N", "tell of so many tokens of the request under way"),
    (("--fail-requests",), "STRING", "answer each request with this error"),
    (("--ready-mark",), "FILE", "touch this the moment before the first 200"),
]


def print_help() -> None:
    for names, value, text in FLAGS:
        spelled = (
            ",   ".join((names[0], ", ".join(names[1:]))) if names[1:] else f"        {names[0]}"
        )
        print(f"{spelled + (f' {value}' if value else ''):<40}{text}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    for names, value, _ in FLAGS:
        parser.add_argument(*names, **({} if value else {"action": "store_true"}))
    return parser.parse_args()


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def work(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


class Server:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ready = threading.Event()
        self.posted: list[str] = []
        self.busy = False

    def slot(self) -> dict[str, object]:
        idle = {"id": 0, "is_processing": self.busy}
        tokens = {"n_decoded": int(self.options.tokens or 0)}
        task = {"id_task": len(self.posted), "next_token": [tokens]}
        return idle | task if self.busy else idle

    def handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                ready = server.ready.is_set()
                alias = server.options.answer_as or server.options.alias
                answers = {
                    "/health": {"status": "ok"},
                    "/v1/models": {"data": [{"id": alias}]},
                    "/slots": [server.slot()],
                }
                body = answers.get(self.path)
                key = os.environ.get("LLAMA_API_KEY")
                loading = {"error": {"code": 503, "message": "Loading model"}}
                refused = (
                    key
                    and self.path != "/health"
                    and self.headers["Authorization"] != f"Bearer {key}"
                )
                if server.options.tell_keys:
                    keyed = "key" if self.headers["Authorization"] else "no key"
                    with Path(server.options.tell_keys).open("a") as told:
                        told.write(f"{self.path} {keyed}\n")
                status = 401 if refused else 404 if body is None else 200 if ready else 503
                data = json.dumps(body if ready else loading).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"] or 0))
                server.posted.append(self.path)
                first = len(server.posted) == 1
                pause = server.options.first_answer if first else server.options.later_answers
                server.busy = True
                time.sleep(float(pause or 0))
                server.busy = False
                failure = server.options.fail_requests
                error = {"error": {"code": 500, "message": failure, "type": "server_error"}}
                data = json.dumps(error if failure else {"content": "a"}).encode()
                self.send_response(500 if failure else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def load(self) -> bytearray:
        weights = bytearray()
        seconds = float(self.options.load_seconds or 0)
        path = Path(self.options.model)
        with path.open("rb") as file:
            log(f"srv    load_model: loading model '{path}'")
            began, size = time.monotonic(), os.fstat(file.fileno()).st_size
            while block := file.read(max(1, size // 200)):
                weights += block
                time.sleep(max(0.0, began + seconds * len(weights) / size - time.monotonic()))
        time.sleep(float(self.options.prepare_seconds or 0))
        work(float(self.options.compile or 0))
        return weights

    def run(self) -> None:
        options = self.options
        if options.ignore_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if options.tidy_up:
            signal.signal(signal.SIGTERM, self.tidy_up)
        if options.spawn_child:
            child = os.posix_spawn(sys.executable, [sys.executable, "-c", "input()"], os.environ)
            Path(options.spawn_child).write_text(str(child))
        time.sleep(float(options.bind_after or 0))
        httpd = ThreadingHTTPServer((options.host, int(options.port)), self.handler())
        httpd.daemon_threads = True
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        weights = self.load()
        if options.exit_after is not None:
            threading.Timer(float(options.exit_after), self.end).start()
        while options.never_ready:
            signal.pause()
        if options.ready_mark:
            Path(options.ready_mark).touch()
        self.ready.set()
        log("srv          main: model loaded")
        log(f"srv          main: server is listening on http://{options.host}:{options.port}")
        work(float(options.work or 0))
        while options.flood:
            began, lines = time.monotonic(), int(options.flood) // 10
            sys.stderr.write("".join(f"flood {n:08} {'~' * 80}\n" for n in range(lines)))
            sys.stderr.flush()
            time.sleep(max(0.0, began + 0.1 - time.monotonic()))
        if options.blurt:
            sys.stderr.buffer.write(Path(options.blurt).read_bytes())
            sys.stderr.buffer.flush()
        while not options.chatter:
            signal.pause()
        began, written = time.monotonic(), 0
        while True:
            due = int((time.monotonic() - began) * int(options.chatter))
            sys.stderr.write("".join(f"chatter {n} {len(weights)}\n" for n in range(written, due)))
            sys.stderr.flush()
            written = due
            time.sleep(0.01)

    def tidy_up(self, *_: object) -> None:
        time.sleep(0.5)
        Path(self.options.tidy_up).touch()
        os._exit(0)

    def end(self) -> None:
        if self.options.last_words:
            log(self.options.last_words)
        code = int(self.options.exit_code or 0)
        if code < 0:
            os.kill(os.getpid(), -code)
            signal.pause()
        os._exit(code)


if __name__ == "__main__":
    if "--help" in sys.argv:
        print_help()
    elif "--version" in sys.argv:
        print("version: 1 (standin)")
    else:
        Server(parse()).run()
