"""The HTTP side of what runs elsewhere: servers that share the load, and that may be away for a while."""

from __future__ import annotations

import asyncio
import concurrent.futures as futures
import io
import json
import logging
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import aiohttp

from ..escaping import one_line
from ..exceptions import ConfigurationError, RolloutServerError, ServerError, TeacherServerError
from ..redaction import redacted

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PASSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 5.0  # seconds between two attempts, unless the server asks for more
_LONGEST_ASKED = 30.0
_BROKEN_ANSWERS = 3  # so often one question may fail inside a server, or be answered by nonsense
_CONNECT_TIMEOUT = 5.0
_SILENT = 2.0  # seconds before anybody is told that servers are away
_GRACE = 3.0  # seconds for answers that are on their way when a run is asked to end
_ERROR_BYTES = 2**16  # of the body of a refusal
SMALL = 2**20  # bytes of an answer that describes something


@dataclass(frozen=True)
class Whose:
    """What a server is for, as messages name it.

    Args:
        name: "teacher's server".
        error: what is raised when it refuses or stays away.
        patience: the setting of how long it is waited for.
        token: the environment variable with the token that requests bear.
    """

    name: str
    error: type[ServerError]
    patience: str
    token: str


TEACHER = Whose("teacher's server", TeacherServerError, "`teacher_server_patience`", "DISTILL_TEACHER_TOKEN")
ROLLOUTS = Whose("rollout server", RolloutServerError, "`server_patience` of `vllm_kwargs`", "DISTILL_ROLLOUT_TOKEN")


class Again(Exception):
    """An attempt failed in a way that may pass.

    Args:
        retry_after: seconds that the server asks to wait.
        broken: the server was there, but failed or answered nonsense, which waiting may not fix.
    """

    def __init__(self, reason: str, retry_after: float = 0.0, broken: bool = False):
        super().__init__(_shown(reason))
        self.retry_after, self.broken = retry_after, broken


def parse_servers(text: str, whose: Whose = TEACHER) -> list[str]:
    """Read the addresses in `text`, without `/v1` at their end.

    Raises:
        ConfigurationError: one is no address, holds a password, or comes twice.
    """
    addresses = []
    for part in text.split(","):
        address = part.strip().rstrip("/").removesuffix("/v1").rstrip("/")
        try:
            url = urlsplit(address)
            whole = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            whole = False
        if not whole or url.query or url.fragment or " " in address:
            raise ConfigurationError(
                f"Got {part.strip()!r} as the address of a {whose.name}; expected `http://host:port`, several with "
                "commas between."
            )
        if url.username or url.password:
            raise ConfigurationError(
                f"The address of the {whose.name} at {url.hostname} holds a user or password, which would end up "
                f"in logs. Put the server's token into the environment variable {whose.token}."
            )
        if address in addresses:
            raise ConfigurationError(f"The {whose.name} {address} is named twice.")
        addresses.append(address)
    return addresses


