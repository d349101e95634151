"""The kinds of answers that caches hold and servers tell, and how each becomes arrays and a signal again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...exceptions import ConfigurationError
from ...losses import check_sparse
from ...losses.aligned import next_bytes_of
from ...losses.cross_tokenizer import NUM_BUCKETS
from ...losses.fused_logps import signal_token_logps
from ...randomness import Purpose, Role, Stream
from ...requirements import Requirements
from ...signals import Head, HiddenStates, NextBytes, Sampled, TeacherSignal, TokenLogits, TokenLogprobs, TopK
from .identity import CacheIdentity
from .shards import Answer

_CHUNK_BYTES = 64 * 2**20
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class CacheKind(ABC):
    """Turns a teacher's signal into rows and rows into a signal; what is stored, and no more, comes back.

    Attributes:
        name: of the setting `teacher_cache_kind`.
        dtypes: that its numbers may be stored in.
        tells: kinds of signal that come back (see `Teacher.provides`).
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    tells: ClassVar[frozenset[str]] = frozenset({"distribution"})

    def __init__(self, identity: CacheIdentity):
        self.identity = identity
        self.dtype = None if identity.dtype is None else _DTYPES[identity.dtype]

    def told(self, signal: TeacherSignal, ids: Tensor, first_bytes: Tensor | None) -> TeacherSignal:
        """Return what `store` takes, from a teacher's signal about N tokens.

        Args:
            ids: `[N]`, these tokens.
            first_bytes: see `next_bytes_of`; None where the tokenizer does not tell them.
        """
        return signal

    @abstractmethod
    def store(self, signal: TeacherSignal, counts: Sequence[int], keys: Sequence[bytes]) -> list[Answer]:
        """Cut `signal` into rows of `counts` tokens each, whose keys are `keys`."""

    @abstractmethod
    def answer(self, rows: Sequence[Answer], head: Head | None, device: torch.device) -> TeacherSignal:
        """Return the signal of all rows' tokens, in order, on `device`."""

    @abstractmethod
    def token_bytes(self, hidden_size: int, dtype: torch.dtype) -> float:
        """Estimate the bytes that a token takes, for a teacher of that hidden size and dtype."""


class HiddenKind(CacheKind):
    """Last hidden states, exactly as the teacher gave them unless a narrower dtype is asked for."""

    name = "hidden"
    dtypes = ("float32", "bfloat16", "float16")

    def store(self, signal: TeacherSignal, counts: Sequence[int], keys: Sequence[bytes]) -> list[Answer]:
        if not isinstance(signal, HiddenStates):
            raise ConfigurationError(
                "The teacher's logits cannot be rebuilt from its last hidden states (see the architecture page), so "
                "`teacher_cache_kind: hidden` cannot hold its answers. Use `topk` or `sampled`."
            )
        hidden = signal.hidden if self.dtype is None else signal.hidden.to(self.dtype)
        return [{"hidden": part} for part in hidden.cpu().split(list(counts))]

    def answer(self, rows: Sequence[Answer], head: Head | None, device: torch.device) -> TeacherSignal:
        assert head is not None
        hidden = torch.cat([row["hidden"] for row in rows]) if rows else head.weight.new_empty(0, head.weight.shape[1])
        return HiddenStates(hidden.to(device), head)

    def token_bytes(self, hidden_size: int, dtype: torch.dtype) -> float:
        return hidden_size * (self.dtype or dtype).itemsize


class _SparseKind(CacheKind):
    """Log-probabilities at temperature 1 of some ids for each token."""

    # Eight bits of bfloat16 would change probabilities by percents.
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float16")

    def __init__(self, identity: CacheIdentity):
        super().__init__(identity)
        self.number_dtype = self.dtype or torch.float32


