"""Reading answers: those of the real engine, and what comes where an answer should."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread, get_ident
from typing import Any

import anyio
import httpx
import pytest

from kitty_nb import ModelManager, ServerConfig
from kitty_nb.client import Access, Answer, Piece, Ranked
from kitty_nb.client.conversation import converse
from kitty_nb.client.embeddings import embed, rerank
from kitty_nb.client.protocol import Connections
from kitty_nb.errors import ExperimentError, NoAnswerError, ServerError
from kitty_nb.experiments.measure import BenchmarkClient
from kitty_nb.experiments.recording import ask as record_answers
from kitty_nb.experiments.run_record import Request
from kitty_nb.experiments.trial import Workload
from kitty_nb.supervisor.health import HealthProbe, Identity
from kitty_nb.supervisor.router_program import LlamaServer, router_api

Says = Callable[..., Access]
STREAM = "text/event-stream"
SEPARATORS = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"


@pytest.fixture
def says() -> Iterator[Says]:
    """A server that answers each request by the same bytes; of several, by the next."""
    answer: dict[str, Any] = {"kind": STREAM, "bodies": [b""]}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", answer["kind"])
            self.end_headers()
            bodies = answer["bodies"]
            self.wfile.write(bodies.pop(0) if len(bodies) > 1 else bodies[0])

        def do_GET(self) -> None:
            self.headers["Content-Length"] = "0"
            self.do_POST()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()

    def say(*bodies: str, kind: str = STREAM) -> Access:
        answer.update(kind=kind, bodies=[body.encode() for body in bodies])
        return Access(f"http://127.0.0.1:{server.server_port}", None)

    yield say
    server.shutdown()
    server.server_close()
    thread.join()


def chat(access: Access) -> tuple[str, list[Piece]]:
    pieces: list[Piece] = []

    async def ask() -> str:
        async with access.async_http() as http:
            return str(await converse(http, {"messages": []}, pieces.append))

    return anyio.run(ask), pieces


def events(*deltas: dict[str, object], finish: str | None = "stop", space: str = " ") -> str:
    ends = [{"delta": {}, "finish_reason": finish}] if finish else []
    chunks = [{"choices": [choice]} for choice in [*({"delta": one} for one in deltas), *ends]]
    return "".join(f"data:{space}{json.dumps(one)}\n\n" for one in chunks) + "data: [DONE]\n\n"


def test_an_answer_may_hold_any_separator_of_lines(
    config: ServerConfig, engine: Path | None
) -> None:
    grammar = "".join(f"\\u{ord(letter):04x}" for letter in SEPARATORS)
    options = {"grammar": f'root ::= "{grammar}"', "max_tokens": 64}
    with ModelManager(config=config.replace(binary=engine)) as manager:
        manager.start().wait(60)
        assert manager.chat("Say it.", **options).wait(60).text == SEPARATORS


def test_a_trial_reads_them_too(says: Says) -> None:
    part = {"content": SEPARATORS, "timings": {"prompt_n": 0, "predicted_n": 1}}
    access = says(f"data:{json.dumps(part, ensure_ascii=False)}\n\n")

    async def trial() -> str:
        async with access.async_http() as http:
            client = BenchmarkClient(http, Workload(prompts=("Say it.",), chat=False), {})
            await client.warm_up()
            _, (answer,) = await client.speed(1, lambda _: None)
        return answer.exchange.output

    assert anyio.run(trial) == SEPARATORS


@pytest.mark.parametrize("per_second", [30.0, 20.0])  # by older builds, and by newer ones
def test_the_first_token_counts_in_no_speed(says: Says, per_second: float) -> None:
    timings = {"predicted_n": 3, "predicted_ms": 100.0, "predicted_per_second": per_second}

    async def ask() -> None:
        choice = {"message": {"content": "so"}, "finish_reason": "stop"}
        said = json.dumps({"choices": [choice], "timings": timings})
        async with says(said, kind="application/json").async_http() as http:
            answer = await converse(http, {"messages": []}, lambda _: None)
            assert answer.timings.answer_per_second == 20
        access = says(f"data:{json.dumps({'content': 'so', 'timings': timings})}\n\n")
        async with access.async_http() as http:
            client = BenchmarkClient(http, Workload(prompts=("Say it.",), chat=False), {})
            await client.warm_up()
            speed, _ = await client.speed(1, lambda _: None)
            assert speed.generation_tokens_per_second == 20

    anyio.run(ask)


def test_an_answer_is_read_however_it_is_spelled(says: Says) -> None:
    parts = {"role": "assistant", "content": None}, {"content": "so"}, {"content": "!"}
    assert chat(says(events(*parts, space=""))) == ("so!", [Piece("so"), Piece("!")])
    unasked = 'data: {"usage": {"total_tokens": 3}}\n\n: ping\n\ndata: {"choices": []}\n\n'
    assert chat(says(unasked + events(*parts)))[0] == "so!"
    assert chat(says(events(*parts).replace("\n", "\r\n")))[0] == "so!"
    whole = {"choices": [{"message": {"content": "so!"}, "finish_reason": "stop"}]}
    assert chat(says(json.dumps(whole), kind="application/json; charset=utf-8"))[0] == "so!"
    assert chat(says(events())) == ("", [])  # the model chose to say nothing


CALL = {"index": 0, "function": {"name": "weather", "arguments": "{"}}
MORE = {"index": 0, "function": {"arguments": "}"}}
THOUGHT = {"reasoning_content": "Hm"}


@pytest.mark.parametrize(
    ("deltas", "finish", "reason"),
    [
        ([THOUGHT, THOUGHT], "length", "still thinking when the answer reached a limit"),
        ([THOUGHT], "stop", "gave no answer after thinking"),
        ([], "length", "said nothing yet when the answer reached a limit"),
        ([{"tool_calls": [CALL]}, {"tool_calls": [MORE]}], "tool_calls", "tool .*: weather[.] "),
    ],
)
def test_what_came_in_place_of_an_answer_is_told(
    says: Says, deltas: list[dict[str, object]], finish: str, reason: str
) -> None:
    with pytest.raises(NoAnswerError, match=reason):
        chat(says(events(*deltas, finish=finish)))


THINKING = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}
"""


