"""The loss against a teacher with a tokenizer of its own, token by token of the student.

Both models read the same bytes, cut into chunks that both tokenisations have (see `data/other_tokenizer.py`). A term is
a value at some of the student's N tokens: `alm` at the last of each chunk, the others at tokens that begin where one of
the teacher's does. All are summed over the tokens and divided by their number in the step, as any other loss.

A chunk's likelihood is a sum over tokens, whose gradient at one of them depends on the others. So the log-probabilities
of all tokens are had once ahead of the loss, and with them the slope s_k of each chunk's value; the gradient is then
that of s_k * log q(y_t) at each of its tokens, exactly.

Shapes: N trained tokens of the student, M of the teacher, n tokens of one part of the fused head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..exceptions import ConfigurationError
from ..signals import Aligned, NextBytes, TeacherSignal, TokenLogits, TokenLogprobs, TokenSignal
from .cross_tokenizer import NUM_BUCKETS, alm, bucket_logps, exact_overlap, uld
from .divergences import Divergence
from .fused_linear import signal_chunks
from .fused_logps import signal_token_logps
from .reduction import sum_per_row
from .sparse import token_logps

TERMS = ("alm", "next_byte", "exact_overlap", "uld")
DEFAULT_TERMS = {"alm": 1.0, "next_byte": 1.0}
OF_TEXT = frozenset({"alm", "next_byte"})  # `NextBytes` tell enough for them; the others are sums over tokens
TEACHER_LOGPS = "teacher_chunk_logps"  # at the last token of each chunk; see `Chunks.teacher_at_tokens`
_VALUE, _SLOPE = "chunk_value", "chunk_slope"


@dataclass(frozen=True)
class Chunks:
    """Which chunk of bytes each token of a batch is part of, for both models.

    Args:
        rows: `[N]`, the row of each token of the student.
        numbers: `[N]`, its chunk: from 1 on in each row, 0 for none.
        signal: of the teacher.
        shape: rows of the batch, and one more than the chunks that a row may have.
    """

    rows: Tensor
    numbers: Tensor
    signal: Aligned
    shape: tuple[int, int]

    @property
    def places(self) -> Tensor:
        """`[N]`: chunks of the whole batch."""
        return self.rows * self.shape[1] + self.numbers

    @property
    def is_last(self) -> Tensor:
        """Whether a token is the last of its chunk, bool `[N]`."""
        return (self.numbers > 0) & _changes(self.places)

    def sums(self, logps: Tensor) -> Tensor:
        """Sum the student's log-probabilities `[N]` by chunk."""
        return sum_per_row(logps, self.places, math.prod(self.shape))

    def teacher_sums(self, logps: Tensor) -> Tensor:
        """Sum the teacher's log-probabilities `[M]` by chunk."""
        places = self.signal.rows * self.shape[1] + self.signal.chunks
        return sum_per_row(logps, places, math.prod(self.shape))

    def teacher_at_tokens(self, logps: Tensor) -> Tensor:
        """Return the teacher's `[M]` at the student's tokens `[N]`, so that rows add up to log p(y).

        Those of a chunk stand at its last token, those of no chunk at the row's last one, and 0 at all others.
        """
        sums = self.teacher_sums(logps)
        rest = torch.where(_changes(self.rows), sums[self.rows * self.shape[1]], 0)
        return torch.where(self.is_last, sums[self.places], 0) + rest


def _changes(values: Tensor) -> Tensor:
    return values != pad(values[1:], (0, 1), value=-1)


def by_chunk(logps: Tensor, chunks: Tensor) -> Tensor:
    """Put at each token the sum of the values `[B, T]` of its chunk `[B, T]`; those of no chunk (0) stay."""
    return torch.where(chunks > 0, _summed(logps, chunks.long()), logps)


