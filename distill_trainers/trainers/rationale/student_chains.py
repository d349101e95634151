"""Chains of the student's own to be trained on: right, and shorter than the teacher's."""

from __future__ import annotations

from typing import Any, Protocol

from ...answers.formats import parse_response
from ...answers.verify import verify_answer
from ...data import unpadded_prompts
from ...data.labels import IGNORED
from ...data.rationales import with_innovations
from ...data.views import teacher_prompts, view_of
from ..protocol import Batch, Run
from .config import RationaleConfig


class RationaleRun(Run, Protocol):
    """A run with the settings of rationales."""

    @property
    def args(self) -> RationaleConfig: ...


def with_students_chains(run: RationaleRun, batches: list[Batch]) -> list[Batch]:
    """Add to batches of `dual_chain` the chains sampled from the student that stand the checks."""
    args = run.args
    samples, names = args.innovation_samples, ("prompt_ids", "prompt_mask")
    prompts = [{n: batch[n].repeat_interleave(samples, dim=0) for n in names if n in batch} for batch in batches]
    pad, multiple = run.sampling.pad_token_id, args.pad_to_multiple_of
    sampled = run.sample_completions(prompts)
    chains = [_innovations(run, *pair) for pair in zip(batches, sampled, strict=True)]
    run.metrics.add_sums(innovations=sum(map(len, chains)))
    return [with_innovations(batch, rows, pad, multiple) for batch, rows in zip(batches, chains, strict=True)]


def _innovations(run: RationaleRun, batch: Batch, sampled: Batch) -> list[tuple[Any, ...]]:
    """Ids of prompt and chain, the prompt's length, and the teacher's own prompt if there is one.

    They are those of chains that ended, are right, shorter, and new.
    """
    args = run.args
    lengths = (batch["labels"] != IGNORED).sum(1).tolist()
    prompts = unpadded_prompts(batch)
    views = teacher_prompts({name: entry[: len(prompts)] for name, entry in view_of(batch).items()}, prompts)
    chains: dict[tuple[int, ...], tuple[Any, ...]] = {}
    rows = zip(unpadded_prompts(sampled), sampled["labels"].tolist(), strict=True)
    for place, (prompt, labels) in enumerate(rows):
        row = place // args.innovation_samples
        ids = [token for token in labels if token != IGNORED]
        if not ids or ids[-1] not in run.sampling.eos_token_ids or len(ids) >= lengths[row]:
            continue
        text = str(run.processing_class.decode(ids, skip_special_tokens=True))
        parsed = parse_response(text, args.answer_formats or ())
        reference, choices = batch["references"][row]
        verdict = verify_answer(parsed.answer, reference, args.answer_kind, choices or None)
        if parsed.rationale and verdict.right:
            chains[row, *ids] = ([*prompt, *ids], len(prompt), *([] if views is None else [views[row]]))
    return list(chains.values())
