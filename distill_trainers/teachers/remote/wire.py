"""What goes between a trainer and its teacher's server: questions and answers as arrays, in safetensors.

A message is one safetensors file: arrays behind a JSON header whose `__metadata__` says what they are. Nothing in it is
ever executed; whatever does not fit is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ...losses.cross_tokenizer import NUM_BUCKETS
from ...signals import Head
from ...storage import tensor_bytes
from ..cache.identity import CacheIdentity
from ..cache.kinds import ANSWER_KINDS
from ..cache.shards import Answer
from ..heads import head_of, head_parts
from ..rows import TokenRow

PROTOCOL = 2  # raised whenever an older client or server would misunderstand a message
SERVER_KINDS = tuple(ANSWER_KINDS)
_ARRAYS = {"hidden": {"hidden"}, "topk": {"ids", "logps", "tail"}, "token_logprobs": {"logps"}}
_ARRAYS |= {"sampled": {"ids", "logps", "counts", "lengths"}, "next_bytes": {"logps", "buckets"}}
_COUNTED = {"ids", "counts", "lengths"}
_WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_REAL = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # what torch compares and adds
_HEADER_BYTES = 64 * 2**10
_ABOVE_0 = 1e-3  # of a log-probability, by rounding
_OFF_1 = 0.05  # of a sum of probabilities; log-probabilities may be float16

_NOT_1 = "its probabilities do not add up to 1"


class WireError(ValueError):
    """A message that is not what the protocol says."""


@dataclass(frozen=True)
class Wanted:
    """What is to be said about each trained token.

    Attributes:
        kind: one of `SERVER_KINDS`.
        vocab_size: ids from here on leave the softmax; None keeps all.
        dtype: of the numbers; None is the teacher's own for hidden states, else float32.
        top_k, draws, seed: of the kinds topk and sampled.
    """

    kind: str
    vocab_size: int | None = None
    dtype: str | None = None
    top_k: int | None = None
    draws: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Question:
    """Rows of tokens, and what is wanted of them.

    Attributes:
        tokenizer: fingerprint of the tokenizer that the ids are of.
    """

    wanted: Wanted
    tokenizer: str
    rows: Sequence[TokenRow]

    @property
    def counts(self) -> list[int]:
        """Trained tokens of each row."""
        return [len(positions) for _, positions in self.rows]


def pack(arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """Pack arrays on the CPU, and a few values beside them, into one message."""
    return tensor_bytes(arrays, {"protocol": str(PROTOCOL), "said": json.dumps(dict(facts))})


def unpack(message: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `pack` was given.

    Raises:
        WireError: the bytes are no such message, or of another version of the protocol.
    """
    size = int.from_bytes(message[:8], "little")
    if not 2 <= size <= min(_HEADER_BYTES, len(message) - 8):
        raise WireError("it does not begin with a safetensors header")
    try:
        metadata = json.loads(message[8 : 8 + size])["__metadata__"]
        if metadata["protocol"] != str(PROTOCOL):
            raise WireError(f"it is of protocol {metadata['protocol']!r}, expected {PROTOCOL}")
        arrays, facts = load(message), json.loads(metadata["said"])
        if not isinstance(facts, dict):
            raise WireError("its values are not a mapping")
        return arrays, facts
    except WireError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError, OverflowError) as error:
        raise WireError(f"it cannot be read ({type(error).__name__})") from error


def pack_question(question: Question) -> bytes:
    lengths = [len(ids) for ids, _ in question.rows]
    mask = np.zeros(sum(lengths), dtype=bool)
    start = 0
    for ids, positions in question.rows:
        mask[start + positions] = True
        start += len(ids)
    ids = np.concatenate([np.asarray(ids, dtype=np.int32) for ids, _ in question.rows])
    arrays = {"ids": torch.from_numpy(ids), "predicts": torch.from_numpy(mask)}
    arrays["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    return pack(arrays, {**vars(question.wanted), "tokenizer": question.tokenizer})


def unpack_question(message: bytes) -> Question:
    """Read the question in a message; ids may still be too large for a model.

    Raises:
        WireError: naming what is wrong with it.
    """
    arrays, facts = unpack(message)
    if arrays.keys() != {"ids", "predicts", "lengths"}:
        raise WireError(f"it holds {sorted(arrays)}, expected ids, lengths and predicts")
    ids, predicts, lengths = (arrays[name] for name in ("ids", "predicts", "lengths"))
    kinds = [(ids, torch.int32), (predicts, torch.bool), (lengths, torch.int32)]
    if any(array.ndim != 1 or array.dtype != dtype for array, dtype in kinds):
        raise WireError("its arrays are not int32 ids, bool predicts and int32 lengths, of one axis each")
    sizes = lengths.tolist()
    if not sizes or min(sizes) < 2 or sum(sizes) != len(ids) or len(predicts) != len(ids):
        raise WireError(f"{len(sizes)} rows of {sum(sizes)} tokens, at least 2 each, do not fit {len(ids)} ids")
    if ids.min() < 0:
        raise WireError("some ids are negative")
    rows = []
    for row_ids, mask in zip(_split(ids, sizes), _split(predicts, sizes), strict=True):
        positions = np.flatnonzero(mask)
        if not len(positions) or positions[-1] == len(row_ids) - 1:
            raise WireError("each row must ask about some of its positions, and not about its last one")
        rows.append((row_ids, positions))
    tokenizer = facts.pop("tokenizer", None)
    if not isinstance(tokenizer, str):
        raise WireError("it does not say of which tokenizer its ids are")
    return Question(_wanted(facts), tokenizer, rows)


def _split(array: Tensor, sizes: Sequence[int]) -> list[np.ndarray]:
    return np.split(array.numpy(), np.cumsum(sizes)[:-1])


def _wanted(facts: Mapping[str, Any]) -> Wanted:
    if facts.keys() != {f.name for f in fields(Wanted)}:
        raise WireError(f"it asks with {sorted(facts)}, expected {sorted(f.name for f in fields(Wanted))}")
    wanted = Wanted(**facts)
    if wanted.kind not in SERVER_KINDS:
        raise WireError(f"it asks for {wanted.kind!r}, expected one of {', '.join(SERVER_KINDS)}")
    numbers = {"vocab_size": 2**31, "top_k": 2**31, "draws": 32767, "seed": 2**63}
    for name, most in numbers.items():
        value = getattr(wanted, name)
        least = 0 if name == "seed" else 1
        if value is not None and not (type(value) is int and least <= value <= most):
            raise WireError(f"its {name} is {value!r}, expected a whole number from {least}")
    for kind, name in (("topk", "top_k"), ("sampled", "draws")):
        if wanted.kind == kind and getattr(wanted, name) is None:
            raise WireError(f"it asks for {kind} without {name}")
    return wanted


def pack_head(head: Head) -> bytes:
    """Pack a whole head with all that belongs to it."""
    return pack(*head_parts(head))


def unpack_head(message: bytes, device: torch.device) -> Head:
    """Return the head that `pack_head` was given, on `device`.

    Raises:
        WireError: it is no head.
    """
    try:
        return head_of(*unpack(message), device)
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"it holds no head ({error})") from error