class _Client:
    """aiohttp in a thread of its own: whatever a server does, an answer has one deadline and a cap on its bytes."""

    def __init__(self, concurrency: int, timeout: float):
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=min(_CONNECT_TIMEOUT, timeout))
        self._concurrency = concurrency
        self._session: aiohttp.ClientSession | None = None
        self._ended = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server-http", daemon=True)
        self._thread.start()

    def fetch(
        self, verb: str, url: str, body: bytes | None, headers: dict[str, str], most: int
    ) -> tuple[int, Any, bytes]:
        """Return status, headers and body of an answer.

        Raises:
            Again: no answer in time, or one of more than `most` bytes.
        """
        work = self._fetch(verb, url, body, headers, most)
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except TimeoutError:
            raise Again("time-out") from None
        except (aiohttp.ClientError, OSError) as error:
            refused = isinstance(error, aiohttp.ClientConnectorError)
            raise Again("connection refused" if refused else type(error).__name__) from error
        except (futures.CancelledError, RuntimeError) as error:  # the latter: the loop is closed
            work.close()
            raise Again("called off") from error

    async def _fetch(
        self, verb: str, url: str, body: bytes | None, headers: dict[str, str], most: int
    ) -> tuple[int, Any, bytes]:
        if self._ended:
            raise asyncio.CancelledError
        if self._session is None:
            # Nothing is decompressed: a small answer must not become a large one.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, limit_per_host=self._concurrency),
                headers={"Accept-Encoding": "identity"},
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        question, data = None if body is None else io.BytesIO(body), bytearray()
        async with self._session.request(
            verb, url, data=question, headers=headers, timeout=self._timeout, allow_redirects=False
        ) as answer:
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise Again(f"{url} answers in an encoding that was not asked for", broken=True)
            most, size = most if answer.status == 200 else _ERROR_BYTES, answer.content_length or 0
            while size <= most and (piece := await answer.content.read(2**16)):
                data += piece
                size = max(size, len(data))
            if size > most:
                answer.close()  # the rest is not read
                raise Again(f"{url} answers with more than the {most:,} bytes that it may", broken=True)
            return answer.status, answer.headers, bytes(data)

    def end_soon(self) -> None:
        """Call off what is not answered within seconds, and whatever comes after. A signal's handler may call it."""

        def call_off() -> None:
            self._ended = True
            for task in asyncio.all_tasks(self._loop):
                task.cancel()

        self._loop.call_soon_threadsafe(self._loop.call_later, _GRACE, call_off)

    def close(self) -> None:
        """Drop all connections and end the thread."""

        async def close() -> None:
            self._ended = True
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._session is not None:
                await self._session.close()
            self._loop.stop()

        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(close(), self._loop)
            if threading.current_thread() is not self._thread:  # garbage is collected wherever it may be
                self._thread.join()
                self._loop.close()


class Endpoint:
    """One server, and how it has been doing."""

    def __init__(self, url: str, client: _Client, token: str | None, whose: Whose = TEACHER):
        self.whose = whose
        self.url = url
        self.in_flight = self.failures = 0
        self.not_before = 0.0
        self._client = client
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def request(
        self, path: str, body: bytes | None = None, kind: str = "application/octet-stream", most: int = SMALL
    ) -> bytes:
        """Return the body of the answer to a GET, or to a POST of `body`, of at most so many bytes.

        Raises:
            Again: it may work later.
            ServerError: the server refuses, and will again; of the class of `whose`.
        """
        headers = self._headers if body is None else {**self._headers, "Content-Type": kind}
        status, said, data = self._client.fetch("GET" if body is None else "POST", self.url + path, body, headers, most)
        if status == 200:
            return data
        reason = f"{status} {_reason(data)}".strip()
        if status in _PASSES:
            raise Again(reason, _asked_wait(said), broken=status == 500)
        raise self.whose.error(f"The {self.whose.name} {self.url} refuses: {reason}", status)

    def json(self, path: str, question: Any = None, most: int = SMALL) -> Any:
        """Do as `request`, in JSON both ways."""
        body = None if question is None else json.dumps(question).encode()
        answer = self.request(path, body, "application/json", most)
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise Again("the answer is not JSON", broken=True) from error


class Attempt(Generic[T]):
    """A call that runs on some server in the background, until it is waited for."""

    def __init__(self, servers: Servers, call: Callable[[Endpoint], T]):
        self._servers, self._call = servers, call
        self._future = servers.submit(call)

    def result(self) -> T:
        """Return what the call gave, on whichever server, tried again while servers are away.

        Raises:
            ServerError: a server refuses, answers nonsense again and again, or none is back in time.
        """
        since, broken = None, 0
        while True:
            try:
                return self._future.result()
            except Again as again:
                since = since or time.monotonic()
                broken += again.broken
                away = time.monotonic() - since
                if away > self._servers.patience or broken >= _BROKEN_ANSWERS or self._servers.waits_no_more:
                    whose = self._servers.whose
                    raise whose.error(
                        f"No {whose.name} gave an answer ({self._servers.names}; the last: {again}), tried for "
                        f"{away:.0f} s. Start it again, and the run with `--resume_from_checkpoint true`; "
                        f"{whose.patience} says how long a server is waited for."
                    ) from again
                self._servers.wait_for_any(str(again), away)
                self._future = self._servers.submit(self._call)

    def cancel(self) -> None:
        """Forget about it, if it has not begun."""
        self._future.cancel()


