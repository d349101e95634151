"""What a teacher can say about a token, and the output head that turns hidden states into logits.

Shapes: N trained tokens, D hidden size, V vocabulary, K ids per token. A signal holds trained positions only; its
`chunk(rows)` is what it says about n of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .exceptions import ConfigurationError

if TYPE_CHECKING:
    from .losses.workspace import Workspace


@dataclass(frozen=True)
class Head:
    """The last layer of a causal LM together with everything the model does to its logits.

    logits = soft_cap * tanh(scale * (hidden @ weight.T + bias) / soft_cap), cut to the first `vocab_size` ids.

    Args:
        weight: `[V, D]`.
        bias: `[V]` or None.
        scale: factor on the raw logits (Cohere's `logit_scale`, Granite's `1 / logits_scaling`).
        soft_cap: bound on the logits (Gemma 2's `final_logit_softcapping`) or None.
        vocab_size: ids from here on are padding and leave the softmax; None keeps every row.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    vocab_size: int | None = None

    @property
    def num_ids(self) -> int:
        """Number of ids in the softmax."""
        rows = self.weight.shape[0]
        return rows if self.vocab_size is None else min(rows, self.vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn `[n, D]` hidden states into `[n, V]` logits, at least float32 whatever the operands' dtype."""
        raw = self.project(hidden)
        return self.finish(raw)

    def project(self, hidden: Tensor) -> Tensor:
        """Take the matrix product alone: `[n, D]` to `[n, V]`, at least float32."""
        hidden, weight = self.operands(hidden)
        return hidden @ weight.T

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two sides of that product, hidden states and weight, in the dtype of the product."""
        weight = self.weight[: self.num_ids]
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        return hidden.to(dtype), weight.to(dtype)

    def finish(self, raw: Tensor) -> Tensor:
        """Do what the model does after the product: bias, scale, soft cap."""
        logits = raw
        if self.bias is not None:
            logits = logits + self.bias[: self.num_ids].to(logits.dtype)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits

    def finish_(self, raw: Tensor) -> Tensor:
        """Do `finish` in place, for tensors without a graph."""
        if self.bias is not None:
            raw.add_(self.bias[: self.num_ids])
        if self.scale != 1.0:
            raw.mul_(self.scale)
        if self.soft_cap is not None:
            raw.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return raw

    def unfinish_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient with respect to `logits`, in place, into that with respect to the product and bias."""
        if self.soft_cap is not None:
            gradient.mul_((logits / self.soft_cap).square_().neg_().add_(1))
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient

    def cut_to(self, vocab_size: int | None) -> Head:
        """Return the same head with ids from `vocab_size` on treated as padding."""
        return replace(self, vocab_size=vocab_size)


# The log of the least mass of which float32 can tell that a sum lacks it. Where a teacher's tail is found as 1 minus
# the mass of its ids, less than this is rounding, and a tail of 0 would make the reverse KL infinite.
SMALLEST_TAIL = -24 * math.log(2)


@dataclass(frozen=True)
class TokenLogits:
    """Logits `[n, V]` of some tokens of one model, at least float32.

    Args:
        logits: `[n, V]`.
        workspace: where losses may take buffers of that size from; None allocates them.
    """

    logits: Tensor
    workspace: Workspace | None = field(default=None, repr=False, compare=False)

    @property
    def shape(self) -> torch.Size:
        """(n, V)."""
        return self.logits.shape

    def logps(self, temperature: float = 1.0) -> Tensor:
        """Return log-probabilities `[n, V]` at `temperature`."""
        logits = self.logits if temperature == 1.0 else self.logits / temperature
        return F.log_softmax(logits, dim=-1)

    @torch.no_grad()
    def top_k(self, k: int) -> TokenTopK:
        """Return the `k` most likely ids (all of them where V is smaller) and the mass of the others."""
        _require_positive("k", k)
        logps = self.logps()
        top_logps, ids = logps.topk(min(k, logps.shape[-1]), dim=-1)
        return TokenTopK(ids, top_logps, logps.scatter(-1, ids, -math.inf).logsumexp(-1))

    @torch.no_grad()
    def sample(self, draws: int, generator: torch.Generator | None = None) -> TokenSampled:
        """Draw `draws` times per token, independently."""
        _require_positive("draws", draws)
        logps = self.logps()
        ids = torch.multinomial(logps.exp(), draws, replacement=True, generator=generator)
        return TokenSampled.from_draws(ids, logps)


@dataclass(frozen=True)
class TokenTopK:
    """Some ids of every token and what they leave to all others: K + 1 buckets that hold the whole mass.

    Args:
        ids: `[n, K]`, different from each other within a token.
        logps: `[n, K]`, their log-probabilities at temperature 1.
        tail_logps: `[n]`, log of the mass of all other ids, -inf where there is none.
    """

    ids: Tensor
    logps: Tensor
    tail_logps: Tensor

    def buckets(self) -> Tensor:
        """Return log-probabilities `[n, K + 1]`, tail last, normalised anew: storage may have rounded them."""
        return F.log_softmax(torch.cat([self.logps, self.tail_logps.unsqueeze(-1)], dim=-1), dim=-1)


@dataclass(frozen=True)
class TokenSampled:
    """Ids drawn from the teacher, each as often as it came (arXiv 2503.16870): an unbiased picture of it.

    Args:
        ids: `[n, K]`, the ids that were drawn; the rest of a row is filled with any id of weight 0.
        logps: `[n, K]`, their log-probabilities at temperature 1; any number where the weight is 0.
        weights: `[n, K]`, share of the draws, adding up to 1.
    """

    ids: Tensor
    logps: Tensor
    weights: Tensor

    @classmethod
    def from_draws(cls, draws: Tensor, logps: Tensor) -> TokenSampled:
        """Count the draws `[n, N]` made from the log-probabilities `[n, V]`."""
        ids = draws.sort(dim=-1).values
        is_new = torch.ones_like(ids, dtype=torch.bool)
        is_new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        place = is_new.cumsum(-1) - 1  # of each draw's id among the different ones of its row
        width = int(place.max()) + 1 if place.numel() else 1
        shape = (len(ids), width)
        unique = ids.new_zeros(shape).scatter_(-1, place, ids)
        counts = ids.new_zeros(shape).scatter_add_(-1, place, torch.ones_like(ids))
        return cls(unique, logps.gather(-1, unique), counts.to(logps.dtype) / ids.shape[-1])


class _OfTokens:
    """What is said of N tokens: N rows of the first field."""

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))


