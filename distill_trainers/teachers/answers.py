"""The arrays of a remote teacher's answers: whether they can be one, and what stands in for one that never came."""

from __future__ import annotations

import math
from typing import Any

import torch

from .cache_files import Row
from .wire import Wanted


def problem_of(answer: Row, count: int, wanted: Wanted, info: dict[str, Any], known_ids: int | None) -> str | None:
    """Why an answer cannot be about `count` tokens; None if it can.

    Args:
        info: what the server says of itself.
        known_ids: ids from here on are in no vocabulary; None if that is not known.
    """
    try:
        if wanted.kind == "hidden":
            good = list(answer["hidden"].shape) == [count, info["hidden_size"]]
        elif wanted.kind == "topk":
            good = list(answer["ids"].shape) == list(answer["logps"].shape) == [count, _ids_told(wanted, info)]
            good &= list(answer["tail"].shape) == [count]
        elif wanted.kind == "sampled":
            lengths = answer["lengths"]
            total = [int(lengths.sum())]
            good = list(lengths.shape) == [count] and bool((lengths > 0).all())
            good &= all(list(answer[name].shape) == total for name in ("ids", "logps", "counts"))
        else:
            good = list(answer["logps"].shape) == [count]
    except KeyError as error:
        return f"it lacks {error}"
    if not good:
        return "its arrays have other shapes than its question asked for"
    ids = answer.get("ids")
    if ids is not None and ids.numel() and known_ids and not 0 <= int(ids.min()) <= int(ids.max()) < known_ids:
        return f"it tells of ids that are not in a vocabulary of {known_ids}"
    return None


def empty_answer(count: int, wanted: Wanted, info: dict[str, Any], dtype: torch.dtype | None = None) -> Row:
    """An answer about `count` tokens that says nothing: right shapes, finite numbers.

    Args:
        dtype: of hidden states.
    """
    if wanted.kind == "hidden":
        return {"hidden": torch.zeros(count, info["hidden_size"], dtype=dtype)}
    if wanted.kind == "topk":
        ids = torch.arange(_ids_told(wanted, info)).repeat(count, 1)
        even = -math.log(ids.shape[1] + 1)
        return {"ids": ids, "logps": torch.full(ids.shape, even), "tail": torch.full((count,), even)}
    zeros = torch.zeros(count)
    if wanted.kind == "sampled":
        ones = torch.ones(count, dtype=torch.long)
        return {"ids": torch.zeros_like(ones), "logps": zeros, "counts": ones, "lengths": ones}
    return {"logps": zeros}


def _ids_told(wanted: Wanted, info: dict[str, Any]) -> int:
    """k of top-k: no more than there are."""
    return min(n for n in (wanted.top_k, wanted.vocab_size, info["vocab_rows"]) if n is not None)
