"""Teacher-mixed sampling: each token from alpha * p + (1 - alpha) * q, p the other model's and q the student's.

Which of the two draws a token is decided beforehand, by one coin for each step of a rollout; given the coins, tokens
are drawn from p or from q themselves, and each completion has the law of the mixture. But where the coin is the
student's, the other model need not be asked yet: when it is to speak it catches up on all that was written since, in
one forward. That is once in 1 / alpha steps instead of at every step, and a large teacher's decoding is what mixing
costs. The price: completions of one rollout share their coins, so they are not quite independent of each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import models
from ...losses.fused_logps import fused_token_logps
from ...randomness import Stream
from ...signals import Head
from .forwards import parameters_of, read_prompts, wide_logits
from .kv_cache import keep_rows
from .rows import Rows


@dataclass(frozen=True)
class Mixture:
    """Tokens are drawn from `alpha` * (model) + (1 - `alpha`) * (the student), 0 < alpha < 1; both keep a KV cache.

    Args:
        model: unwrapped and in eval mode, of the student's vocabulary; `why_not_scored` accepts it.
        coins: decide which of the two draws, one for each step of a rollout, all its batches alike.
        keeps_hidden: whether to keep its last hidden states, which spares a forward over what was written.
    """

    model: Any
    alpha: float
    coins: Stream
    keeps_hidden: bool = False


class Partner:
    """The other model of a mixture, and how far it has read. n rows, t tokens written, of which it has read u.

    Args:
        rows: before anything was written.
        vocab_size: ids from here on are never drawn; None keeps all.
        in_step: every forward of every process must have its counterpart on the others.
    """

    def __init__(self, mixture: Mixture, rows: Rows, vocab_size: int | None, in_step: bool):
        self.mixture = mixture
        self._vocab_size = vocab_size
        self._exact = models.gives_hidden_states(mixture.model)
        self._accepted = parameters_of(models.causal_lm_of(mixture.model))
        self._read = 0
        self._told: list[Tensor] = []  # log-probabilities [n, ·] of the first u tokens
        self._hidden: list[Tensor] = []  # [n, ·, D], that predict the first u + 1 tokens

        def run(ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
            last, _, hidden = self._forward(ids, mask, positions, cache, ids[:, :0])
            return last, hidden

        told, self._cache = read_prompts(mixture.model, rows, run, whole=in_step)
        self._next, hidden = told  # log p of token u + 1
        self._keep(hidden)

    def draws_from(self, rows: Rows) -> Tensor:
        """Return log p of the next token, `[n, V]`."""
        self._catch_up(rows, rows.new_ids.shape[1])
        return self._next

    def completions(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """Return its log-probabilities of all that was written, `[n, t]`, and the states `[n, t, D]` behind them."""
        written = rows.new_ids
        self._catch_up(rows, written.shape[1] - 1)
        told = torch.cat([*self._told, self._next.gather(1, written[:, -1:])], dim=1)
        return told, torch.cat(self._hidden, dim=1) if self._hidden else None

    def drawn(self, student: Tensor, other: Tensor) -> Tensor:
        """Return log(alpha * p + (1 - alpha) * q) of log q and log p."""
        alpha = self.mixture.alpha
        return torch.logaddexp(student + math.log1p(-alpha), other + math.log(alpha))

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        keep_rows(self._cache, rows)
        index = torch.tensor(rows, device=self._next.device)
        self._next = self._next[index]
        self._told = [torch.cat(self._told, dim=1)[index]] if self._told else []
        self._hidden = [torch.cat(self._hidden, dim=1)[index]] if self._hidden else []

    def _catch_up(self, rows: Rows, upto: int) -> None:
        """Read what was written, up to its first `upto` tokens."""
        count = upto - self._read
        if count <= 0:
            return
        unread = rows.new_ids[:, self._read : upto]
        later = rows.new_ids.shape[1] - upto
        ahead = torch.arange(1 - count - later, 1 - later, device=unread.device)
        mask = None if rows.mask is None else rows.mask[:, : rows.prompt_width + upto]
        self._told.append(self._next.gather(1, unread[:, :1]))
        last, told, hidden = self._forward(unread, mask, rows.positions[:, -1:] + ahead, self._cache, unread[:, 1:])
        self._told.append(told)
        self._next, self._read = last, upto
        self._keep(hidden)

    def _keep(self, hidden: Tensor) -> None:
        if self.mixture.keeps_hidden and self._exact:
            self._hidden.append(hidden)

    def _forward(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any, following: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log p after the last of `ids` `[n, k]`, `[n, V]`; that of `following` `[n, m]`, before it; and states.

        The states are `[n, m + 1, D]`, the last ones of `ids`; empty where the model does not give them.
        """
        count = following.shape[1]

        def told(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
            head, hidden = head.cut_to(self._vocab_size), hidden[:, -count - 1 :]
            before = fused_token_logps(hidden[:, :-1].flatten(0, 1), head, following.flatten().to(hidden.device))
            after = wide_logits(hidden[:, -1], head).log_softmax(-1)
            return after.to(ids.device), before.view_as(following).to(ids.device), hidden

        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if "position_ids" in self._accepted:
            inputs["position_ids"] = positions
        if self._exact:
            return self.mixture.model(**inputs, on_hidden=told)
        logits = self.mixture.model(**inputs).logits[:, -count - 1 :, : self._vocab_size]
        logps = logits.to(ids.device, torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return logps[:, -1], logps[:, :-1].gather(2, following.unsqueeze(2)).squeeze(2), logits.new_empty(len(ids), 0)
