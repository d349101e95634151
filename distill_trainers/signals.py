"""What a teacher can say about a token, and the output head that turns hidden states into logits.

Shapes: N trained tokens, D hidden size, V vocabulary, K ids per token. A signal holds trained positions only; its
`chunk(rows)` is what it says about n of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .exceptions import ConfigurationError
from .joining import Composition, empty_for, scattered

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

    @property
    def width(self) -> int:
        """Numbers that a chunk holds of each token."""
        values = next(iter(vars(self).values()))
        return values.shape[-1] if values.ndim > 1 else 1


@dataclass(frozen=True)
class HiddenStates(_OfTokens):
    """The teacher's last hidden states `[N, D]` and its head: exact, and small."""

    hidden: Tensor
    head: Head

    @property
    def width(self) -> int:
        """Numbers that a chunk holds of each token."""
        return self.head.num_ids

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


@dataclass(frozen=True)
class NextBytes(TokenLogprobs):
    """The same, and how likely each next byte is before these tokens, as kept on disk: what two tokenizers compare.

    Args:
        buckets: `[N, 258]`, log-probabilities at temperature 1 (`losses/cross_tokenizer.py`).
    """

    buckets: Tensor

    @property
    def width(self) -> int:
        """Numbers that a chunk holds of each token."""
        return self.buckets.shape[-1]

    def chunk(self, rows: slice) -> NextBytes:
        return NextBytes(_wide(self.values[rows]), _wide(self.buckets[rows]))


# ---- What a teacher with a tokenizer of its own says -----------------------------------------------------------------


@dataclass(frozen=True)
class Aligned:
    """What a teacher says of its own M tokens of a text, to be read at the student's N tokens of the same text.

    Args:
        told: of the M tokens, about the teacher's own ids.
        ids: `[M]`, these tokens.
        rows, chunks: `[M]`, the row of each in its batch, and the chunk of bytes that it is part of; 0 is none.
        places: `[N]`, which of the M begins where a token of the student does; any number where none does.
    """

    told: TeacherSignal
    ids: Tensor
    rows: Tensor
    chunks: Tensor
    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    @property
    def width(self) -> int:
        """Numbers that a chunk holds of each token."""
        return self.told.width

    def at_places(self) -> Any:
        """Return what is said, token by token of the student; of those without a place it is of no use."""
        told = self.told if len(self.told) else padded(self.told, 1)
        if isinstance(told, Routed | Composed | Aligned):
            raise ConfigurationError(
                f"Got {type(told).__name__} of teachers with tokenizers of their own; expected one teacher."
            )
        values = {f.name: getattr(told, f.name) for f in fields(told) if f.name != "head"}
        return replace(told, **{name: value[self.places] for name, value in values.items()})

    def chunk(self, rows: slice) -> TokenSignal:
        told: TokenSignal = self.at_places().chunk(rows)
        return told


# ---- What several teachers say ---------------------------------------------------------------------------------------

Reader = Callable[[slice], "TokenSignal"]  # what one of them says about some of its tokens


@dataclass(frozen=True)
class Routed:
    """Signals of several teachers about N tokens, each of which one of them speaks of.

    Args:
        parts: by teacher, what it says about its own tokens, in their order; None where it was not asked.
        owners: int64 `[N]` on the CPU: which part speaks of each token.

    Raises:
        ConfigurationError: a part does not speak of as many tokens as it owns.
    """

    parts: tuple[TeacherSignal | None, ...]
    owners: Tensor
    _before: Tensor = field(init=False, repr=False, compare=False)  # `[N + 1, parts]`: tokens of each before a token

    def __post_init__(self) -> None:
        owned = F.one_hot(self.owners, len(self.parts)).cumsum(0)
        object.__setattr__(self, "_before", F.pad(owned, (0, 0, 1, 0)))
        counts, expected = [0 if part is None else len(part) for part in self.parts], self._before[-1].tolist()
        if counts != expected:
            raise ConfigurationError(
                f"The teachers speak of {counts} tokens, expected {expected}: each must answer for its own rows."
            )

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def width(self) -> int:
        """Numbers that a chunk holds of each token."""
        return max(part.width for part in self.parts if part is not None)

    def chunk(self, rows: slice) -> TokenSignal:
        return self.join(rows, [None if part is None else part.chunk for part in self.parts])

    def join(self, rows: slice, readers: Sequence[Reader | None], workspace: Workspace | None = None) -> TokenSignal:
        """Return what the parts say about some tokens, in the tokens' order.

        Args:
            readers: one for each part, called with a slice of its own tokens.
            workspace: where the result may be put.
        """
        start, stop, _ = rows.indices(len(self))
        slices = [slice(*ends) for ends in self._before[[start, max(start, stop)]].T.tolist()]
        told = [(k, reader) for k, reader in enumerate(readers) if reader is not None]
        told = [(k, reader) for k, reader in told if slices[k].start < slices[k].stop] or told[:1]
        pieces = [reader(slices[k]) for k, reader in told]
        if len(pieces) == 1:
            return pieces[0]
        owners = self.owners[start:stop]
        return _scattered(pieces, [(owners == k).nonzero()[:, 0] for k, _ in told], workspace)


