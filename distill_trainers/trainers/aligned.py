"""The loss against a teacher with a tokenizer of its own, as a run's settings and its tokenizers have it."""

from __future__ import annotations

from typing import Any

import torch

from ..data.alignment import shared_ids
from ..data.other_tokenizer import OtherTokenizer
from ..losses.aligned import AlignedLoss
from ..losses.cross_tokenizer import common_buckets


def aligned_loss(args: Any, other: OtherTokenizer) -> AlignedLoss:
    """Build the loss of a config with `aligned_terms`."""
    weights, student, teacher = args.aligned_terms, other.student.tokens, other.teacher.tokens
    nothing = torch.zeros(0, dtype=torch.int64)
    return AlignedLoss(
        weights,
        args.alm_temperature,
        args.kd_temperature,
        *common_buckets(student.first_bytes(), teacher.first_bytes()),
        *(shared_ids(student, teacher) if "exact_overlap" in weights else (nothing, nothing)),
    )