class Servers:
    """Servers of one model; each call goes to the one with the fewest in flight among those that are not away.

    Args:
        token: that requests bear.
        timeout: seconds after which an attempt has failed that has no whole answer.
        patience: seconds for which servers that are away are waited for.
        whose: what they serve, for messages.
    """

    def __init__(
        self,
        urls: Sequence[str],
        token: str | None,
        concurrency: int,
        timeout: float,
        patience: float,
        whose: Whose = TEACHER,
    ):
        self.patience, self.whose = patience, whose
        self._client = _Client(concurrency, timeout)
        self.endpoints = [Endpoint(url, self._client, token, whose) for url in urls]
        self._threads = futures.ThreadPoolExecutor(concurrency, thread_name_prefix="server-client")
        self._lock = threading.Lock()
        self._turn = 0
        self.waits_no_more = False
        self._told = False  # whether it was said that servers are away
        self.close = weakref.finalize(self, _close, self._threads, self._client)

    @property
    def names(self) -> str:
        return ", ".join(endpoint.url for endpoint in self.endpoints)

    def start_with(self, number: int) -> None:
        """Start with one server; processes that start with different ones share them evenly."""
        self._turn = number

    def submit(self, call: Callable[[Endpoint], T]) -> futures.Future[T]:
        """Make an attempt in the background."""
        return self._threads.submit(self._run, call)

    def wait_for_any(self, reason: str, away: float) -> None:
        """Sleep until some server may be tried again; once it takes long, say so."""
        if away > _SILENT and not self._told:
            self._told = True
            how_long = self.patience - away
            words = "Waiting for the %s %s (%s), %.0f s more."
            logger.warning(words, self.whose.name, self.names, reason, how_long)
        end = min(endpoint.not_before for endpoint in self.endpoints)
        while not self.waits_no_more and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def stop_waiting(self) -> None:
        """Stop waiting for servers that are away, or silent. A signal's handler may call it."""
        self.waits_no_more = True
        self._client.end_soon()

    def _run(self, call: Callable[[Endpoint], T]) -> T:
        endpoint = self._pick()
        try:
            answer = call(endpoint)
            endpoint.failures, endpoint.not_before, self._told = 0, 0.0, False
            return answer
        except Again as again:
            with self._lock:
                endpoint.failures += 1
                pause = min(_LONGEST_WAIT, 0.1 * 2 ** min(endpoint.failures, 10)) * random.uniform(0.5, 1.0)
                endpoint.not_before = time.monotonic() + max(pause, min(again.retry_after, _LONGEST_ASKED))
            raise
        finally:
            with self._lock:
                endpoint.in_flight -= 1

    def _pick(self) -> Endpoint:
        with self._lock:
            now, count = time.monotonic(), len(self.endpoints)
            order = [self.endpoints[(self._turn + i) % count] for i in range(count)]
            self._turn += 1
            chosen = min(order, key=lambda endpoint: (max(0.0, endpoint.not_before - now), endpoint.in_flight))
            chosen.in_flight += 1
            return chosen


def _close(threads: futures.ThreadPoolExecutor, client: _Client) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    client.close()


def _reason(body: bytes) -> str:
    """What an error's body says, ours or an OpenAI-compatible server's."""
    try:
        content = json.loads(body)
        content = content.get("error", content.get("message", content)) if isinstance(content, dict) else content
        content = content.get("message", content) if isinstance(content, dict) else content
    except (ValueError, RecursionError):
        content = body.decode("utf-8", errors="replace")
    return _shown(str(content))


def _shown(text: str) -> str:
    """Words of a server: they end on a terminal, whose cursor they could move, and they may repeat the token."""
    shown = one_line(redacted(text))
    return "".join(c if c.isprintable() else " " for c in shown)[:300]  # unassigned characters, too


def _asked_wait(headers: Any) -> float:
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0