def test_a_model_that_only_thought_has_not_answered(
    config: ServerConfig, engine: Path | None, tmp_path: Path
) -> None:
    template = tmp_path / "thinking.jinja"
    template.write_text(THINKING)
    flags = ("--chat-template-file", str(template))
    pieces: list[Piece] = []
    options = {"grammar": 'root ::= "<think>\\n" [a-z ]*', "max_tokens": 32}
    wanted = config.replace(binary=engine, extra_args=flags, tool_calling=True)
    with ModelManager(config=wanted) as manager:
        manager.start().wait(60)
        with pytest.raises(NoAnswerError, match=r"still thinking when .* LLAMACPP_N_PREDICT"):
            manager.chat("Think.", pieces.append, **options).wait(60)
    assert pieces
    assert all(piece.thinking for piece in pieces)


def call(name: str, arguments: str) -> str:
    begun = {"index": 0, "id": "a", "function": {"name": name, "arguments": ""}}
    rest = {"index": 0, "function": {"arguments": arguments}}
    return events({"tool_calls": [begun]}, {"tool_calls": [rest]}, finish="tool_calls")


def test_tools_are_run_until_the_model_answers(says: Says) -> None:
    threads: list[int] = []

    def weather(city: str, days: int = 1) -> dict[str, Any]:
        """Look up the weather of a city."""
        threads.append(get_ident())
        return {"city": city, "days": days}

    async def broken() -> None:
        raise ValueError("out of order")

    calls = [
        call("weather", '{"city": "Rome", "days": "2"}'),
        call("weather", '{"days": 1}'),
        call("broken", "{}"),
        call("unknown", "{}"),
    ]
    tools = weather, broken

    def talk(*bodies: str, max_rounds: int = 10) -> Answer:
        async def ask() -> Answer:
            async with says(*bodies).async_http() as http:
                request = {"messages": [], "tool_choice": "required"}
                return await converse(http, request, print, None, tools, max_rounds)

        return anyio.run(ask)

    answer = talk(*calls, events({"content": "It is fine."}))
    assert answer.text == "It is fine."
    rome, incomplete, failed, unknown = (call.result or "" for call in answer.tool_calls)
    assert json.loads(rome) == {"city": "Rome", "days": 2}
    assert "city" in incomplete
    assert "out of order" in failed
    assert unknown == "Error: there is no tool unknown. The tools are weather, broken."
    assert threads
    assert get_ident() not in threads  # one that blocks has a thread of its own
    threads.clear()
    with pytest.raises(NoAnswerError, match="called tools 2 times without answering"):
        talk(call("weather", '{"city": "Rome"}'), max_rounds=2)
    assert len(threads) == 2


def test_documents_are_ranked_by_score(says: Says) -> None:
    rows = [{"index": number, "relevance_score": score} for number, score in enumerate([1, 3, 2])]
    access = says(json.dumps({"results": rows}), kind="application/json")

    async def ask() -> list[Ranked]:
        async with access.async_http() as http:
            assert await rerank(http, "which", [], None) == []
            return await rerank(http, "which", ["a", "b", "c"], 2)

    assert anyio.run(ask) == [Ranked(1, 3, "b"), Ranked(2, 2, "c")]


