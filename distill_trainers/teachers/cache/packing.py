"""How a cache keeps answers on disk: ids in as few bits as they need, and log-probabilities, if asked to, in eight.

Ids lose nothing. Sorted, they are told by their low bits and by a bit map of the high ones (Elias-Fano): for k of V ids
about 2 + log2(V / k) bits each, where the least for any code is log2(V / k) + 1.44. What eight bits do to a loss is in
the page on the maths.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...exceptions import CacheError
from ...signals import Head, TeacherSignal
from .identity import CacheIdentity
from .kinds import ANSWER_KINDS, CacheKind, SampledKind, TopKKind
from .shards import Answer

_STEPS = 254
_NEVER = 255  # the code of -inf
_FARTHEST = 256.0  # nats: ids that a teacher masks, by -10^9 or so, would else leave the others one step in common
_GRID = torch.cat([-(torch.arange(_NEVER) / _STEPS).square(), torch.tensor([-torch.inf])])


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Bits of k different ids below V: a map with k ones, whose place less their number is the high part; low parts."""

    k: int
    vocab_size: int

    @property
    def low(self) -> int:
        return max(0, (self.vocab_size // self.k).bit_length() - 1)

    @property
    def map(self) -> int:
        return self.k + ((self.vocab_size - 1) >> self.low)

    @property
    def bytes(self) -> int:
        return -(-(self.map + self.k * self.low) // 8)


def pack_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """Pack `[n, k]` ids below `vocab_size`, in ascending order and all different, into `[n, B]` bytes."""
    layout, values = _Layout(ids.shape[1], vocab_size), ids.numpy()
    bits = np.zeros((len(values), layout.map), dtype=bool)
    np.put_along_axis(bits, (values >> layout.low) + np.arange(layout.k), True, axis=1)
    low = (values[..., None] >> np.arange(layout.low) & 1).reshape(len(values), -1)
    return torch.from_numpy(np.packbits(np.hstack([bits, low.astype(bool)]), axis=1))


def unpack_ids(packed: Tensor, k: int, vocab_size: int) -> Tensor:
    """Return the `[n, k]` ids, int32, that `pack_ids` was given."""
    layout = _Layout(k, vocab_size)
    bits = np.unpackbits(packed.numpy(), axis=1, count=layout.map + k * layout.low).view(bool)
    high = np.flatnonzero(bits[:, : layout.map]).reshape(len(bits), k) % layout.map - np.arange(k)
    exact = np.float32 if layout.low <= 24 else np.float64  # a product is fast
    low = bits[:, layout.map :].reshape(len(bits), k, layout.low).astype(exact)
    ids = (high << layout.low) + (low @ (1 << np.arange(layout.low)).astype(exact)).astype(np.int64)
    return torch.from_numpy(ids.astype(np.int32))


def round_logps(logps: Tensor) -> Answer:
    """Tell log-probabilities `[n, k]` by their distances from each token's likeliest id, on a grid of eight bits.

    Steps grow with the square root of the distance, so that large probabilities are the more exact, and no other id
    becomes as likely as the likeliest.

    Distances beyond 256, of ids that are 10^111 times less likely, become 256.

    Returns:
        codes `[n, k]`, uint8, and the largest finite distance of each token, scale `[n]`; NaN if any number is.
    """
    gaps = logps.amax(-1, keepdim=True) - logps.float()
    never = gaps == torch.inf
    gaps = gaps.clamp(max=_FARTHEST)
    scale = gaps.masked_fill(never, 0).amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (_STEPS * (gaps / scale).sqrt()).round()
    codes = torch.maximum(codes, (gaps > 0).float()).masked_fill(never, _NEVER)
    return {"codes": codes.nan_to_num().to(torch.uint8), "scale": scale.squeeze(-1)}


def unround_logps(codes: Tensor, scale: Tensor, tail_logps: Tensor) -> Tensor:
    """Return log-probabilities `[n, k]`, float32, whose mass is what the tail leaves."""
    shapes = _GRID[codes.int()].mul_(scale[:, None])
    # Not 1 - exp: a tail near 1 would leave no digits. Rounding may have put it at 1.
    kept = torch.log(-torch.expm1(tail_logps.clamp(max=-(2.0**-24))))
    return shapes.add_((kept - shapes.logsumexp(-1))[:, None])


class PackedTopK(TopKKind):
    """`TopKKind` on disk; caches of earlier versions, whose rows hold plain `ids`, are read as well."""

    dtypes = (*TopKKind.dtypes, "int8")

    def __init__(self, identity: CacheIdentity):
        self.rounds = identity.dtype == "int8"
        super().__init__(dataclasses.replace(identity, dtype=None) if self.rounds else identity)

    def store(self, signal: TeacherSignal, counts: Sequence[int], keys: Sequence[bytes]) -> list[Answer]:
        return [self._packed(**row) for row in super().store(signal, counts, keys)]

    def answer(self, rows: Sequence[Answer], head: Head | None, device: torch.device) -> TeacherSignal:
        plain: list[Answer] = []
        for packed, group in itertools.groupby(rows, lambda row: "packed" in row):
            alike = list(group)
            plain += [self._unpacked(**{n: torch.cat([r[n] for r in alike]) for n in alike[0]})] if packed else alike
        return super().answer(plain, head, device)

    def token_bytes(self, hidden_size: int, dtype: torch.dtype) -> float:
        numbers = self.k + 4 if self.rounds else self.k * self.number_dtype.itemsize
        return _Layout(self.k, self.identity.vocab_size).bytes + numbers + 4

    def _packed(self, ids: Tensor, logps: Tensor, tail: Tensor) -> Answer:
        ids, order = ids.sort(-1)
        logps = logps.gather(-1, order)
        numbers = round_logps(logps) if self.rounds else {"logps": logps}
        return {"packed": pack_ids(ids, self.identity.vocab_size), "tail": tail, **numbers}

    def _unpacked(self, packed: Tensor, tail: Tensor, **numbers: Tensor) -> Answer:
        logps = unround_logps(**numbers, tail_logps=tail) if self.rounds else numbers["logps"]
        return {"ids": unpack_ids(packed, self.k, self.identity.vocab_size), "logps": logps, "tail": tail}


class PackedSampled(SampledKind):
    """`SampledKind` on disk, with integers no wider than they need be."""

    def store(self, signal: TeacherSignal, counts: Sequence[int], keys: Sequence[bytes]) -> list[Answer]:
        ids, number = self._integers()
        narrow = {"ids": ids, "counts": number, "lengths": number}
        return [
            {name: values.to(narrow.get(name, values.dtype)) for name, values in row.items()}
            for row in super().store(signal, counts, keys)
        ]

    def answer(self, rows: Sequence[Answer], head: Head | None, device: torch.device) -> TeacherSignal:
        wide = [{n: v if v.is_floating_point() else v.int() for n, v in row.items()} for row in rows]
        return super().answer(wide, head, device)

    def token_bytes(self, hidden_size: int, dtype: torch.dtype) -> float:
        ids, number = self._integers()
        return self.draws / 2 * (ids.itemsize + self.number_dtype.itemsize + number.itemsize) + number.itemsize

    def _integers(self) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes of ids and of counts."""
        ids = torch.uint16 if self.identity.vocab_size <= 2**16 else torch.int32
        return ids, torch.uint8 if self.draws < 2**8 else torch.int16


CACHE_KINDS: dict[str, type[CacheKind]] = {**ANSWER_KINDS, "topk": PackedTopK, "sampled": PackedSampled}


def kind_of(identity: CacheIdentity, folder: str | Path) -> CacheKind:
    """Make the kind of answers that the cache in a folder holds.

    Raises:
        CacheError: it is none of these, as of a newer version.
    """
    kind = CACHE_KINDS.get(identity.kind)
    if kind is None or identity.dtype not in (None, *kind.dtypes):
        known = "; ".join(f"{name} in {', '.join(each.dtypes)}" for name, each in CACHE_KINDS.items())
        raise CacheError(
            f"The teacher cache {str(folder)!r} holds {identity.kind!r} in {identity.dtype!r}, but this version reads "
            f"{known}. Use the version that made it, or name another folder in `teacher_cache`."
        )
    return kind(identity)
