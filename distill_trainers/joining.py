"""Several distributions made one, and values of some tokens put in their places: arithmetic, no teachers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .exceptions import ConfigurationError

if TYPE_CHECKING:
    from .losses.workspace import Workspace


@dataclass(frozen=True)
class Composition:
    """One distribution made of several, from their logits `[n, V]`.

    Its logits are sum w_i z_i: with weights that add up to 1, the normalised geometric mean of the distributions, or,
    if some are negative, one moved away from theirs. An `arithmetic` mean is log sum w_i p_i.

    Args:
        weights: one for each distribution, none of them 0; at least 0 for an arithmetic mean.
    """

    weights: tuple[float, ...]
    arithmetic: bool = False

    def of(self, logits: Sequence[Tensor], out: Tensor) -> Tensor:
        """Write the composed logits into `out` `[n, V]`. An id that a teacher excludes (-inf) is excluded."""
        if self.arithmetic:
            torch.log_softmax(logits[0].to(out.dtype), -1, out=out).add_(math.log(self.weights[0]))
            for weight, values in zip(self.weights[1:], logits[1:], strict=True):
                torch.logaddexp(out, F.log_softmax(values.to(out.dtype), -1).add_(math.log(weight)), out=out)
            return out
        torch.mul(logits[0], self.weights[0], out=out)
        for weight, values in zip(self.weights[1:], logits[1:], strict=True):
            out.add_(values, alpha=weight)
        for weight, values in zip(self.weights, logits, strict=True):
            if weight < 0:  # -inf times it is +inf, or makes a NaN of another -inf
                out.masked_fill_(values == -math.inf, -math.inf)
        return out


def empty_for(pieces: Sequence[Tensor], count: int, workspace: Workspace | None = None) -> Tensor:
    """Return an uninitialised tensor of `count` rows, in the widest dtype of the pieces."""
    dtype = pieces[0].dtype
    for piece in pieces[1:]:
        dtype = torch.promote_types(dtype, piece.dtype)
    shape = (count, *pieces[0].shape[1:])
    if workspace is not None:
        return workspace.take(shape, dtype, pieces[0].device)
    return pieces[0].new_empty(shape, dtype=dtype)


def scattered(
    pieces: Sequence[Tensor], places: Sequence[Tensor], workspace: Workspace | None = None, *, ragged: bool = False
) -> Tensor:
    """Put rows of several pieces in their places.

    Args:
        pieces: `[n_k, ...]`.
        places: int64 `[n_k]`, together all of 0 to n - 1.
        ragged: widen the last axis of narrower pieces by zeros.

    Returns:
        `[n, ...]` in the widest dtype of the pieces.

    Raises:
        ConfigurationError: the pieces differ in their width.
    """
    if ragged:
        most = max(piece.shape[-1] for piece in pieces)
        pieces = [F.pad(piece, (0, most - piece.shape[-1])) for piece in pieces]
    if len({piece.shape[1:] for piece in pieces}) > 1:
        raise ConfigurationError(
            f"Got {[list(piece.shape[1:]) for piece in pieces]} numbers per token of the teachers of one batch; "
            "expected as many of each. Give all teachers the same top k."
        )
    out = empty_for(pieces, sum(map(len, pieces)), workspace)
    for piece, place in zip(pieces, places, strict=True):
        out.index_copy_(0, place.to(out.device), piece.to(out.dtype))
    return out
