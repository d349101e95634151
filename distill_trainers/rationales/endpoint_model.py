"""A teacher behind an OpenAI-compatible endpoint: many requests at once, retries, a rate limit, tokens and costs."""

from __future__ import annotations

import concurrent.futures as futures
import importlib.util
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..addresses import OPENAI, secret_for
from ..exceptions import ConfigurationError
from ..installing import pip_install
from ..redaction import redacted
from .records import Request, Response

_LONGEST_WAIT = 60.0  # seconds between two attempts
_HEADERS = {"host", "accept", "accept-encoding", "connection", "user-agent", "authorization"}
_HEADERS |= {"content-type", "content-length", "transfer-encoding"}
_PATIENCE = 20  # requests that fail in a row, none having succeeded, before the endpoint is given up


@dataclass(frozen=True)
class EndpointSettings:
    """How an endpoint is used.

    Args:
        base_url: of the endpoint, such as `http://localhost:8000/v1`; None is OpenAI's own.
        api_key_env: environment variable that holds the key; None is `OPENAI_API_KEY` for OpenAI, and no key for
            others. The key goes only where `addresses.secret_for` lets it.
        concurrency: requests in flight at once.
        requests_per_minute: at most; None has no limit.
        timeout: seconds for one attempt.
        max_retries: further attempts after errors that may pass (time-outs, 429, 5xx, broken, empty or cut answers).
        first_wait: seconds before the first of them, doubled for each that follows; `Retry-After` is heeded.
        price_in, price_out: per million tokens of prompts and of completions, in any currency.
        max_cost: ask nothing more once so much was spent.
    """

    model: str
    base_url: str | None = None
    api_key_env: str | None = None
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 512
    concurrency: int = 8
    requests_per_minute: float | None = None
    timeout: float = 120.0
    max_retries: int = 5
    first_wait: float = 1.0
    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float | None = None


class RemoteTextModel:
    """Answers requests through the `openai` client.

    Raises:
        ConfigurationError: the client is not installed, a key is needed and missing or is another address's, the
            endpoint refuses the key or does not know the model, or nothing that is asked gets an answer.
    """

    def __init__(self, settings: EndpointSettings):
        if importlib.util.find_spec("openai") is None:
            raise ConfigurationError(f"Asking an endpoint needs the openai client: {pip_install('remote')}.")
        import openai

        self._address = settings.base_url or OPENAI
        key_env = settings.api_key_env or ("OPENAI_API_KEY" if settings.base_url is None else None)
        key = None if key_env is None else secret_for(key_env, [self._address])
        if key_env is not None and not key:
            raise ConfigurationError(
                f"The environment variable {key_env} holds no key. Set it, or name an endpoint that needs none with "
                "`base_url`, without `api_key_env`."
            )
        self.settings = settings
        self.spent = 0.0
        self._client = openai.OpenAI(
            base_url=self._address,
            api_key=key or "none",
            timeout=settings.timeout,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(
                follow_redirects=False,  # prompts stay with whom they are for
                event_hooks={} if settings.base_url is None else {"request": [_drop_headers]},
            ),
        )
        self._limiter = _Limiter(settings.requests_per_minute)
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def identity(self) -> dict[str, Any]:
        s = self.settings
        sampling = {"max_new_tokens": s.max_tokens, "temperature": s.temperature, "top_p": s.top_p}
        return {"teacher": s.model, "endpoint": redacted(s.base_url or "default"), "sampling": sampling}

    def complete(self, requests: Sequence[Request]) -> Iterator[Response]:
        """Yield answers in the order in which they come. Left early (an error, Ctrl-C), drop what was not begun."""
        self._stop.clear()
        waiting = iter(requests)
        successes = failures = 0
        pool = futures.ThreadPoolExecutor(self.settings.concurrency)
        try:
            running: set[futures.Future[Response]] = set()
            while True:
                while len(running) < 2 * self.settings.concurrency and not self._too_dear():
                    request = next(waiting, None)
                    if request is None:
                        break
                    running.add(pool.submit(self._one, request))
                if not running:
                    break
                done, running = futures.wait(running, return_when=futures.FIRST_COMPLETED)
                for finished in done:
                    response = finished.result()
                    successes, failures = successes + (response.error is None), failures + (response.error is not None)
                    yield response
                    if not successes and failures >= _PATIENCE:
                        raise ConfigurationError(
                            f"None of the first {failures} requests to {self.settings.base_url or 'the endpoint'} was "
                            f"answered (the last: {response.error}). Check that it is up and takes such requests."
                        )
            for request in waiting:
                yield Response(request.key, error="budget spent", attempts=0)
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _too_dear(self) -> bool:
        return self.settings.max_cost is not None and self.spent >= self.settings.max_cost

    def _one(self, request: Request) -> Response:
        attempt, prompt_tokens, completion_tokens = 0, 0, 0
        while True:
            attempt += 1
            self._limiter.wait(self._stop)
            response, retry_after = self._attempt(request)
            prompt_tokens += response.prompt_tokens
            completion_tokens += response.completion_tokens
            last = attempt > self.settings.max_retries or retry_after is None or self._stop.is_set()
            if response.error is None or last:
                counted = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
                return Response(
                    response.key, response.text, response.finish, **counted, error=response.error, attempts=attempt
                )
            wait = max(retry_after, self.settings.first_wait * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
            self._stop.wait(min(wait, _LONGEST_WAIT))

    def _attempt(self, request: Request) -> tuple[Response, float | None]:
        """An answer or an error; and, for an error that may pass, the seconds that the server asks to wait."""
        import openai

        s = self.settings
        messages: Any = request.messages
        try:
            completion = self._client.chat.completions.create(
                model=s.model, messages=messages, temperature=s.temperature, top_p=s.top_p, max_tokens=s.max_tokens
            )
            return self._read(request.key, completion), 0.0
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise ConfigurationError(
                f"The endpoint {s.base_url or ''} refuses every request for {s.model!r}: {_short(error)}. Check "
                f"`teacher`, `base_url` and the key in {s.api_key_env or 'OPENAI_API_KEY'} (`api_key_env`)."
            ) from error
        except openai.APITimeoutError:
            return Response(request.key, error="time-out"), 0.0
        except openai.APIConnectionError:
            return Response(request.key, error="no connection"), 0.0
        except openai.APIStatusError as error:
            passes = error.status_code in (408, 409, 425, 429) or error.status_code >= 500
            return Response(request.key, error=f"status {error.status_code}"), _asked_wait(error) if passes else None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError):
            return Response(request.key, error="malformed answer"), 0.0  # a body that is not what the protocol says

    def _read(self, key: str, completion: Any) -> Response:
        choice = completion.choices[0]
        text, usage = choice.message.content or "", completion.usage
        counts = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
        with self._lock:
            self.spent += (counts[0] * self.settings.price_in + counts[1] * self.settings.price_out) / 1e6
        error = "cut-off answer" if choice.finish_reason == "length" else None if text.strip() else "empty answer"
        return Response(key, text, choice.finish_reason or "stop", *counts, error)


class _Limiter:
    """Lets requests pass at an even rate, whichever thread they come from."""

    def __init__(self, per_minute: float | None):
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        if not self._gap:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        stop.wait(turn - now)


def _drop_headers(request: Any) -> None:
    """Leave only the headers of any request: the client adds what the environment has for OpenAI, to any address."""
    for name in set(request.headers) - _HEADERS:
        del request.headers[name]


def _asked_wait(error: Any) -> float:
    try:
        return max(0.0, float(error.response.headers.get("retry-after", 0)))
    except (ValueError, TypeError):
        return 0.0


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
