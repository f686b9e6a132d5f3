"""A scriptable llama-server look-alike, for faults and timing that the real engine cannot produce.

It speaks the part of llama-server that kitty_nb uses; its own flags say how it misbehaves. Tests
hand those over as EXTRA_ARGS, so they travel the same way as any user's.

The suite starts it hundreds of times, and most of such a start is imports: so it reads its command
line and speaks HTTP by itself, rather than by argparse and http.server.
"""

# ruff: noqa: PTH110, PTH123 - pathlib, too, takes longer to import than all that is used of it

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

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
    (("--hurry",), "FILE", "end both at once when this file is there"),
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
    (("--tokens",), "N", "tell of so many tokens of the request under way"),
    (("--chat",), "FILE", "answer chats by this file's lines: seconds to wait, and an event"),
    (("--fail-requests",), "STRING", "answer each request with this error"),
    (("--ready-mark",), "FILE", "touch this the moment before the first 200"),
]


def print_help() -> None:
    for names, value, text in FLAGS:
        spelled = (
            ",   ".join((names[0], ", ".join(names[1:]))) if names[1:] else f"        {names[0]}"
        )
        print(f"{spelled + (f' {value}' if value else ''):<40}{text}")


def parse(words: list[str]) -> dict[str, str]:
    """The flags given, each by its first long name; a switch has an empty value."""
    flags = {
        name: (next(long for long in names if long.startswith("--")), value)
        for names, value, _ in FLAGS
        for name in names
    }
    options: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        if word not in flags:
            sys.exit(f"error: invalid argument: {word}")
        name, value = flags[word]
        options[name] = next(rest) if value else ""
    return options


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def work(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def touch(path: str) -> None:
    with open(path, "a"):
        pass


class Server:
    def __init__(self, options: dict[str, str]) -> None:
        self.options = options
        self.ready = threading.Event()
        self.posted = 0
        self.busy = False

    def seconds(self, flag: str) -> float:
        return float(self.options.get(flag, 0))

    def slot(self) -> dict[str, object]:
        idle = {"id": 0, "is_processing": self.busy}
        tokens = {"n_decoded": int(self.options.get("--tokens", 0))}
        task = {"id_task": self.posted, "next_token": [tokens]}
        return idle | task if self.busy else idle

    def get(self, path: str, authorization: str | None) -> tuple[int, object]:
        if told := self.options.get("--tell-keys"):
            with open(told, "a") as file:
                file.write(f"{path} {'key' if authorization else 'no key'}\n")
        key = os.environ.get("LLAMA_API_KEY")
        alias = self.options.get("--answer-as", self.options.get("--alias"))
        answers = {
            "/health": {"status": "ok"},
            "/v1/models": {"data": [{"id": alias}]},
            "/slots": [self.slot()],
        }
        ready, body = self.ready.is_set(), answers.get(path)
        refused = key and path != "/health" and authorization != f"Bearer {key}"
        status = 401 if refused else 404 if body is None else 200 if ready else 503
        return status, body if ready else {"error": {"code": 503, "message": "Loading model"}}

    def post(self) -> tuple[int, object]:
        self.posted += 1
        self.busy = True
        time.sleep(self.seconds("--first-answer") if self.posted == 1 else 0)
        self.busy = False
        if failure := self.options.get("--fail-requests"):
            return 500, {"error": {"code": 500, "message": failure, "type": "server_error"}}
        return 200, {"content": "a"}

    def chat(self, connection: socket.socket) -> None:
        kind = "Content-Type: text/event-stream"
        connection.sendall(f"HTTP/1.1 200 OK\r\n{kind}\r\nConnection: close\r\n\r\n".encode())
        self.busy = True
        try:
            with open(self.options["--chat"]) as lines:
                for line in lines:
                    seconds, event = json.loads(line)
                    time.sleep(seconds)
                    connection.sendall(f"data: {json.dumps(event)}\n\n".encode())
        finally:
            self.busy = False

    def converse(self, connection: socket.socket) -> None:
        """Answer the requests of one client, one after the other."""
        with suppress(OSError), connection, connection.makefile("rb") as reader:
            while request := reader.readline():
                method, path, _ = request.decode().split()
                headers: dict[str, str] = {}
                while header := reader.readline().strip():
                    name, _, value = header.decode("latin-1").partition(":")
                    headers[name.lower()] = value.strip()
                reader.read(int(headers.get("content-length", 0)))
                if "--chat" in self.options and path == "/v1/chat/completions":
                    self.chat(connection)
                    return
                answer = self.post() if method == "POST" else None
                status, body = answer or self.get(path, headers.get("authorization"))
                data = json.dumps(body).encode()
                start = f"HTTP/1.1 {status} {status}\r\nContent-Length: {len(data)}\r\n\r\n"
                connection.sendall(start.encode() + data)
                if headers.get("connection") == "close":
                    return

    def serve(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self.converse, args=(connection,), daemon=True).start()

    def wait_until(self, moment: float) -> None:
        hurry = self.options.get("--hurry")
        while (left := moment - time.monotonic()) > 0 and not (hurry and os.path.exists(hurry)):
            time.sleep(min(left, 0.02) if hurry else left)

    def load(self) -> bytearray:
        weights = bytearray()
        seconds, path = self.seconds("--load-seconds"), self.options["--model"]
        with open(path, "rb") as file:
            log(f"srv    load_model: loading model '{path}'")
            began, size = time.monotonic(), os.fstat(file.fileno()).st_size
            while block := file.read(max(1, size // 200)):
                weights += block
                self.wait_until(began + seconds * len(weights) / size)
        self.wait_until(time.monotonic() + self.seconds("--prepare-seconds"))
        work(self.seconds("--compile"))
        return weights

    def run(self) -> None:
        options = self.options
        if "--ignore-sigterm" in options:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if "--tidy-up" in options:
            signal.signal(signal.SIGTERM, self.tidy_up)
        if file := options.get("--spawn-child"):
            words = [sys.executable, "-c", "import time; time.sleep(600)"]
            child = os.posix_spawn(sys.executable, words, os.environ)
            with open(file, "w") as told:
                told.write(str(child))
        time.sleep(self.seconds("--bind-after"))
        listener = socket.create_server((options["--host"], int(options["--port"])))
        threading.Thread(target=self.serve, args=(listener,), daemon=True).start()
        weights = self.load()
        if "--exit-after" in options:
            threading.Timer(self.seconds("--exit-after"), self.end).start()
        while "--never-ready" in options:
            signal.pause()
        if file := options.get("--ready-mark"):
            touch(file)
        self.ready.set()
        log("srv          main: model loaded")
        address = f"http://{options['--host']}:{options['--port']}"
        log(f"srv          main: server is listening on {address}")
        work(self.seconds("--work"))
        while "--flood" in options:
            began, lines = time.monotonic(), int(options["--flood"]) // 10
            sys.stderr.write("".join(f"flood {n:08} {'~' * 80}\n" for n in range(lines)))
            sys.stderr.flush()
            time.sleep(max(0.0, began + 0.1 - time.monotonic()))
        if file := options.get("--blurt"):
            with open(file, "rb") as blurted:
                sys.stderr.buffer.write(blurted.read())
            sys.stderr.buffer.flush()
        while "--chatter" not in options:
            signal.pause()
        began, written = time.monotonic(), 0
        while True:
            due = int((time.monotonic() - began) * int(options["--chatter"]))
            sys.stderr.write("".join(f"chatter {n} {len(weights)}\n" for n in range(written, due)))
            sys.stderr.flush()
            written = due
            time.sleep(0.01)

    def tidy_up(self, *_: object) -> None:
        time.sleep(0.5)
        touch(self.options["--tidy-up"])
        os._exit(0)

    def end(self) -> None:
        if words := self.options.get("--last-words"):
            log(words)
        code = int(self.options.get("--exit-code", 0))
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
        Server(parse(sys.argv[1:])).run()
