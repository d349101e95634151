"""OpenAI's completions API as vLLM speaks it: tokens go in and come out as ids, so nothing is tokenised again."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..exceptions import ConfigurationError, ServerError
from .endpoints import SMALL, Again, Attempt, Endpoint, Servers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TOKEN_BYTES = 512  # that a token of an answer may take: some are long, and escaped in JSON
# Text that tokenizers of different families split differently.
PROBE = "It costs $1234.50 in 2024!\n\n2. naïve  café — \tdef f(x): return x**2  # ünïcode 你好 😀"


def is_name(value: Any) -> bool:
    """Tell whether a server's text may be shown: on one line, and without what moves a terminal's cursor."""
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


@dataclass(frozen=True)
class Written:
    """A completion that a server wrote.

    Args:
        ids: its tokens, with the one that ended it.
        logps: of these tokens; None where the server does not tell.
    """

    ids: list[int]
    logps: list[float] | None


class OpenAIServer:
    """One model behind an OpenAI-compatible server.

    Args:
        model: as the server names it; None takes the only one that it has.
        setting: which names the model, for messages.

    Attributes:
        model: its name.
        longest: tokens of prompt and completion together; None where the server does not tell.

    Raises:
        ConfigurationError: no such server, or an unknown model.
    """

    def __init__(self, endpoint: Endpoint, model: str | None, setting: str):
        self.endpoint = endpoint
        listed = endpoint.json("/v1/models")
        try:
            models = {entry["id"]: entry for entry in listed["data"] if is_name(entry["id"])}
        except (TypeError, KeyError) as error:
            raise ConfigurationError(
                f"{endpoint.url} is neither a `distill-trainers serve-teacher` nor an OpenAI-compatible server: its "
                "/v1/models lists no models. Check the address."
            ) from error
        # An adapter names the model that it changes as its parent.
        whole = [name for name, entry in models.items() if not entry.get("parent")]
        name = model or (whole[0] if len(whole) == 1 else None)
        if name is None or name not in models:
            raise ConfigurationError(
                f"Got `{setting}: {model}`, but {endpoint.url} serves {', '.join(models)}. Name one of these."
            )
        longest = models[name].get("max_model_len")
        if longest is not None and not (type(longest) is int and longest > 2):
            raise ConfigurationError(f"Got `max_model_len: {longest!r:.60}` from {endpoint.url}; expected a number.")
        self.model: str = name
        self.longest: int | None = longest

    def compare_tokenizer(self, tokenizer: PreTrainedTokenizerBase, role: str) -> None:
        """Compare how both split a probe; say so where the server does not tell.

        Args:
            role: of the served model, "teacher" or "student".

        Raises:
            ConfigurationError: it is another tokenizer.
        """
        question = {"model": self.model, "prompt": PROBE, "add_special_tokens": False}
        try:
            theirs = self.endpoint.json("/tokenize", question)["tokens"]
        except (ServerError, KeyError, TypeError):
            logger.warning(
                "%s has no /tokenize, so its tokenizer could not be compared with the student's: it must be the same.",
                self.endpoint.url,
            )
            return
        ids = tokenizer.encode(PROBE, add_special_tokens=False)
        if ids != theirs:
            raise ConfigurationError(
                f"The {role} {self.model!r} at {self.endpoint.url} splits text into other ids than the student's "
                f"tokenizer ({theirs!r:.60}…, {ids!r:.60}…). Choose a student of the teacher's family and use its "
                "tokenizer for both."
            )

    def complete(self, body: Mapping[str, Any], answers: int, most: int, endpoint: Endpoint | None = None) -> list[Any]:
        """Post to `/v1/completions`; return the choices in the order of their prompts.

        Args:
            answers: how many choices are expected.
            most: bytes that the answer may take.
        """
        endpoint = endpoint or self.endpoint
        answer = endpoint.json("/v1/completions", {"model": self.model, **body}, SMALL + most)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            told = [dict(choice) for choice in choices]
        except (LookupError, TypeError, ValueError) as error:
            raise Again(f"{endpoint.url} answers nonsense: {json.dumps(answer)[:100]}", broken=True) from error
        if len(told) != answers:
            raise Again(f"{endpoint.url} answers {len(told)} of {answers} prompts", broken=True)
        return told


class Writer:
    """A model behind servers, that writes completions.

    Args:
        limit: ids from here on are unknown to whoever reads; None where any may come.
    """

    def __init__(self, servers: Servers, server: OpenAIServer, limit: int | None = None):
        self.servers, self.server, self.limit = servers, server, limit

    @property
    def longest(self) -> int | None:
        """Tokens of prompt and completion together."""
        return self.server.longest

    def write(self, bodies: Sequence[Mapping[str, Any]]) -> list[Written]:
        """Complete one prompt for each body of a request, many at once.

        A request has one seed, by which equal prompts of one request would get equal texts: so each prompt has its own.

        Raises:
            ServerError: a server refuses, answers nonsense, or stays away.
        """
        return self.start(bodies)()

    def start(self, bodies: Sequence[Mapping[str, Any]]) -> Callable[[], list[Written]]:
        """Do as `write` in the background; what is returned waits for it, and may be called again."""
        attempts = [Attempt(self.servers, functools.partial(self._ask, body)) for body in bodies]
        return lambda: [attempt.result() for attempt in attempts]

    def _ask(self, body: Mapping[str, Any], endpoint: Endpoint) -> Written:
        size = _TOKEN_BYTES * (len(body["prompt"]) + 2 * body["max_tokens"])
        (choice,) = self.server.complete({**body, "return_token_ids": True}, 1, size, endpoint)
        try:
            ids, logps = choice["token_ids"], (choice.get("logprobs") or {}).get("token_logprobs")
            whole = all(type(token) is int and token >= 0 for token in ids) and len(ids) <= body["max_tokens"]
            if logps is not None:
                logps = [float(logp) for logp in logps]
                whole = whole and len(logps) == len(ids) and not any(math.isnan(logp) for logp in logps)
        except KeyError:
            raise endpoint.whose.error(
                f"The {endpoint.whose.name} {endpoint.url} returns no `token_ids`: its completions would have to be "
                "tokenised again, and other tokens come of it. Use vLLM, or another server with `return_token_ids`."
            ) from None
        except (TypeError, ValueError, AttributeError) as error:
            raise Again(f"{endpoint.url} answers nonsense ({type(error).__name__})", broken=True) from error
        if not whole:
            raise Again(f"{endpoint.url} answers nonsense: no ids of a completion", broken=True)
        if self.limit is not None and any(token >= self.limit for token in ids):
            raise endpoint.whose.error(
                f"The {endpoint.whose.name} {endpoint.url} wrote the token {max(ids)}, but the student's vocabulary "
                f"has {self.limit}. Serve a model of the student's family."
            )
        return Written(ids, None if logps and max(logps) > 1e-3 else logps)  # some servers tell logits

    def close(self) -> None:
        """End connections."""
        self.servers.close()