@pytest.mark.parametrize(
    "said",
    [
        {"choices": [None]},
        {"choices": [{"delta": {"tool_calls": [None, {"function": None}], "content": 1}}]},
        {"choices": [{"message": "x"}], "prompt_progress": {"total": "x"}, "timings": ["x"]},
    ],
)
def test_an_answer_of_another_shape_is_no_answer(says: Says, said: dict[str, Any]) -> None:
    with pytest.raises(ServerError, match="ended early"):
        chat(says(json.dumps(said), kind="application/json"))


@pytest.mark.parametrize(
    "data",
    [None, [None], [], [{"index": 0}], [{"index": 1, "embedding": "AAAAAA=="}],
     [{"index": 0, "embedding": "AAA="}], [{"index": 0, "embedding": "!!"}]],
)  # fmt: skip
def test_vectors_of_another_shape_are_refused(says: Says, data: object) -> None:
    access = says(json.dumps({"data": data}), kind="application/json")

    async def ask() -> None:
        async with access.async_http() as http:
            await embed(http, ["a"], 1, print)

    with pytest.raises(ServerError, match="answer like llama-server"):
        anyio.run(ask)


PAGE = "<!doctype html>\n<title>Log in</title>" + "x" * 1000
NOT_OURS = [
    (PAGE, "text/html", "200 and text/html: '<!doctype html> <title>Log in</title>x"),
    ('{"detail": "Log in first"}', "application/json", "Log in first"),
    ("[1]", "application/json", "Check what listens there"),
    ("data: <html>\n\n", STREAM, "Check what listens there"),
    ("", STREAM, "Check what listens there"),
]


@pytest.mark.parametrize(("body", "kind", "reason"), NOT_OURS)
def test_another_program_is_told_from_a_server(
    says: Says, body: str, kind: str, reason: str
) -> None:
    access = says(body, kind=kind)
    with pytest.raises(ServerError, match=reason) as caught:
        chat(access)
    assert access.endpoint in str(caught.value)
    assert len(str(caught.value)) < 500
    with pytest.raises(ExperimentError, match="did not answer like"):
        anyio.run(record_answers, access, [Request(text="a")])


def test_an_answer_without_an_end_is_broken_off(says: Says) -> None:
    with pytest.raises(ServerError, match="ended early"):
        chat(says(events({"content": "half"}, finish=None)))
    with pytest.raises(ServerError, match="failed midway: it is full"):
        chat(says('data: {"error": {"message": "it is full"}}\n\n'))


def test_silence_is_not_called_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitty_nb.client.protocol._TIMEOUT", httpx.Timeout(0.1, connect=5))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        access = Access(f"http://127.0.0.1:{silent.getsockname()[1]}", None)
        with pytest.raises(ServerError, match=r"Nothing came for 0\.1 s: the server is busy"):
            chat(access)


@pytest.mark.parametrize(
    "body", ["[]", "[1]", "{}", '{"data": [1, {}, {"status": "?"}]}', "<html>"]
)
def test_whatever_a_server_says_of_itself_is_survived(says: Says, body: str) -> None:
    async def look() -> None:
        endpoint = says(body, kind="application/json").endpoint
        port = int(endpoint.rpartition(":")[2])
        probe = HealthProbe(ServerConfig(port=port, alias="ours"), trusted=True)
        assert (await probe.check_activity()).slots_total is None
        async with anyio.create_task_group() as tasks:
            assert await router_api(probe, tasks) is None
        assert "loaded" not in (await LlamaServer(probe).models()).values()
        found = await probe.identify()
        assert found is (Identity.OTHER_MODEL if "status" in body else Identity.OURS)
        await probe.aclose()

    anyio.run(look)


def test_requests_at_once_to_another_server_share_one_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[httpx.AsyncClient] = []
    made, close = Access.async_http, httpx.AsyncClient.aclose

    def make(access: Access) -> httpx.AsyncClient:
        opened.append(made(access))
        return opened[-1]

    async def close_slowly(client: httpx.AsyncClient) -> None:
        await anyio.sleep(0.01)
        await close(client)

    async def ask() -> None:
        connections = Connections()
        first, second = (Access(f"http://localhost:{port}", None) for port in (1, 2))
        await connections.requests(first)
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(connections.requests, second)
        await connections.aclose()

    monkeypatch.setattr(Access, "async_http", make)
    monkeypatch.setattr(httpx.AsyncClient, "aclose", close_slowly)
    anyio.run(ask)
    assert [http.is_closed for http in opened] == [True, True]
