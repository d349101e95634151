"""A teacher behind HTTP: `distill-trainers serve-teacher`, or any OpenAI-compatible server with prompt log-probs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..exceptions import ConfigurationError, TeacherServerError
from ..signals import Head, TeacherSignal, TokenLogprobs
from .answers import empty_answer, problem_of
from .base import Teacher
from .cache_files import Row, row_key
from .cache_identity import tokenizer_fingerprint
from .cache_kinds import KINDS
from .cached import unpadded_rows
from .endpoints import Again, Attempt, Endpoint, Servers, parse_servers
from .serving import answer_bytes, answer_identity
from .wire import KINDS as SERVER_KINDS
from .wire import PROTOCOL, Question, Wanted, WireError, pack_question, unpack, unpack_head
from .wire import Row as TokenRow

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOKEN_ENV = "DISTILL_TEACHER_TOKEN"
_DESCRIPTION = ("teacher", "weights", "tokenizer", "vocab_rows", "dtype", "kinds", "hidden_size", "head_sha256")
_LIMITS = ("max_rows", "max_tokens", "max_row_tokens", "max_answer_bytes")


def token_from_environment() -> str | None:
    """The token that teachers' servers want, as clients and servers find it.

    Raises:
        ConfigurationError: it cannot be sent in a header.
    """
    token = os.environ.get(TOKEN_ENV)
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise ConfigurationError(f"The token in {TOKEN_ENV} is empty, or has spaces or characters other than ASCII.")
    return token


@dataclass(frozen=True)
class RemoteSettings:
    """What is asked of a teacher's servers, and how.

    Args:
        kind: `hidden` (exact), `topk`, `sampled`, or `token_logprobs` of the given tokens alone.
        top_k, draws, seed: of the kinds topk and sampled.
        dtype: of the numbers on the wire; None is the teacher's own for hidden states, else float32.
        model: as an OpenAI-compatible server names it; None takes the only one that it has.
        concurrency: questions in flight at once.
        timeout: seconds without an answer after which one attempt has failed.
        patience: seconds for which servers that are away are waited for.
    """

    kind: str = "hidden"
    top_k: int = 64
    draws: int = 50
    seed: int = 0
    dtype: str | None = None
    model: str | None = None
    concurrency: int = 8
    timeout: float = 120.0
    patience: float = 300.0


class Dialect(ABC):
    """How a kind of server is spoken to.

    Attributes:
        info: what the server says of itself, `_DESCRIPTION` and `_LIMITS`; None for what it does not say.
    """

    info: dict[str, Any]

    @abstractmethod
    def compare_tokenizer(self, endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ConfigurationError if the server's ids stand for other tokens."""

    @abstractmethod
    def ask(self, question: Question, endpoint: Endpoint) -> Row:
        """The rows' answers, joined end to end.

        Raises:
            Again, TeacherServerError: as `Endpoint.request`.
        """


class OwnDialect(Dialect):
    """The protocol of `serve-teacher`."""

    def __init__(self, info: Any, url: str):
        if not isinstance(info, dict):
            raise ConfigurationError(f"{url} is no teacher's server: its /v1/info is not a mapping. Check the address.")
        if info.get("protocol") != PROTOCOL:
            raise ConfigurationError(
                f"The teacher's server {url} has version {info.get('version')} and speaks protocol "
                f"{info.get('protocol')}, expected {PROTOCOL}. Install the same version there and here."
            )
        missing = [name for name in (*_DESCRIPTION, *_LIMITS) if name not in info]
        if missing:
            raise ConfigurationError(f"The server {url} does not tell its {', '.join(missing)}. Check the address.")
        self.info = info

    def compare_tokenizer(self, endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase) -> None:
        own = tokenizer_fingerprint(tokenizer)
        if own != self.info["tokenizer"]:
            raise ConfigurationError(
                f"The teacher {self.info['teacher']!r} at {endpoint.url} has the tokenizer {self.info['tokenizer']}, "
                f"the student's is {own}: the same ids stand for other tokens. Choose a student of the teacher's "
                "family and use the teacher's tokenizer for both."
            )

    def ask(self, question: Question, endpoint: Endpoint) -> Row:
        try:
            arrays, said = unpack(endpoint.request("/v1/signal", pack_question(question)))
        except WireError as error:
            raise Again(f"{endpoint.url} answers nonsense: {error}", broken=True) from error
        self.same_weights(said.get("weights"), endpoint)
        return arrays

    def same_weights(self, weights: Any, endpoint: Endpoint) -> None:
        """Raises TeacherServerError if a server that was started again serves another model."""
        if weights != self.info["weights"]:
            raise TeacherServerError(
                f"The server {endpoint.url} serves other weights than {self.info['teacher']!r} at the start of the run "
                f"({weights}, then {self.info['weights']}). Serve the same teacher again, or start a new run."
            )

    def head(self, device: torch.device, endpoint: Endpoint) -> Head:
        """The teacher's head, whole as its server had it."""
        data = endpoint.request("/v1/head")
        if hashlib.sha256(data).hexdigest() != self.info["head_sha256"]:
            raise Again(f"the head from {endpoint.url} has not the hash that it should have", broken=True)
        return unpack_head(data, device)


