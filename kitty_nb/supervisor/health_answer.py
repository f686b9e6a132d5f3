"""Answers of a server's `/health`, and asking for one, for whoever does not watch."""

from __future__ import annotations

import http.client
import time
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kitty_nb.supervisor.events import HealthCheckResult, ServerStatus

if TYPE_CHECKING:
    from kitty_nb.config import ServerConfig

_ANSWER_WITHIN = 5.0  # seconds
NOT_IN_TIME = HealthCheckResult(ServerStatus.STARTING, message="no answer in time")
NOT_YET = HealthCheckResult(ServerStatus.STARTING, message="no answer yet")


def read_answer(status: int, reason: str, latency: float) -> HealthCheckResult:
    """Read an answer: 503 is LOADING, 200 is READY."""
    if status == HTTPStatus.OK:
        return HealthCheckResult(ServerStatus.READY, latency, "ok")
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return HealthCheckResult(ServerStatus.LOADING, latency, "loading model")
    elsewhere = status == HTTPStatus.NOT_FOUND
    why = "; a script may have told it to serve elsewhere (--api-prefix)" if elsewhere else ""
    return HealthCheckResult(
        ServerStatus.STARTING, latency, f"/health answered {status} {reason}{why}"
    )


def ask_once(config: ServerConfig) -> HealthCheckResult:
    """Ask `/health`, without a key and by no proxy. It blocks.

    Not by httpx, whose import takes several times as long as all else that a look needs.
    """
    began = time.perf_counter()
    where = urlsplit(config.endpoint)
    connection = http.client.HTTPConnection(
        where.hostname or "", where.port, timeout=_ANSWER_WITHIN
    )
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
    except TimeoutError:
        return NOT_IN_TIME
    except (OSError, http.client.HTTPException):
        return NOT_YET
    finally:
        connection.close()
    return read_answer(answer.status, answer.reason, time.perf_counter() - began)
