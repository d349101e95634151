"""HTTP in front of `TeacherService`: FastAPI and uvicorn, with what keeps strangers and slow clients off.

    GET  /health       whether it answers; needs no token, as does /version
    GET  /version      version of the package and of the protocol
    GET  /v1/info      what the teacher is, what it tells, what it takes on
    GET  /v1/load      what waits and runs now, and what was done so far
    GET  /v1/head      the teacher's head, as `wire.pack_head` wrote it
    POST /v1/signal    a `wire.Question`, answered by arrays

Whatever is refused is refused with JSON `{"error": reason}` and a status that says whether to come again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import signal
import socket
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import h11
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from ... import __version__
from ...exceptions import ConfigurationError
from .service import Held, Refusal, TeacherService
from .wire import PROTOCOL, Question, WireError, unpack_question

_PIECE = 2**20
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Door:
    """Connections of strangers: those that have not shown the token yet. The oldest go when too many wait.

    So whoever holds connections open without the token takes places from others of his kind alone.

    Args:
        most: strangers that may stay.
        grace: seconds in which nobody is sent away: honest clients come in crowds, too.
    """

    def __init__(self, most: int = 64, grace: float = 1.0):
        self._most, self._grace = most, grace
        self._strangers: dict[Any, tuple[float, asyncio.Transport]] = {}

    def enter(self, client: Any, transport: asyncio.Transport) -> None:
        now = time.monotonic()
        self._strangers[client] = now, transport
        while len(self._strangers) > self._most:
            oldest = next(iter(self._strangers))
            since, its_transport = self._strangers[oldest]
            if now - since < self._grace:
                break
            del self._strangers[oldest]
            its_transport.abort()

    def leave(self, client: Any) -> None:
        """Forget a connection that is over, or that is no stranger's any more."""
        self._strangers.pop(client, None)


def build_app(
    service: TeacherService, token: str | None = None, hosts: frozenset[str] | None = None, door: Door | None = None
) -> FastAPI:
    """Build the application; it closes the service when the server stops.

    Args:
        token: that requests must bear; None lets everybody in.
        hosts: names by which the server may be called; None allows any. Without a token, a page in a browser of this
            machine could have a name of its own lead here (DNS rebinding).
        door: is told who is no stranger.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    async def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise Refusal(401, "This server wants its bearer token (`Authorization: Bearer …`).")
        if door is not None:
            door.leave(request.client and tuple(request.client))

    async def refuse(request: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, Refusal)
        headers = {"Connection": "close"} if refusal.status in (401, 408, 413) else {}  # the rest is not read
        if refusal.retry_after is not None:
            headers["Retry-After"] = f"{refusal.retry_after:g}"
        return JSONResponse({"error": str(refusal)}, refusal.status, headers)

    async def check_host(request: Request) -> None:
        name = request.headers.get("host", "")
        with contextlib.suppress(ValueError):  # what is no address is none of its names either
            name = urlsplit(f"//{name}").hostname or ""
        if hosts is not None and name not in hosts:
            raise Refusal(421, f"This server is not {name!r}. Call it by its address, or give it a token.")

    app = FastAPI(
        lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(check_host)]
    )
    app.add_exception_handler(Refusal, refuse)
    closed = APIRouter(prefix="/v1", dependencies=[Depends(check_token)])

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict[str, Any]:
        return {"version": __version__, "protocol": PROTOCOL}

    @closed.get("/info")
    async def info() -> dict[str, Any]:
        return service.info

    @closed.get("/load")
    async def load() -> dict[str, int]:
        return service.load

    @closed.get("/head")
    async def head() -> Response:
        if service.head is None:
            raise Refusal(404, "This teacher's logits cannot be rebuilt from hidden states: it gives no head.")
        return _in_pieces(service.head)

    @closed.post("/signal")
    async def answer(request: Request) -> Response:
        held = service.hold()
        question = await _read(request, service.limits.max_body_bytes, service.limits.slow_timeout, held)
        held.add(service.check(question))
        return await _answer(service, question, request, held)

    app.include_router(closed)
    return app


async def _answer(service: TeacherService, question: Question, request: Request, held: Held) -> Response:
    """The answer, unless it takes too long or nobody waits for it any more."""
    seconds = service.limits.request_timeout
    waiting: asyncio.Future[bytes] = asyncio.wrap_future(service.submit(question))
    gone: asyncio.Future[None] = asyncio.ensure_future(_disconnected(request))
    both: set[asyncio.Future[Any]] = {waiting, gone}
    try:
        done, _ = await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if waiting in done:
            return _in_pieces(waiting.result(), held)
        if gone in done:
            return Response(status_code=499)
        raise Refusal(503, f"No answer within {seconds:g} s: too much waits.", retry_after=5.0)
    finally:
        waiting.cancel()
        gone.cancel()


def _in_pieces(data: bytes, held: Held | None = None) -> Response:
    """A response of which each piece must be read in time, not the whole; it counts as `held` as long as it is here."""

    async def pieces(_: Held | None) -> AsyncIterator[bytes]:
        for start in range(0, len(data), _PIECE):
            yield data[start : start + _PIECE]

    return StreamingResponse(
        pieces(held), media_type="application/octet-stream", headers={"Content-Length": str(len(data))}
    )


async def _read(request: Request, most: int, seconds: float, held: Held) -> Question:
    """The question in a request's body, never more than `most` bytes of it, and not for longer than `seconds`."""
    too_large = Refusal(413, f"The question is larger than the {most:,} bytes allowed. Ask in smaller parts.")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                held.add(len(chunk))
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, f"The question did not arrive within {seconds:g} s.") from None
    try:
        return unpack_question(bytes(body))
    except WireError as error:
        raise Refusal(400, f"This is no question of protocol {PROTOCOL}: {error}.") from error


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _PatientProtocol(H11Protocol):
    """uvicorn's HTTP with limits on how long a request may take to come, and on how long an answer may lie unread."""

    seconds = 30.0
    door: Door
    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.door.enter(self.client and tuple(self.client), transport)
        self._wait_for_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:  # answered without its body, which may never end
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("_unread")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_timer")
        self.door.leave(self.client and tuple(self.client))
        super().connection_lost(exc)
        self._stop("_unread")

    def _wait_for_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # the head is there
            self._stop("_timer")
        elif self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self.transport.abort)

    def _stop(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)