def by_event(logps: Tensor, chunks: Tensor, comparable: Tensor, mask: Tensor) -> Tensor:
    """Sum values `[B, T]` of trained tokens between borders that no token of either model may cross.

    Which tokens a text has before any other border depends on what follows. Even that one of these has been reached is
    told by the first token behind it: that is where a sum stands, the row's last one at its last token. So a policy
    gradient that gives each token what stands at it and behind has all that the token decides. It is exact where
    borders are told by the two bytes beside them; a pre-tokenizer that looks further ahead (white space) may move one.

    Args:
        chunks, comparable, mask: `[B, T]`; the first two as in `data/other_tokenizer.py`.
    """
    fits = comparable > 0
    before = pad(mask[:, :-1], (1, 0)), pad(chunks[:, :-1], (1, 0)), pad(fits[:, :-1], (1, 0))
    begins = mask & (~before[0] | ((chunks != before[1]) & (fits | before[2])))
    events = torch.where(mask, begins.cumsum(1), 0)
    is_last, ends = mask & ~pad(mask[:, 1:], (0, 1)), events != pad(events[:, 1:], (0, 1))
    sums = torch.where(mask & ends, _summed(logps, events), 0)
    return torch.where(is_last, sums, 0) + pad(torch.where(is_last, 0, sums)[:, :-1], (1, 0))


def _summed(values: Tensor, groups: Tensor) -> Tensor:
    sums = values.new_zeros(len(values), values.shape[1] + 1).scatter_add(1, groups, values)
    return sums.gather(1, groups)


@torch.no_grad()
def chunk_entries(
    chunks: Chunks, logps: Tensor, teacher_logps: Tensor, comparable: Tensor, temperature: float
) -> dict[str, Tensor]:
    """Compute what is known of chunks ahead of the loss, `[N]` each.

    Args:
        logps: `[N]`, the student's of its tokens.
        teacher_logps: `[M]`, the teacher's of its own.
        comparable: `[N]`, above 0 where the chunk of a token counts.
        temperature: τ of `alm`.

    Returns:
        the teacher's log-probabilities at the student's tokens; the value of `alm` at the last token of each chunk; and
        its slope by the student's log-probability of the chunk, at every token of it.
    """
    fits = (chunks.numbers > 0) & (comparable > 0)
    theirs = chunks.teacher_sums(teacher_logps.to(logps))[chunks.places]
    with torch.enable_grad():
        student = chunks.sums(logps)[chunks.places].requires_grad_()
        values = alm(student, theirs, temperature)
        (slopes,) = torch.autograd.grad(values.sum(), student)
    return {
        TEACHER_LOGPS: chunks.teacher_at_tokens(teacher_logps.to(logps)),
        _VALUE: torch.where(fits & chunks.is_last, values.detach(), 0),
        _SLOPE: torch.where(fits, slopes, 0),
    }


@torch.no_grad()
def next_bytes_of(
    signal: TeacherSignal, ids: Tensor, first_bytes: Tensor, *, chunk_bytes: int | None = None
) -> NextBytes:
    """Sum a teacher's distributions before N tokens by next byte.

    Args:
        ids: `[N]`, these tokens.
        first_bytes: `[V]`, the bucket of each id (`TokenBytes.first_bytes`).
        chunk_bytes: see `fused_linear_terms`.
    """
    values, buckets = [], []
    with torch.autocast(ids.device.type, enabled=False):
        for rows, logits in signal_chunks(signal, ids, chunk_bytes):
            assert isinstance(logits, TokenLogits)
            values.append(token_logps(logits, ids[rows]).clone())
            buckets.append(bucket_logps(logits.logits, _of_device(first_bytes, logits.logits)))
    return NextBytes(torch.cat(values), torch.cat(buckets))