@dataclass(frozen=True)
class HiddenStates(_OfTokens):
    """The teacher's last hidden states `[N, D]` and its head: exact, and small."""

    hidden: Tensor
    head: Head

    def chunk(self, rows: slice) -> TokenLogits:
        return TokenLogits(self.head.logits(self.hidden[rows]))


@dataclass(frozen=True)
class Logits(_OfTokens):
    """The teacher's full logits `[N, V]`: exact, and large."""

    values: Tensor

    def chunk(self, rows: slice) -> TokenLogits:
        return TokenLogits(_wide(self.values[rows]))


@dataclass(frozen=True)
class TopK(_OfTokens):
    """`TokenTopK` of N tokens, as kept on disk: ids of any integer dtype, log-probabilities of any floating one."""

    ids: Tensor
    logps: Tensor
    tail_logps: Tensor

    def chunk(self, rows: slice) -> TokenTopK:
        return TokenTopK(self.ids[rows].long(), _wide(self.logps[rows]), _wide(self.tail_logps[rows]))


@dataclass(frozen=True)
class Sampled(_OfTokens):
    """`TokenSampled` of N tokens, as kept on disk: ids of any integer dtype, the others of any floating one."""

    ids: Tensor
    logps: Tensor
    weights: Tensor

    def chunk(self, rows: slice) -> TokenSampled:
        return TokenSampled(self.ids[rows].long(), _wide(self.logps[rows]), _wide(self.weights[rows]))


@dataclass(frozen=True)
class TokenLogprobs(_OfTokens):
    """Log-probabilities `[N]` of the given tokens alone, at temperature 1: all that many remote teachers tell."""

    values: Tensor

    def chunk(self, rows: slice) -> TokenLogprobs:
        return TokenLogprobs(_wide(self.values[rows]))


def padded(signal: TeacherSignal, count: int) -> TeacherSignal:
    """Append zeros to the signal for tokens of which the teacher says nothing, to `count` tokens in all."""
    more = count - len(signal)
    values = {f.name: getattr(signal, f.name) for f in fields(signal) if f.name != "head"}
    return replace(signal, **{k: F.pad(v, (0, 0) * (v.ndim - 1) + (0, more)) for k, v in values.items()})  # type: ignore


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigurationError(f"Got {name}={value}; expected at least 1. It is the number of ids kept per token.")


TokenSignal = TokenLogits | TokenTopK | TokenSampled | TokenLogprobs
TeacherSignal = HiddenStates | Logits | TopK | Sampled | TokenLogprobs