def bind(host: str, port: int) -> socket.socket:
    """Open a socket at that address, which does not listen yet; port 0 takes a free one.

    Raises:
        ConfigurationError: the address cannot be had.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise ConfigurationError(
            f"Cannot listen on {host}:{port}: {error}. Choose another `--port` (0 takes a free one) or `--host`."
        ) from error
    return bound


def build_server(
    service: TeacherService,
    token: str | None = None,
    hosts: frozenset[str] | None = LOOPBACK,
    log_requests: bool = False,
) -> uvicorn.Server:
    """Build a uvicorn server of `build_app`; `run(sockets=[bind(host, port)])` serves until it is told to exit.

    Args:
        hosts: names by which it may be called where there is no token; None allows any.
        log_requests: a line for each: who asked, for what, and with which status it was answered.
    """
    limits, door = service.limits, Door()
    protocol = type("Protocol", (_PatientProtocol,), {"seconds": limits.slow_timeout, "door": door})
    config = uvicorn.Config(
        build_app(service, token, hosts if token is None else None, door),
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="info" if log_requests else "warning",
        access_log=log_requests,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(max(1, limits.slow_timeout)),
        timeout_graceful_shutdown=int(max(1, limits.slow_timeout)),
        limit_concurrency=2 * limits.max_queue + 128,  # half of the difference are strangers
    )
    return uvicorn.Server(config)


def serve(service: TeacherService, bound: socket.socket, token: str | None = None, log_requests: bool = False) -> None:
    """Serve until SIGTERM or SIGINT; what runs is finished, what waits is told to come again, then return."""
    host = bound.getsockname()[0]
    hosts = LOOPBACK | {host} if ipaddress.ip_address(host).is_loopback else None
    server = build_server(service, token, hosts, log_requests)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[bound])  # uvicorn raises the signal again once it is done, to the handlers before its own
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        service.close()