@dataclass(frozen=True)
class AlignedLoss:
    """Terms of a loss between models with different tokenizers.

    Args:
        weights: of the terms, by name.
        temperature: divides both models' logits in all terms but `alm`.
        student_bytes, teacher_bytes: `[V]` and `[V']`, the bucket of each id by its first byte.
        student_ids, teacher_ids: `[S]`, ids that stand for the same bytes.
    """

    weights: Mapping[str, float]
    temperature: float
    student_bytes: Tensor
    teacher_bytes: Tensor
    student_ids: Tensor
    teacher_ids: Tensor

    def told(self, signal: Aligned, chunk_bytes: int | None = None) -> Aligned:
        """Return all that the terms take of a teacher's signal: with less than distributions, its head runs once."""
        whole, names = signal.told, self.weights.keys()
        if isinstance(whole, TokenLogprobs) or not names <= OF_TEXT or (self.temperature != 1 and "next_byte" in names):
            return signal
        if names == {"alm"}:
            return replace(signal, told=TokenLogprobs(signal_token_logps(whole, signal.ids, chunk_bytes=chunk_bytes)))
        told = next_bytes_of(whole, signal.ids, self.teacher_bytes, chunk_bytes=chunk_bytes)
        return replace(signal, told=told)

    def terms(
        self, student: TokenLogits, teacher: TokenSignal | None, tokens: Mapping[str, Tensor], divergence: Divergence
    ) -> dict[str, Tensor]:
        """Compute the terms `[n]`, and the shares of tokens that they are on.

        Args:
            student: logits `[n, V]`.
            teacher: what it says where these tokens begin; for `alm` alone, anything.
            tokens: with what `chunk_entries` gives, and `token_shared`.
            divergence: of `next_byte` and `exact_overlap`.

        Raises:
            ConfigurationError: the teacher tells of some ids only.
        """
        begins = tokens["token_shared"] > 0
        terms: dict[str, Tensor] = {}
        if "alm" in self.weights:
            logps = token_logps(student, tokens["labels"])
            # Zero but for its gradient.
            terms["alm"] = tokens[_VALUE] + tokens[_SLOPE] * (logps - logps.detach())
        others = [name for name in self.weights if name != "alm"]
        for name, values in self._of_distributions(student, teacher, divergence, others).items() if others else ():
            # A token of both means the same event only where both take it by itself.
            where = begins & (tokens["token_alone"] > 0) if name == "exact_overlap" else begins
            terms[name] = torch.where(where, values, 0)
        values = next(iter(terms.values()))
        return terms | {
            "shared_borders": begins.to(values.dtype),
            "comparable": (tokens["token_comparable"] > 0).to(values.dtype),
        }

    def value(
        self, student: TokenLogits, teacher: TokenSignal | None, tokens: Mapping[str, Tensor], divergence: Divergence
    ) -> Tensor:
        """Sum the terms `[n]` by their weights."""
        terms = self.terms(student, teacher, tokens, divergence)
        return torch.stack([weight * terms[name] for name, weight in self.weights.items()]).sum(0)

    def _of_distributions(
        self, student: TokenLogits, teacher: TokenSignal | None, divergence: Divergence, names: list[str]
    ) -> dict[str, Tensor]:
        """The terms of whole distributions, at every token."""
        tau, terms = self.temperature, dict[str, Tensor]()
        if isinstance(teacher, NextBytes) and names == ["next_byte"] and tau == 1:
            logits, buckets = teacher.buckets, self._said_by_both()  # a bucket is the one token that begins so
        elif isinstance(teacher, TokenLogits):
            logits, buckets = teacher.logits, self.teacher_bytes
        else:
            raise ConfigurationError(
                f"Got a teacher's {type(teacher).__name__} for {', '.join(names)}; expected its whole distribution. "
                "Set `cross_tokenizer: {alm: 1.0}`, for which log-probabilities of tokens do, or the kind `hidden`."
            )
        both = [side if tau == 1 else side / tau for side in (student.logits, logits)]
        if "next_byte" in names:
            sides = zip(both, (self.student_bytes, buckets), strict=True)
            terms["next_byte"] = divergence(*(bucket_logps(x, _of_device(ids, x)) for x, ids in sides))
        if {"exact_overlap", "uld"} & set(names):
            logps = [logits.log_softmax(-1) for logits in both]
            if "exact_overlap" in names:
                ids = (part.to(logps[0].device) for part in (self.student_ids, self.teacher_ids))
                terms["exact_overlap"] = exact_overlap(divergence, *logps, *ids)
            if "uld" in names:
                terms["uld"] = uld(*logps)
        return terms

    def _said_by_both(self) -> Tensor:
        """The bucket `[258]` that each of a teacher's own is part of, as `common_buckets` has them."""
        said = torch.bincount(self.student_bytes, minlength=NUM_BUCKETS) > 0
        return torch.where(said, torch.arange(NUM_BUCKETS, device=said.device), NUM_BUCKETS - 1)


def _of_device(buckets: Tensor, logits: Tensor) -> Tensor:
    """The bucket of each id that has logits: ids beyond the tokenizer's are special."""
    return pad(buckets, (0, max(0, logits.shape[-1] - len(buckets))), value=NUM_BUCKETS - 1)[: logits.shape[-1]].to(
        logits.device
    )
