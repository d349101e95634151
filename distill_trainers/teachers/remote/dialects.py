"""How a kind of teacher's server is spoken to: `serve-teacher`'s own protocol here, OpenAI's in `openai.py`."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...exceptions import ConfigurationError, TeacherServerError
from ...signals import Head
from ..cache.identity import tokenizer_fingerprint
from ..cache.shards import Answer
from .endpoints import Again, Endpoint
from .wire import PROTOCOL, Question, WireError, pack_question, unpack, unpack_head

TOKEN_ENV = "DISTILL_TEACHER_TOKEN"
_DESCRIPTION = ("teacher", "weights", "tokenizer", "vocab_rows", "dtype", "kinds", "hidden_size", "head_sha256")
LIMITS = ("max_rows", "max_tokens", "max_row_tokens", "max_answer_bytes")


def token_from_environment() -> str | None:
    """Find the token that teachers' servers want, as clients and servers do.

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
        info: what the server says of itself, `_DESCRIPTION` and `LIMITS`; None for what it does not say.
    """

    info: dict[str, Any]

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
                f"The teacher's server {url} has version {info.get('version')} and speaks protocol "
                f"{info.get('protocol')}, expected {PROTOCOL}. Install the same version there and here."
            )
        missing = [name for name in (*_DESCRIPTION, *LIMITS) if name not in info]
        if missing:
            raise ConfigurationError(f"The server {url} does not tell its {', '.join(missing)}. Check the address.")
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
            arrays, said = unpack(endpoint.request("/v1/signal", pack_question(question)))
        except WireError as error:
            raise Again(f"{endpoint.url} answers nonsense: {error}", broken=True) from error
        self.same_weights(said.get("weights"), endpoint)
        return arrays

    def same_weights(self, weights: Any, endpoint: Endpoint) -> None:
        """Raise TeacherServerError if a server that was started again serves another model."""
        if weights != self.info["weights"]:
            raise TeacherServerError(
                f"The server {endpoint.url} serves other weights than {self.info['teacher']!r} at the start of the run "
                f"({weights}, then {self.info['weights']}). Serve the same teacher again, or start a new run."
            )

    def head(self, device: torch.device, endpoint: Endpoint) -> Head:
        """Fetch the teacher's head, whole as its server had it."""
        data = endpoint.request("/v1/head")
        if hashlib.sha256(data).hexdigest() != self.info["head_sha256"]:
            raise Again(f"the head from {endpoint.url} has not the hash that it should have", broken=True)
        return unpack_head(data, device)
