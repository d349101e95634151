"""Per-token measures of given text under a model and its teacher, batch by batch, each kept as it is done.

N forced tokens of a batch. Logits of either model are never whole: `fused_linear_terms` takes them chunk by chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import models
from ..data import DistillCollator
from ..data.labels import row_of
from ..data.views import teacher_inputs, with_teacher_prompt
from ..losses.fused_linear import TermsFn, fused_linear_terms
from ..losses.reduction import trained_mask
from ..signals import HiddenStates, TokenLogits
from ..storage import RecordStore, content_key
from ..teachers import LocalTeacher
from .agreement import comparison_terms

# Prompt and completion, as ids; then what the teacher reads in place of the prompt, if that is something else.
Text = tuple[list[int], ...]
TokenValues = dict[str, list[float]]  # measures of every token of one completion
Batch = dict[str, Tensor]
RunBatch = Callable[[Batch], Mapping[str, Tensor]]


def force(
    texts: Sequence[Text],
    run: RunBatch,
    *,
    pad_token_id: int,
    device: torch.device,
    batch_size: int = 16,
    store: RecordStore | None = None,
    title: str = "Reading",
    progress: bool = True,
    rank: int = 0,
    world: int = 1,
) -> list[TokenValues]:
    """Measure every token of the completions, in the order of `texts`; those in the `store` are not computed.

    Plain text (an empty prompt) has no measure of its first token, which nothing predicts.

    Args:
        run: from a collated batch (labels −100 where nothing is forced) to values `[N]` by name.
        rank, world: of several processes, which run equally many batches; each returns its own share of the texts
            (i = rank, rank + world, …).
    """
    turns = 0 if world == 1 else math.ceil(math.ceil(len(texts) / world) / batch_size)
    anybodys, texts = list(texts[:1]), texts[rank::world]
    keys = [content_key(*text) for text in texts]
    done: dict[str, TokenValues] = {} if store is None else {k: row["values"] for k, row in store.load().items()}
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in done}
    order = sorted(missing, key=lambda key: (-sum(map(len, missing[key])), key))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches += [[]] * (turns - len(batches))  # of no use here, but others may wait for it
    collate = DistillCollator(pad_token_id)
    for batch in tqdm(batches, desc=title, disable=not progress or not batches or rank != 0):
        rows = [
            with_teacher_prompt(row_of(*text[:2]), *(text[2:] or [None]))
            for text in ([missing[key] for key in batch] or anybodys)
        ]
        inputs = {name: value.to(device) for name, value in collate(rows).items()}
        values = _by_row(run(inputs), inputs["labels"])[: len(batch)]
        done |= dict(zip(batch, values, strict=True))
        if store is not None:
            store.append({"key": key, "values": done[key]} for key in batch)
    return [done[key] for key in keys]


def _by_row(terms: Mapping[str, Tensor], labels: Tensor) -> list[TokenValues]:
    lengths = trained_mask(labels).sum(1).tolist()
    values = {name: [part.tolist() for part in term.float().cpu().split(lengths)] for name, term in terms.items()}
    # Six digits are more than float32 is sure of, and half of what JSON would write.
    return [{name: [float(f"{x:.6g}") for x in rows[i]] for name, rows in values.items()} for i in range(len(lengths))]


def pair_runner(
    student: LocalTeacher,
    teacher: LocalTeacher | None,
    vocab_size: int | None,
    chunk_bytes: int | None,
    terms: TermsFn | None = None,
    first_bytes: Tensor | None = None,
    temperature: float = 1.0,
) -> RunBatch:
    """Return what `force` runs for two models of this process; without a teacher, it measures what needs none.

    Args:
        terms: None are `comparison_terms`, which take `first_bytes` and `temperature`.
    """
    measured = terms or functools.partial(comparison_terms, first_bytes=first_bytes, temperature=temperature)

    @torch.no_grad()
    def run(batch: Batch) -> Mapping[str, Tensor]:
        predicts = trained_mask(batch["labels"])
        inputs = models.forward_inputs(batch)
        viewed, own = teacher_inputs(batch, predicts)
        tokens = {"labels": batch["labels"][:, 1:][predicts]}
        signal = student.signal(inputs, predicts, vocab_size)
        target = None if teacher is None else teacher.signal(models.forward_inputs(viewed), own, vocab_size)
        if isinstance(signal, HiddenStates):
            operands = (signal.hidden, signal.head, target, measured, tokens)
            return fused_linear_terms(*operands, {}, chunk_bytes=chunk_bytes)[1]
        everything = slice(None)
        logits = signal.chunk(everything)
        assert isinstance(logits, TokenLogits)  # a model of this process gives nothing else
        return measured(logits, None if target is None else target.chunk(everything), tokens)

    return run
