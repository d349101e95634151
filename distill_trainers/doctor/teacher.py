"""Does the teacher say now what it said then, and here what it says there?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..data import DistillCollator
from ..data.labels import any_trained
from ..data.views import viewed_row
from ..exceptions import CacheError, ConfigurationError
from ..losses.reduction import trained_mask
from ..signals import TokenLogits, TokenLogprobs, TokenSampled, TokenTopK
from ..teachers import CachedTeacher, LocalTeacher, Teacher, shared_vocabulary
from ..teachers.base import Pair
from ..teachers.cache.identity import read_identity
from ..teachers.cache.opening import missing_from_cache
from ..teachers.cache.shards import TeacherCache
from ..teachers.rows import dataset_row_key
from .case import Case
from .findings import Finding, error, warning

_ROWS = 4
# Nats per token: other batch shapes and kernels round differently; a changed weight is far beyond.
_TOLERANCE = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.1}
_CHUNK = 256


def check_cache(case: Case) -> Iterator[Finding]:
    """Check that the teacher cache was made under this run's conditions, and can be read."""
    folder = case.args.teacher_cache
    if folder is None or case.tokenizer is None or case.teacher is None:
        return
    try:
        recorded = read_identity(folder)
        if recorded is None:
            return
        pair = Pair(case.student, case.teacher, tokenizer=case.tokenizer, teacher_tokenizer=case.teacher_tokenizer)
        missing_from_cache(pair, case.args, [])
        cache = TeacherCache(folder, recorded.stamp())
    except (ConfigurationError, CacheError) as error:
        yield Finding.of_error("teacher", error)
        return
    for name, reason in list(cache.damaged.items())[:3]:
        yield warning(
            "teacher",
            f"The shard {name} of the teacher cache {folder!r} cannot be used: {reason}.",
            "Run `distill-trainers cache-teacher` with this recipe: it asks the teacher for those rows again.",
        )


def check_answers(case: Case, other: Teacher | None = None) -> Iterator[Finding]:
    """Load the teacher; compare its answers with its cache's, and with `other`'s (a remote one), on a few rows.

    Raises:
        ConfigurationError: the teacher cannot be loaded.
    """
    rows = [viewed_row(row) for row in case.prepared or []]
    folder = case.args.teacher_cache
    cached = CachedTeacher(folder) if folder is not None and read_identity(folder) is not None else None
    known = [row for row in rows if cached is not None and dataset_row_key(row)[0] in cached.cache][:_ROWS]
    compared: list[tuple[str, Teacher, list[Any]]] = []
    if cached is not None and known:
        compared.append((f"its cache {folder!r}", cached, known))
    if other is not None:
        compared.append((f"{other.name!r}", other, [row for row in rows if any_trained(row["labels"])][:_ROWS]))
    if not compared or case.teacher is None:
        return
    live = LocalTeacher.loaded(Pair(case.student, case.teacher), case.args)
    for name, teacher, part in compared:
        gap = disagreement(case, live, teacher, part)
        narrow = case.args.bf16 or case.args.fp16  # what is asked here computes under autocast, the other may not
        narrow |= teacher is cached and cached.identity.dtype not in (None, "float32")
        limit = 0.1 if narrow else _TOLERANCE.get(case.teacher_dtype, 0.1)
        if not gap <= limit:
            yield error(
                "teacher",
                f"The teacher {case.teacher!r} and {name} are {gap:.3g} nats per token apart on {len(part)} rows of "
                f"the data ({limit:g} would be rounding).",
                "They are not the same model, or not in the same precision: make the cache anew, or serve the weights "
                "that the recipe names.",
            )


@torch.no_grad()
def disagreement(case: Case, one: Teacher, other: Teacher, rows: Sequence[Any]) -> float:
    """Average Σ p |log p − log p'| over trained tokens and the ids that both tell, in nats; p of the first."""
    assert case.tokenizer is not None
    fields, own = ("input_ids", "labels", "prompt_length"), case.args.has_own_tokenizer
    padding = 0 if own else case.tokenizer.pad_token_id
    batch = DistillCollator(padding)([{k: row[k] for k in fields} for row in rows])
    inputs = {name: ids.to(case.args.device) for name, ids in models.forward_inputs(batch).items()}
    predicts = trained_mask(batch["labels"]).to(case.args.device)
    labels = batch["labels"].to(case.args.device)[:, 1:][predicts]
    vocabulary = None
    if case.student_config is not None and case.teacher_config is not None and not own:
        rows_of = [c.get_text_config().vocab_size for c in (case.student_config, case.teacher_config)]
        vocabulary = shared_vocabulary(case.tokenizer, case.teacher_tokenizer, *rows_of)
    narrow = torch.bfloat16 if case.args.bf16 else torch.float16 if case.args.fp16 else None
    autocast = contextlib.nullcontext() if narrow is None else torch.autocast(case.args.device.type, narrow)
    for teacher in (one, other):
        _place(teacher, case)
    with autocast:
        signals = [teacher.signal(inputs, predicts, vocabulary) for teacher in (one, other)]
    total = 0.0
    with one.whole_head(signals[0]) as first, other.whole_head(signals[1]) as second:
        for start in range(0, len(labels), _CHUNK):
            part = slice(start, start + _CHUNK)
            reference: Any = first.chunk(part)
            if not isinstance(reference, TokenLogits):
                raise ConfigurationError(
                    f"The teacher {one.name!r} tells no whole distribution to compare with; name a local model."
                )
            total += _apart(reference.logps(), second.chunk(part), labels[part])
    return total / max(1, len(labels))


def _place(teacher: Teacher, case: Case) -> None:
    model = getattr(teacher, "model", None)
    if model is not None and not getattr(model, "hf_device_map", None) and not getattr(model, "is_quantized", False):
        model.to(case.args.device)


def _apart(logps: Tensor, answer: Any, labels: Tensor) -> float:
    if isinstance(answer, TokenLogits):
        return float((logps.exp() * (logps - answer.logps()).abs()).sum())
    if isinstance(answer, TokenTopK):
        live_logps = logps.gather(-1, answer.ids)
        return float((live_logps.exp() * (live_logps - answer.logps).abs()).sum())
    if isinstance(answer, TokenSampled):
        live_logps = logps.gather(-1, answer.ids)
        return float((answer.weights * (live_logps - answer.logps).abs())[answer.weights > 0].sum())
    assert isinstance(answer, TokenLogprobs)
    return float((logps.gather(-1, labels[:, None])[:, 0] - answer.values).abs().sum())