def _chunks(signal: TeacherSignal, start: int, stop: int) -> Iterator[TokenLogits]:
    step = max(1, _CHUNK_BYTES // (4 * signal.width))
    for first in range(start, stop, step):
        logits = signal.chunk(slice(first, min(first + step, stop)))
        assert isinstance(logits, TokenLogits)
        yield logits


class TopKKind(_SparseKind):
    """The k most likely ids, and the log of the probability that all others share."""

    name = "topk"

    @property
    def k(self) -> int:
        """Ids per token."""
        return min(self.identity.top_k or 0, self.identity.vocab_size)

    def store(self, signal: TeacherSignal, counts: Sequence[int], keys: Sequence[bytes]) -> list[Answer]:
        parts = []
        for logits in _chunks(signal, 0, len(signal)):
            top = logits.top_k(self.k)
            parts.append((top.ids.int().cpu(), top.logps.to(self.number_dtype).cpu(), top.tail_logps.float().cpu()))
        joined = [torch.cat(chunks).split(list(counts)) for chunks in zip(*parts, strict=True)]
        return [{"ids": i, "logps": p, "tail": t} for i, p, t in zip(*joined, strict=True)]

    def answer(self, rows: Sequence[Answer], head: Head | None, device: torch.device) -> TeacherSignal:
        empty = {"ids": torch.empty(0, self.k), "logps": torch.empty(0, self.k), "tail": torch.empty(0)}
        ids, logps, tail = (torch.cat([row[n] for row in rows] or [empty[n]]).to(device) for n in empty)
        return TopK(ids, logps, tail)

    def token_bytes(self, hidden_size: int, dtype: torch.dtype) -> float:
        return self.k * (4 + self.number_dtype.itemsize) + 4


class SampledKind(_SparseKind):
    """Ids drawn from the teacher's distribution, how often each was drawn, and its log-probability.

    Gradients from such counts are unbiased (arXiv 2503.16870). Draws follow from seed and row, so that a row computed
    twice, in whatever batch, is drawn alike.
    """

    name = "sampled"

    @property
    def draws(self) -> int:
        """Draws per token."""
        return self.identity.draws or 1

    def store(self, signal: TeacherSignal, counts: Sequence[int], keys: Sequence[bytes]) -> list[Answer]:
        rows, start = [], 0
        for key, count in zip(keys, counts, strict=True):
            rows.append(self._draw(signal, start, start + count, key))
            start += count
        return rows

    def _draw(self, signal: TeacherSignal, start: int, stop: int, key: bytes) -> Answer:
        generator: torch.Generator | None = None
        parts = []
        for logits in _chunks(signal, start, stop):
            if generator is None:
                stream = Stream(self.identity.seed or 0, Role.TEACHER, Purpose.CACHE).at(row=key.hex())
                generator = stream.torch_generator(logits.logits.device)
            drawn = logits.sample(self.draws, generator)
            real = drawn.weights > 0
            counts = (drawn.weights[real] * self.draws).round().short()
            parts.append((drawn.ids[real].int(), drawn.logps[real].to(self.number_dtype), counts, real.sum(-1).short()))
        joined = [torch.cat(chunks).cpu() for chunks in zip(*parts, strict=True)]
        return dict(zip(("ids", "logps", "counts", "lengths"), joined, strict=True))

    def answer(self, rows: Sequence[Answer], head: Head | None, device: torch.device) -> TeacherSignal:
        ids, logps, counts, lengths = (
            torch.cat([row[name] for row in rows] or [torch.empty(0, dtype=torch.int16)]).to(device)
            for name in ("ids", "logps", "counts", "lengths")
        )
        width = int(lengths.max()) if len(lengths) else 1
        real = torch.arange(width, device=device) < lengths[:, None]

        def padded(values: Tensor) -> Tensor:
            return torch.zeros(real.shape, dtype=values.dtype, device=device).masked_scatter(real, values)

        return Sampled(padded(ids), padded(logps), padded(counts.float() / self.draws))

    def token_bytes(self, hidden_size: int, dtype: torch.dtype) -> float:
        # 50 draws are about 12 different ids (arXiv 2503.16870); a flat teacher has more.
        return self.draws / 2 * (4 + self.number_dtype.itemsize + 2) + 2


class NextBytesKind(CacheKind):
    """Of a teacher with a tokenizer of its own: log-probabilities of its tokens, and of each next byte before them."""

    name = "next_bytes"
    dtypes = ("float32", "float16")

    def told(self, signal: TeacherSignal, ids: Tensor, first_bytes: Tensor | None) -> TeacherSignal:
        assert first_bytes is not None
        return next_bytes_of(signal, ids, first_bytes)

    def store(self, signal: TeacherSignal, counts: Sequence[int], keys: Sequence[bytes]) -> list[Answer]:
        assert isinstance(signal, NextBytes)
        parts = signal.values.float(), signal.buckets.to(self.dtype or torch.float32)
        rows = zip(*(part.cpu().split(list(counts)) for part in parts), strict=True)
        return [{"logps": values, "buckets": buckets} for values, buckets in rows]

    def answer(self, rows: Sequence[Answer], head: Head | None, device: torch.device) -> TeacherSignal:
        empty = {"logps": torch.empty(0), "buckets": torch.empty(0, NUM_BUCKETS)}
        return NextBytes(*(torch.cat([row[n] for row in rows] or [empty[n]]).to(device) for n in empty))

    def token_bytes(self, hidden_size: int, dtype: torch.dtype) -> float:
        return NUM_BUCKETS * (self.dtype or torch.float32).itemsize + 4


class TokenLogprobsKind(CacheKind):
    """Log-probabilities of the given tokens, and nothing else."""

    name = "token_logprobs"
    dtypes = ("float32", "float16")
    tells = frozenset({"token_logprobs"})

    def told(self, signal: TeacherSignal, ids: Tensor, first_bytes: Tensor | None) -> TeacherSignal:
        return TokenLogprobs(signal_token_logps(signal, ids))

    def store(self, signal: TeacherSignal, counts: Sequence[int], keys: Sequence[bytes]) -> list[Answer]:
        assert isinstance(signal, TokenLogprobs)
        values = signal.values.to(self.dtype or torch.float32).cpu()
        return [{"logps": part} for part in values.split(list(counts))]

    def answer(self, rows: Sequence[Answer], head: Head | None, device: torch.device) -> TeacherSignal:
        return TokenLogprobs(torch.cat([row["logps"] for row in rows] or [torch.empty(0)]).to(device))

    def token_bytes(self, hidden_size: int, dtype: torch.dtype) -> float:
        return (self.dtype or torch.float32).itemsize


ANSWER_KINDS: dict[str, type[CacheKind]] = {
    kind.name: kind for kind in (HiddenKind, TopKKind, SampledKind, NextBytesKind, TokenLogprobsKind)
}

_SPARSE: dict[str, type[TopK] | type[Sampled]] = {"topk": TopK, "sampled": Sampled}


def told_kind(kind: str, top_k: int | None, draws: int | None) -> str:
    """Name a kind of answers together with the numbers that must agree where several teachers are read together."""
    return f"topk of {top_k} ids" if kind == "topk" else f"sampled by {draws} draws" if kind == "sampled" else kind


def refuse_sparse(kind: str, setting: str, wants: Requirements) -> None:
    """Refuse a sparse kind of answers, cached or remote, where the loss cannot be had from it.

    Raises:
        ConfigurationError: naming the kind by its `setting`.
    """
    if kind == NextBytesKind.name and not wants.accepts_next_bytes:
        raise ConfigurationError(
            f"Got `{setting}: {kind}` with {wants.trainer}; expected `teacher_tokenizer: own` beside it, no terms of "
            "`cross_tokenizer` but alm and next_byte, and `kd_temperature: 1`: it tells of next bytes and of the given "
            f"tokens alone. Use `{setting}: hidden`."
        )
    if kind == TokenLogprobsKind.name and "distribution" in wants.needs:
        less = " or `next_bytes`, or `cross_tokenizer: {alm: 1.0}`" if wants.accepts_next_bytes else ""
        raise ConfigurationError(
            f"{wants.trainer} needs the teacher's whole distribution, but `{setting}: {kind}` tells how likely the "
            f"given tokens are and nothing else. Use `{setting}: hidden`{less}."
        )
    if kind not in _SPARSE:
        return
    if not wants.accepts_sparse_teachers:
        raise ConfigurationError(
            f"{wants.trainer} needs the teacher's whole distribution, but `{setting}: {kind}` tells of "
            f"a few ids of each token. Use `{setting}: hidden`{' or `next_bytes`' if wants.accepts_next_bytes else ''}."
        )
    check_sparse(wants.divergence, _SPARSE[kind], wants.kd_temperature)
