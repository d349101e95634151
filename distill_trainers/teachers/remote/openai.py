"""Teachers behind servers that speak OpenAI's completions API with vLLM's `prompt_logprobs`.

Rows are sent as lists of token ids, so nothing is tokenised again; what a server says about each token of a prompt are
log-probabilities at temperature 1 of the k likeliest ids and of the token itself, as JSON.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ...exceptions import ConfigurationError, TeacherServerError
from ...servers.endpoints import Again, Endpoint
from ...servers.openai import OpenAIServer
from ...signals import SMALLEST_TAIL
from ..cache.shards import Answer
from .dialects import Dialect, RemoteSettings
from .wire import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS = 8192  # of one request, whose answer takes about 70 bytes for each token and id
_ROWS = 64
_ENTRY_BYTES = 512  # that an id may take: some tokens are long, and escaped in JSON


class OpenAIDialect(Dialect):
    """What vLLM's server, and those that follow it, answer at `/v1/completions`.

    Raises:
        ConfigurationError: no such server, an unknown model, or no prompt log-probs of as many ids as are asked for.
    """

    can_write = True

    def __init__(self, endpoint: Endpoint, settings: RemoteSettings):
        self.server = OpenAIServer(endpoint, settings.model, "teacher_server_model")
        name, longest = self.server.model, self.server.longest
        self.info = {
            "teacher": name,
            "weights": f"served as {name}",
            "tokenizer": None,
            "vocab_rows": None,
            "dtype": None,
            "kinds": ["topk", "token_logprobs"],
            "hidden_size": None,
            "head_sha256": None,
            "max_rows": _ROWS,
            "max_tokens": _TOKENS,
            "max_row_tokens": None if longest is None else longest - 1,  # one token is generated
            "max_answer_bytes": math.inf,
        }
        self._try(endpoint, settings)

    def _try(self, endpoint: Endpoint, settings: RemoteSettings) -> None:
        k = settings.top_k if settings.kind == "topk" else 0
        try:
            (told,) = self._complete([[0, 1]], k, endpoint)
        except TeacherServerError as error:
            raise ConfigurationError(
                f"{error}. Asked for were prompt log-probs of {k} ids per token: vLLM tells as many as "
                "its option `--max-logprobs` says (20 by default); lower `teacher_server_top_k` or raise that."
            ) from error
        if not isinstance(told, list) or len(told) != 2:
            raise ConfigurationError(
                f"The server {endpoint.url} gives no `prompt_logprobs`, so it cannot tell what its model thinks of "
                "given tokens. Use vLLM, or `distill-trainers serve-teacher`; of a server that only writes text, train "
                "on its text (`distill-trainers rationales`)."
            )

    def compare_tokenizer(self, endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase) -> None:
        OpenAIServer(endpoint, self.server.model, "teacher_server_model").compare_tokenizer(tokenizer, "teacher")

    def ask(self, question: Question, endpoint: Endpoint) -> Answer:
        k = question.wanted.top_k or 0
        answers = self._complete([ids.tolist() for ids, _ in question.rows], k, endpoint)
        ids: list[list[int]] = []
        logps: list[list[float]] = []
        for (row, positions), places in zip(question.rows, answers, strict=True):
            try:
                for position in positions.tolist():
                    logps_of = {int(token): float(entry["logprob"]) for token, entry in places[position + 1].items()}
                    label = int(row[position + 1])
                    if not all(0 <= token < 2**31 for token in logps_of):
                        raise ValueError("no id of a vocabulary")
                    chosen = sorted(logps_of, key=lambda token: -logps_of[token])[:k] if k else [label]
                    ids.append(chosen)
                    logps.append([logps_of[token] for token in chosen])
            except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
                raise Again(f"{endpoint.url} answers nonsense ({type(error).__name__})", broken=True) from error
        return self._row(ids, logps, k, endpoint)

    def _row(self, ids: list[list[int]], logps: list[list[float]], k: int, endpoint: Endpoint) -> Answer:
        if k and any(len(chosen) < k for chosen in ids):
            raise Again(f"{endpoint.url} tells of fewer than {k} ids", broken=True)
        values = torch.tensor(logps, dtype=torch.float64)
        mass = values.exp().sum(-1)
        if not bool((mass <= 1 + 1e-3).all()):  # NaN is not
            raise Again(f"{endpoint.url} tells of probabilities that add up to more than 1", broken=True)
        if not k:
            return {"logps": values[:, 0].float()}
        # The mass comes from rounded numbers: what is left of it may be nothing, or less.
        tail = torch.log1p(-mass.clamp(max=1.0)).clamp(min=SMALLEST_TAIL)
        return {"ids": torch.tensor(ids, dtype=torch.int32), "logps": values.float(), "tail": tail.float()}

    def _complete(self, prompts: list[list[int]], k: int, endpoint: Endpoint) -> list[Any]:
        """`prompt_logprobs` of each prompt, in order."""
        body = {"prompt": prompts, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        most = _ENTRY_BYTES * (k + 2) * sum(map(len, prompts))
        choices = self.server.complete(body, len(prompts), most, endpoint)
        return [choice.get("prompt_logprobs") for choice in choices]
