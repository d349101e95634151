"""How a kind of teacher's server is spoken to: `serve-teacher`'s own protocol here, OpenAI's in `openai.py`."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from ...addresses import secret_for
from ...exceptions import ConfigurationError, TeacherServerError
from ...servers.endpoints import SMALL, Again, Endpoint
from ...servers.openai import is_name
from ...signals import Head
from ..cache.identity import tokenizer_fingerprint
from ..cache.shards import Answer
from .wire import PROTOCOL, SERVER_KINDS, Question, WireError, answer_bytes, pack_question, unpack, unpack_head

TOKEN_ENV = "DISTILL_TEACHER_TOKEN"
LIMITS = ("max_rows", "max_tokens", "max_row_tokens", "max_answer_bytes")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**53


# What a server says of itself, and when that makes sense.
_DESCRIPTION: dict[str, Callable[[Any], bool]] = {
    "teacher": is_name,
    "weights": is_name,
    "tokenizer": is_name,
    "vocab_rows": _is_count,
    "dtype": lambda value: value in ("float64", "float32", "bfloat16", "float16"),
    "kinds": lambda value: isinstance(value, list) and bool(value) and all(kind in SERVER_KINDS for kind in value),
    "hidden_size": lambda value: value is None or _is_count(value),
    "head_sha256": lambda value: value is None or is_name(value),
    **dict.fromkeys(LIMITS, _is_count),
}


def token_from_environment(servers: list[str] | None = None) -> str | None:
    """Find the token that teachers' servers want, as clients and servers do.

    Args:
        servers: that a client is going to send it to.

    Raises:
        ConfigurationError: it cannot be sent in a header, or does not belong to these servers.
    """
    token = os.environ.get(TOKEN_ENV) if servers is None else secret_for(TOKEN_ENV, servers)
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
        timeout: seconds for one whole answer; an attempt without it has failed.
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
        info: what the server says of itself, `_DESCRIPTION`; None for what it does not say.
        can_write: whether it writes completions.
    """

    info: dict[str, Any]
    can_write: ClassVar[bool] = False

    @abstractmethod
    def compare_tokenizer(self, endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ConfigurationError if the server's ids stand for other tokens."""

    @abstractmethod
    def ask(self, question: Question, endpoint: Endpoint) -> Answer:
        """Return the rows' answers, joined end to end.

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
                f"The teacher's server {url} has version {info.get('version')!r:.60} and speaks protocol "
                f"{info.get('protocol')!r:.60}, expected {PROTOCOL}. Install the same version there and here."
            )
        wrong = [name for name, good in _DESCRIPTION.items() if not good(info.get(name))]
        if wrong:
            raise ConfigurationError(
                f"The server {url} tells no {', '.join(wrong)} that makes sense (`{wrong[0]}`: "
                f"{info.get(wrong[0])!r:.60}). Check the address."
            )
        self.info = info

    def compare_tokenizer(self, endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase) -> None:
        student = tokenizer_fingerprint(tokenizer)
        if student != self.info["tokenizer"]:
            raise ConfigurationError(
                f"The teacher {self.info['teacher']!r} at {endpoint.url} has the tokenizer {self.info['tokenizer']}, "
                f"the student's is {student}: the same ids stand for other tokens. Choose a student of the teacher's "
                "family and use the teacher's tokenizer for both."
            )

    def ask(self, question: Question, endpoint: Endpoint) -> Answer:
        try:
            most = SMALL + 2 * int(answer_bytes(question.wanted, self.info) * sum(question.counts))
            arrays, said = unpack(endpoint.request("/v1/signal", pack_question(question), most=most))
        except WireError as error:
            raise Again(f"{endpoint.url} answers nonsense: {error}", broken=True) from error
        self.same_weights(said.get("weights"), endpoint)
        return arrays

    def same_weights(self, weights: Any, endpoint: Endpoint) -> None:
        """Raise TeacherServerError if a server that was started again serves another model."""
        if weights != self.info["weights"]:
            raise TeacherServerError(
                f"The server {endpoint.url} serves other weights than {self.info['teacher']!r} at the start of the run "
                f"({weights!r:.60}, then {self.info['weights']!r:.60}). Serve the same teacher again, or start a new "
                "run."
            )

    def head(self, device: torch.device, endpoint: Endpoint) -> Head:
        """Fetch the teacher's head, whole as its server had it."""
        # At most float64 numbers, a bias and a scale for each id.
        data = endpoint.request("/v1/head", most=SMALL + 8 * self.info["vocab_rows"] * (self.info["hidden_size"] + 2))
        if hashlib.sha256(data).hexdigest() != self.info["head_sha256"]:
            raise Again(f"the head from {endpoint.url} has not the hash that it should have", broken=True)
        return unpack_head(data, device)
