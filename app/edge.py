"""What every request passes first and last: counts, the rate of its client, the rest of its body, and the farewell."""

import asyncio
import time
from contextlib import suppress
from threading import Event

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER = 1.0
"""Seconds for which the rest of a refused request is read and thrown away: a client that is still sending would
otherwise find its connection reset, and might never see why."""

PATHS = ("/predict", "/model", "/model.onnx", "/healthz", "/readyz", "/metrics", "/openapi.json")


class Edge:
    """Wraps the application: counts its answers, and ends connections that cannot or should not go on."""

    def __init__(self, app: ASGIApp, stopping: Event, registry: CollectorRegistry) -> None:
        self._app, self._stopping = app, stopping
        self._requests = Counter("classifier_requests", "Answers.", ["path", "status"], registry=registry)
        self._seconds = Histogram(
            "classifier_predict_seconds",
            "Time from a request's head to the last byte of its predictions.",
            buckets=[0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40],
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        headers = dict(scope["headers"])
        unread = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers

        async def receive_body() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and bool(message.get("more_body"))
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if unread or self._stopping.is_set():
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            if unread and message["type"] == "http.response.body" and not message.get("more_body"):
                await send({**message, "more_body": True})
                with suppress(TimeoutError):
                    async with asyncio.timeout(LINGER):
                        while unread:
                            await receive_body()
                message = {"type": "http.response.body"}
            await send(message)

        try:
            await self._app(scope, receive_body, answer)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "page"
            self._requests.labels(path, status).inc()
            if path == "/predict" and status == 200:
                self._seconds.observe(time.perf_counter() - began)


class Rate:
    """How often a client may come: the generic cell rate algorithm (ITU-T I.371), which keeps one number a client."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, burst
        self._due: dict[str, float] = {}  # when a client that keeps to the rate would come next
        self._sweep_at = 1000

    def wait(self, client: str) -> float:
        """Count a request, or give the seconds after which it would be in time."""
        if not self._rate:
            return 0.0
        now = time.monotonic()
        due = max(self._due.get(client, now), now)
        if (early := due - now - (self._burst - 1) / self._rate) > 0:
            return early
        self._due[client] = due + 1 / self._rate
        if len(self._due) > self._sweep_at:
            self._due = {name: then for name, then in self._due.items() if then > now}
            self._sweep_at = max(1000, 2 * len(self._due))
        return 0.0