@dataclass(frozen=True)
class Composed:
    """One distribution made of what several teachers say about the same N tokens, chunk by chunk.

    Args:
        parts: signals of whole distributions.
    """

    parts: tuple[TeacherSignal, ...]
    composition: Composition

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def width(self) -> int:
        """Numbers that a chunk holds of each token."""
        return self.parts[0].width

    def chunk(self, rows: slice) -> TokenLogits:
        return self.join(rows, [part.chunk for part in self.parts])

    def join(self, rows: slice, readers: Sequence[Reader | None], workspace: Workspace | None = None) -> TokenLogits:
        """Return the composed logits of some tokens.

        Args:
            readers: one for each part.
            workspace: where the result may be put.

        Raises:
            ConfigurationError: a part is no whole distribution.
        """
        told = [reader(rows) for reader in readers if reader is not None]
        whole = [signal.logits for signal in told if isinstance(signal, TokenLogits)]
        if len(whole) < len(told):
            raise ConfigurationError(
                f"Got {', '.join(sorted({type(signal).__name__ for signal in told}))} of teachers that are composed; "
                "expected whole distributions: what is left out of one cannot be composed. Use `hidden`."
            )
        return TokenLogits(self.composition.of(whole, empty_for(whole, len(whole[0]), workspace)))


def _scattered(pieces: Sequence[Any], places: Sequence[Tensor], workspace: Workspace | None) -> TokenSignal:
    """Put pieces of one kind into the order that `places` tells: where each of its tokens goes."""
    kinds = {type(piece) for piece in pieces}
    if len(kinds) > 1:
        raise ConfigurationError(
            f"Got {' and '.join(sorted(kind.__name__ for kind in kinds))} of the teachers of one batch; expected one "
            "kind of answers. Give all teachers the same `teacher_cache_kind` or `teacher_server_kind`."
        )
    large = workspace if kinds == {TokenLogits} else None
    names = [f.name for f in fields(pieces[0]) if f.name != "workspace"]
    ragged = kinds == {TokenSampled}  # as wide as there are different ids among the draws: the rest has weight 0
    values = {name: [getattr(piece, name) for piece in pieces] for name in names}
    return type(pieces[0])(**{name: scattered(values[name], places, large, ragged=ragged) for name in names})


def padded(signal: TeacherSignal, count: int) -> TeacherSignal:
    """Append zeros to the signal for tokens of which the teacher says nothing, to `count` tokens in all."""
    more = count - len(signal)
    if isinstance(signal, Aligned):
        return replace(signal, places=F.pad(signal.places, (0, more)))
    if isinstance(signal, Composed):
        return replace(signal, parts=tuple(padded(part, count) for part in signal.parts))
    if isinstance(signal, Routed):  # one that was asked speaks of them, too
        asked = next(k for k, part in enumerate(signal.parts) if part is not None)
        longer = [padded(p, len(p) + more) if k == asked and p else p for k, p in enumerate(signal.parts)]
        return Routed(tuple(longer), torch.cat([signal.owners, signal.owners.new_full((more,), asked)]))
    values = {f.name: getattr(signal, f.name) for f in fields(signal) if f.name != "head"}
    return replace(signal, **{k: F.pad(v, (0, 0) * (v.ndim - 1) + (0, more)) for k, v in values.items()})  # type: ignore


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigurationError(f"Got {name}={value}; expected at least 1. It is the number of ids kept per token.")


TokenSignal = TokenLogits | TokenTopK | TokenSampled | TokenLogprobs
TeacherSignal = HiddenStates | Logits | TopK | Sampled | TokenLogprobs | Routed | Composed | Aligned