def problem_of(answer: Answer, count: int, wanted: Wanted, info: dict[str, Any], known_ids: int | None) -> str | None:
    """Say why an answer cannot be about `count` tokens; None if it can.

    Args:
        known_ids: ids from here on are in no vocabulary; None if that is not known.
    """
    if answer.keys() != _ARRAYS[wanted.kind]:
        return f"it holds {', '.join(sorted(answer)) or 'nothing'}, expected {', '.join(sorted(_ARRAYS[wanted.kind]))}"
    if any(values.dtype not in (_WHOLE if name in _COUNTED else _REAL) for name, values in answer.items()):
        return "its numbers are not of the types that they should have"
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
        good &= "buckets" not in answer or list(answer["buckets"].shape) == [count, NUM_BUCKETS]
    if not good:
        return "its arrays have other shapes than its question asked for"
    return _problem_of_numbers(answer, wanted, known_ids)


def _problem_of_numbers(answer: Answer, wanted: Wanted, known_ids: int | None) -> str | None:
    if "hidden" in answer:
        return None if bool(answer["hidden"].isfinite().all()) else "some of its hidden states are not finite"
    if any(not bool((answer[name] <= _ABOVE_0).all()) for name in ("logps", "tail", "buckets") if name in answer):
        return "some of its log-probabilities are above 0, or not numbers"
    if "buckets" in answer and not _add_up(answer["buckets"].double().exp().sum(-1)):
        return _NOT_1
    ids = answer.get("ids")
    if ids is None or not ids.numel():
        return None
    if known_ids and not 0 <= int(ids.min()) <= int(ids.max()) < known_ids:
        return f"it tells of ids that are not in a vocabulary of {known_ids}"
    if wanted.kind == "topk":
        if not _add_up(answer["logps"].double().exp().sum(-1) + answer["tail"].double().exp()):
            return _NOT_1
    else:
        counts = answer["counts"].long()
        drawn = torch.segment_reduce(counts.double(), "sum", lengths=answer["lengths"].long())
        if bool((counts < 1).any()) or bool((drawn != (wanted.draws or 1)).any()):
            return f"it counts other than {wanted.draws} draws for a token"
    tokens = torch.arange(len(ids)) if ids.ndim == 2 else torch.arange(len(answer["lengths"]))
    width = ids.shape[1] if ids.ndim == 2 else answer["lengths"].long()
    places = tokens.repeat_interleave(width) * 2**32 + ids.flatten().long()
    return None if len(places.unique()) == ids.numel() else "it tells of the same id twice for a token"


def _add_up(mass: Tensor) -> bool:
    return bool(((mass - 1).abs() < _OFF_1).all())


def empty_answer(count: int, wanted: Wanted, info: dict[str, Any], dtype: torch.dtype | None = None) -> Answer:
    """Make an answer about `count` tokens that says nothing: right shapes, finite numbers.

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
    if wanted.kind == "next_bytes":
        return {"logps": zeros, "buckets": torch.full((count, NUM_BUCKETS), -math.log(NUM_BUCKETS))}
    return {"logps": zeros}


def _ids_told(wanted: Wanted, info: dict[str, Any]) -> int:
    """k of top-k: no more than there are."""
    return min(n for n in (wanted.top_k, wanted.vocab_size, info["vocab_rows"]) if n is not None)


NUMBER_DTYPES = {name: kind.dtypes for name, kind in ANSWER_KINDS.items()}


def answer_bytes(wanted: Wanted, info: dict[str, Any]) -> float:
    """Estimate how many bytes an answer takes for each trained token."""
    identity, dtype = answer_identity(wanted, info), getattr(torch, info["dtype"])
    return ANSWER_KINDS[wanted.kind](identity).token_bytes(info["hidden_size"] or 0, dtype)


def answer_identity(wanted: Wanted, info: dict[str, Any]) -> CacheIdentity:
    """Tell what is wanted in the terms of `cache.kinds`, which knows how answers are stored and read."""
    rows = info["vocab_rows"]
    return CacheIdentity(
        kind=wanted.kind,
        dtype=wanted.dtype,
        top_k=wanted.top_k,
        draws=wanted.draws,
        seed=wanted.seed,
        vocab_size=rows if wanted.vocab_size is None else min(rows, wanted.vocab_size),
        tokenizer=info["tokenizer"],
        autocast="no",
        teacher_rows=rows,
    )
