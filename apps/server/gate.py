"""What every request passes first: the key, room for one more, and a body that is neither too large nor too slow."""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import TYPE_CHECKING

from .errors import Refusal, overloaded
from .metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 16 * 2**20  # bytes of one request
MAX_BODIES = 4 * MAX_BODY  # bytes of all requests that wait or are worked on
BODY_SECONDS = 30.0
UNGUARDED = ("/health",)  # what a load balancer asks without a key


class Gate:
    """ASGI middleware that lets at most `queue` requests with a body in at a time and refuses the others at once.

    Bodies are read here, so that their size together is bounded and a slow sender cannot keep a place.

    Args:
        app: what comes behind.
        queue: requests that may wait or be worked on.
        api_key: what clients must send as `Authorization: Bearer KEY`; None lets everybody in.
        metrics: where requests are counted.
        paths: those that are counted under their own name.
    """

    def __init__(self, app: ASGIApp, *, queue: int, api_key: str | None, metrics: Metrics, paths: Collection[str]):
        self.app, self.queue, self.metrics, self.paths = app, queue, metrics, frozenset(paths)
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()
        self.in_work = self.bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refusal, or pass the request on with its body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), "500"

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._admit(scope, receive, counted)
        except Refusal as refusal:
            await refusal.response()(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.add("textcond_requests_total", path=path, status=status)
            self.metrics.observe("textcond_request_seconds", time.monotonic() - started, path=path)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        guarded = self.expected is not None and scope["path"] not in UNGUARDED
        # bytes, as compare_digest takes no strings beyond ASCII
        if guarded and not hmac.compare_digest(headers.get(b"authorization", b""), self.expected):
            message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            raise Refusal(401, message, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        if self.in_work >= self.queue:
            raise overloaded(f"the server is busy with {self.in_work} requests: try again in a moment")
        self.in_work += 1
        self.metrics.add("textcond_requests_in_work", 1)
        held = _Held(self)
        try:
            body = await _read(receive, headers, held)
            await self.app(scope, _replay(body, receive), send)
        finally:
            self.in_work -= 1
            self.metrics.add("textcond_requests_in_work", -1)
            held.free()


class _Held:
    """The bytes that one request keeps in memory, as part of those of all."""

    def __init__(self, gate: Gate):
        self.gate, self.size = gate, 0

    def take(self, size: int) -> None:
        self.size += size
        self.gate.bytes += size
        if self.size > MAX_BODY:
            raise Refusal(413, f"the request is larger than {MAX_BODY:,} bytes: send less at a time", "too_large")
        if self.gate.bytes > MAX_BODIES:
            raise overloaded("the server holds as many bytes of requests as it may: try again in a moment")

    def free(self) -> None:
        self.gate.bytes -= self.size
        self.size = 0


async def _read(receive: Receive, headers: dict[bytes, bytes], held: _Held) -> bytes:
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > MAX_BODY:
        message = f"the request has {int(announced):,} bytes, more than {MAX_BODY:,}: send less at a time"
        raise Refusal(413, message, "too_large", {"Connection": "close"})
    parts, more = [], True
    deadline = time.monotonic() + BODY_SECONDS
    while more:
        try:
            message = await asyncio.wait_for(receive(), deadline - time.monotonic())
        except asyncio.TimeoutError:
            raise Refusal(
                408, f"the request's body did not come within {BODY_SECONDS:.0f} s", "timeout", {"Connection": "close"}
            ) from None
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the client went away before its request was complete", "disconnected")
        held.take(len(message.get("body", b"")))
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body, then what the connection gives."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