class RemoteTeacher(Teacher):
    """A teacher that answers over HTTP; every process asks for its own rows.

    Micro-batches that it is told of ahead (`asking_ahead`) are asked for at once and in the background, so that their
    answers are on their way while the student computes. A server that goes away is waited for.

    Attributes:
        failure: why nobody is asked any more within `holding_failures`; None as long as all is well.

    Args:
        servers: addresses, in one string with commas between or as a list; they must serve the same teacher.
        settings: what is asked for.
        token: that the servers want; never part of a recipe.

    Raises:
        ConfigurationError: a server is not there, is not one, wants another token, or cannot tell what is asked for.
    """

    def __init__(self, servers: str | Sequence[str], settings: RemoteSettings | None = None, token: str | None = None):
        from .openai_logprobs import OpenAIDialect

        self.settings = own = settings or RemoteSettings()
        if own.kind not in SERVER_KINDS:
            raise ConfigurationError(f"Got the kind {own.kind!r}; expected one of {', '.join(SERVER_KINDS)}.")
        urls = parse_servers(servers if isinstance(servers, str) else ",".join(servers))
        self.servers = Servers(urls, token, own.concurrency, own.timeout, own.patience)
        self.provides = frozenset({"token_logprobs" if own.kind == "token_logprobs" else "distribution"})  # type: ignore[misc]
        found = [self._connect(endpoint, OpenAIDialect) for endpoint in self.servers.endpoints]
        self.dialect = found[0]
        self.info = self.dialect.info
        for url, other in zip(urls, found, strict=True):
            if any(other.info[name] != self.info[name] for name in ("weights", "tokenizer", "vocab_rows")):
                raise ConfigurationError(
                    f"The servers {urls[0]} and {url} serve different teachers: {self.info['teacher']!r} "
                    f"({self.info['weights']}) and {other.info['teacher']!r} ({other.info['weights']}). Name servers "
                    "of one teacher."
                )
            if own.kind not in other.info["kinds"]:
                raise ConfigurationError(
                    f"Got `teacher_server_kind: {own.kind}`, but the server {url} tells only "
                    f"{', '.join(other.info['kinds'])}. Choose one of these."
                )
        for name in _LIMITS:  # any of them may be asked any question
            limits = [each.info[name] for each in found if each.info[name] is not None]
            self.info[name] = min(limits) if limits else None
        self.name = self.info["teacher"]
        self._device = torch.device("cpu")
        self._head: Head | None = None
        self._known_ids: int | None = self.info["vocab_rows"]
        self._ahead: dict[Any, list[Attempt[Row]]] = {}
        self._announcing = self._holding = False
        self.failure: TeacherServerError | None = None

    def _connect(self, endpoint: Endpoint, openai: Any) -> Dialect:
        try:
            try:
                return OwnDialect(endpoint.json("/v1/info"), endpoint.url)
            except TeacherServerError as error:
                if error.status != 404:
                    raise
                return openai(endpoint, self.settings)
        except Again as error:
            raise ConfigurationError(
                f"The teacher's server {endpoint.url} does not answer ({error}). Start it with `distill-trainers "
                "serve-teacher --model …` and wait until it says that it serves, or mend `teacher_model_name_or_path`."
            ) from error
        except TeacherServerError as error:
            remedy = "Check the address"
            if error.status in (401, 403):
                remedy = f"Put its token into the environment variable {TOKEN_ENV}"
            raise ConfigurationError(f"{error}. {remedy}.") from error

    # ---- What a trainer tells it ------------------------------------------------------------------------------------

    def meet(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        """Compare the student's tokenizer and longest row with what the servers take.

        Raises:
            ConfigurationError: naming what differs.
        """
        for endpoint in self.servers.endpoints:
            try:
                self.dialect.compare_tokenizer(endpoint, tokenizer)
            except (Again, TeacherServerError) as error:
                raise ConfigurationError(f"The teacher's server {endpoint.url} failed: {error}.") from error
        longest = self.info["max_row_tokens"]
        if longest is not None and max_length > longest:
            raise ConfigurationError(
                f"Got `max_length: {max_length}`, but the teacher's server {self.servers.names} takes rows of "
                f"{longest} tokens. Set `max_length: {longest}`, or raise the server's limit."
            )

    def limit_ids(self, student_rows: int) -> None:
        """Ids that the student has; answers about others are refused."""
        known = self.info["vocab_rows"]
        self._known_ids = student_rows if known is None else min(known, student_rows)

    def prepare(self, accelerator: Accelerator) -> None:
        self._device = accelerator.device
        self.servers.start_with(accelerator.process_index)

    @contextlib.contextmanager
    def asking_ahead(self) -> Iterator[bool]:
        """Within it, `signal` sends its question and returns None; asked once more, it takes up the answer."""
        self._forget()
        self._announcing = True
        try:
            yield True
        finally:
            self._announcing = False

    @contextlib.contextmanager
    def holding_failures(self) -> Iterator[None]:
        """Within it, what `signal` would raise is kept in `failure`, and a signal that says nothing is given instead.

        One of several processes that raised alone would leave the others waiting for it in their next collective.
        """
        before, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = before

    def stop_waiting(self) -> None:
        self.servers.stop_waiting()

    # ---- As a teacher -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> TeacherSignal:
        rows = [row for row in unpadded_rows(inputs, predicts) if len(row[1])]
        key = (vocab_size, *(row_key(*row) for row in rows))
        if self._announcing:
            if self.failure is None:
                self._ahead[key] = self._ask(rows, vocab_size)
            return None  # type: ignore[return-value]  # nobody looks at it
        if self.failure is None or not self._holding:
            try:
                attempts = self._ahead.pop(key, None) or self._ask(rows, vocab_size)
                return self._signal_of([attempt.result() for attempt in attempts], vocab_size, predicts.device)
            except TeacherServerError as error:
                if not self._holding or (self.settings.kind == "hidden" and self._head is None):
                    raise
                self.failure = error
        count, head = sum(len(positions) for _, positions in rows), self._head
        nothing = empty_answer(count, self._wanted(vocab_size), self.info, None if head is None else head.weight.dtype)
        return self._signal_of([nothing], vocab_size, predicts.device)

    def fingerprint(self) -> str:
        return self.info["weights"]

    def close(self) -> None:
        """End threads and connections; the teacher cannot be asked any more."""
        self._forget()
        self.servers.close()

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        for attempt in (attempt for attempts in self._ahead.values() for attempt in attempts):
            attempt.cancel()
        self._ahead.clear()

    def _wanted(self, vocab_size: int | None) -> Wanted:
        own = self.settings
        return Wanted(
            own.kind,
            vocab_size,
            own.dtype,
            top_k=own.top_k if own.kind == "topk" else None,
            draws=own.draws if own.kind == "sampled" else None,
            seed=own.seed if own.kind == "sampled" else None,
        )

    def _ask(self, rows: Sequence[TokenRow], vocab_size: int | None) -> list[Attempt[Row]]:
        wanted = self._wanted(vocab_size)
        tokenizer = self.info["tokenizer"] or ""
        questions = [Question(wanted, tokenizer, part) for part in self._parts(rows, wanted)]
        return [Attempt(self.servers, functools.partial(self._checked, question)) for question in questions]

    def _parts(self, rows: Sequence[TokenRow], wanted: Wanted) -> list[list[TokenRow]]:
        """Rows in parts that a server takes, and as many parts as there are servers."""
        info, share = self.info, sum(len(ids) for ids, _ in rows) / len(self.servers.endpoints)
        each = answer_bytes(wanted, info) if info["vocab_rows"] else 0.0
        parts: list[list[TokenRow]] = []
        tokens, size = 0, 0.0
        for row in rows:
            grown, larger = tokens + len(row[0]), size + each * len(row[1])
            full = grown > info["max_tokens"] or larger > info["max_answer_bytes"] or tokens >= share
            if not parts or full or len(parts[-1]) >= info["max_rows"]:
                parts.append([])
                grown, larger = len(row[0]), each * len(row[1])
            parts[-1].append(row)
            tokens, size = grown, larger
        return parts

    def _checked(self, question: Question, endpoint: Endpoint) -> Row:
        answer = self.dialect.ask(question, endpoint)
        wanted = question.wanted
        problem = problem_of(answer, sum(question.counts), wanted, self.info, wanted.vocab_size or self._known_ids)
        if problem:
            raise Again(f"{endpoint.url} answers nonsense: {problem}", broken=True)
        return answer

    def _signal_of(self, rows: list[Row], vocab_size: int | None, device: torch.device) -> TeacherSignal:
        wanted = self._wanted(vocab_size)
        if wanted.kind == "token_logprobs":
            return TokenLogprobs(torch.cat([row["logps"] for row in rows] or [torch.empty(0)]).to(device))
        head = self._whole_head(device).cut_to(vocab_size) if wanted.kind == "hidden" else None
        info = {**self.info, "vocab_rows": self.info["vocab_rows"] or self._known_ids or wanted.top_k}
        return KINDS[wanted.kind](answer_identity(wanted, info)).answer(rows, head, device)

    def _whole_head(self, device: torch.device) -> Head:
        """The teacher's head, fetched once."""
        if self._head is None:
            assert isinstance(self.dialect, OwnDialect)
            self._head = Attempt(self.servers, functools.partial(self.dialect.head, device)).result()
        return self._head
