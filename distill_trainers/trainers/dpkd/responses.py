"""The rejected responses of a method that learns from pairs: the student's own, sampled anew, replayed, or kept."""

from __future__ import annotations

from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from ... import models
from ...data import join_pairs
from ...randomness import Purpose, Role, Stream
from ...rollouts import ReplayBuffer, complete_prompts
from ...rollouts.replay import parts_of, sampled_rows, with_rows
from ...rollouts.store import prompt_key
from ..lifecycle.completions import completion_settings, completion_store, prompts_to_complete, student_prompt
from ..protocol import Batch, Run


class StudentResponses:
    """Pairs of an optimiser step whose rejected side the student wrote at most `refresh_steps` − 1 steps ago.

    Steps 0, R, 2R, … sample a response to every prompt of the window and keep the pairs; the steps between train on
    pairs drawn from those kept. What a step does follows from its number, the draws from (seed, step, rank), so all
    processes take the same branch and a resumed run goes on as it would have.

    Args:
        run: with an engine that samples.
        refresh_steps: R; 1 samples at every step.
    """

    def __init__(self, run: Run, refresh_steps: int, capacity: int):
        self.run = run
        self.refresh_steps = refresh_steps
        self.kept = ReplayBuffer(capacity, parts=3)

    def pairs(self, batches: list[Batch]) -> list[Batch]:
        """Turn batches `[B, T]` of prompts with chosen responses into batches `[2B, T]` of pairs."""
        step = self.run.state.global_step
        rows = sum(len(batch["prompt_ids"]) for batch in batches)
        if step % self.refresh_steps and len(self.kept) >= rows:
            return self._replayed(batches, rows, step)
        sampled = self.run.sample_completions(batches)
        if self.refresh_steps > 1:
            both = zip(sampled_rows(batches), sampled_rows(sampled), strict=True)
            kept = [(*row, other[-1]) for row, other in both]  # prompt, chosen and rejected
            self.kept.push(gather_object(kept), parts=1 + parts_of(batches))
        return [self._join(*sides) for sides in zip(batches, sampled, strict=True)]

    def _replayed(self, batches: list[Batch], count: int, step: int) -> list[Batch]:
        run = self.run
        rows = self.kept.sample(count, seed=run.args.seed, step=step, rank=run.accelerator.process_index)
        pad, multiple = run.sampling.pad_token_id, run.args.pad_to_multiple_of
        sides = ([(*row[:-2], row[side]) for row in rows] for side in (-2, -1))
        chosen, rejected = (with_rows(batches, side, pad, multiple) for side in sides)
        return [self._join(*both) for both in zip(chosen, rejected, strict=True)]

    def _join(self, chosen: Batch, rejected: Batch) -> Batch:
        return join_pairs(chosen, rejected, self.run.sampling.pad_token_id)


class FirstResponses(TrainerCallback):
    """Has the student answer the evaluation prompts before its first step, or they would tell of another student."""

    def __init__(self, run: Run):
        self.run = run

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        evaluated = self.run.eval_dataset
        for name in evaluated if isinstance(evaluated, dict) else [None] if evaluated is not None else []:
            self.run.get_eval_dataloader(name)


def with_student_responses(run: Run, dataset: Any, written_by: str) -> Any:
    """Add a rejected response of the student to each prompt of `dataset`, sampled once and kept on disk.

    Evaluation compares steps on the same pairs, so its rejected responses never change during a run.

    Args:
        written_by: names the student that the responses are of.
    """
    prompts = prompts_to_complete(dataset, replace=True, of=student_prompt)
    args, accelerator = run.args, run.accelerator
    stream = Stream(args.seed, Role.STUDENT, Purpose.REJECTED)
    settings = completion_settings(args, run.sampling, run.processing_class, stream)
    store = completion_store(args, settings, accelerator.process_index, student=written_by)
    generating = models.generating(run.model_wrapped, accelerator)
    written = complete_prompts(prompts, generating, accelerator, settings, store, title="Student responses")

    def add(row: dict[str, Any]) -> dict[str, Any]:
        response = written[prompt_key(student_prompt(row))]
        return {"rejected_ids": response, "rejected_labels": response}

    return dataset.map(add, desc="Student responses", load_from_cache_file=False)
