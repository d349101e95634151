"""Feedback on the student's own attempts (SDPO, arXiv 2601.20802): its teacher reads what was wrong with them.

L = Σ_t D(π_φ(· | T(x, y, c), y_<t), π_θ(· | x, y_<t)) / N over attempts y ~ π_θ(· | x) that a checker finds wrong. T
puts the attempt itself, the right answer or a right attempt at the same question into the teacher's prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object

from ...answers.formats import parse_response
from ...answers.numbers import as_number, same_number
from ...answers.verify import RIGHT, UNDECIDED, WRONG, final_number, verify_answer
from ...data.collator import DistillCollator, unpadded_prompts, view_entries
from ...data.feedback import ANSWER, ATTEMPT, FEEDBACK, FeedbackTemplate, feedback_ids
from ...data.feedback import RIGHT as RIGHT_SAMPLE
from ...data.labels import IGNORED
from ...data.teacher_prompts import ASKED
from ...evaluation.accuracy import answer_parser, whole_text
from ...exceptions import ConfigurationError
from ..protocol import Batch

logger = logging.getLogger(__name__)

WHEN_RIGHT = ("drop", "keep")
Question = tuple[tuple[int, ...], str, str]  # ids of the student's prompt, what is asked, the answer


@dataclass
class _Attempt:
    """A completion of the student's, and what becomes of it."""

    known: Mapping[str, Any]
    prompt_ids: list[int]
    text: str
    length: int
    reason: str
    teacher_prompt: list[int] = field(default_factory=list)
    has_feedback: bool = False
    too_long: bool = False
    trains: bool = True

    @property
    def question(self) -> Question:
        return tuple(self.prompt_ids), self.known["question"], self.known["answer"]


@dataclass(frozen=True)
class AttemptFeedback:
    """Gives sampled batches the views of a teacher that was told what is wrong with them.

    Args:
        template: of the teacher's question.
        kind, formats: how answers are compared and found, see `judged`.
        keeps_right: train rows without feedback on their plain prompt; else their labels are ignored.
        max_length: longest row of the teacher; longer ones are not trained on, and counted.
        student, teacher: tokenizers that read attempts and write prompts.
    """

    template: FeedbackTemplate
    kind: str
    formats: Sequence[str]
    keeps_right: bool
    max_length: int | None
    student: Any
    teacher: Any
    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def added_to(self, batches: Sequence[Batch]) -> tuple[list[Batch], dict[str, int]]:
        """Return batches with views of all rows, in which rows that teach nothing have no labels, and counts of rows.

        Every process must call it at once where the template has a place for a right sample: samples of all processes
        are looked through.
        """
        attempts = [self._attempts(batch) for batch in batches]
        every = [attempt for part in attempts for attempt in part]
        right = self._right_samples(every)
        for attempt in every:
            self._told(attempt, right)
        counts = {
            "rows": len(every),
            "attempts_right": sum(a.reason == RIGHT for a in every),
            "attempts_undecided": sum(a.reason == UNDECIDED for a in every),
            "attempts_with_feedback": sum(a.has_feedback for a in every),
            "attempts_with_right_sample": sum(a.question in right and a.has_feedback for a in every),
            "attempts_too_long": sum(a.too_long for a in every),
            "trained_rows": sum(a.trains and a.length > 0 for a in every),
        }
        return [self._viewed(*pair) for pair in zip(batches, attempts, strict=True)], counts

    def _attempts(self, batch: Batch) -> list[_Attempt]:
        prompts, ends = unpadded_prompts(batch), batch["attention_mask"].sum(1).tolist()
        attempts = []
        for known, prompt, ids, end in zip(batch[FEEDBACK], prompts, batch["input_ids"].tolist(), ends, strict=True):
            text = str(self.student.decode(ids[len(prompt) : end], skip_special_tokens=True)).strip()
            reason = judged(text, known["answer"], self.kind, self.formats, known["choices"] or None)
            attempts.append(_Attempt(known, prompt, text, end - len(prompt), reason))
        return attempts

    def _right_samples(self, attempts: Sequence[_Attempt]) -> dict[Question, str]:
        """The first right attempt at each question, by rank and row."""
        if RIGHT_SAMPLE not in self.template.names:
            return {}
        right: dict[Question, str] = {}
        for question, text in gather_object([(a.question, a.text) for a in attempts if a.reason == RIGHT]):
            right.setdefault(question, text)
        return right

    def _told(self, attempt: _Attempt, right: Mapping[Question, str]) -> None:
        """Write what the teacher reads. One that ran out of time may be right, so nobody calls it wrong."""
        attempt.teacher_prompt = attempt.prompt_ids
        if attempt.reason not in (RIGHT, UNDECIDED):
            sample = right.get(attempt.question, "")
            values = {ASKED: attempt.known["question"], ANSWER: attempt.known["answer"]}
            said = self.template.filled({**values, ATTEMPT: attempt.text, RIGHT_SAMPLE: sample})
            if said is not None:
                attempt.teacher_prompt = feedback_ids(attempt.known, said, self.teacher)
                attempt.has_feedback = True
        length = len(attempt.teacher_prompt) + attempt.length
        attempt.too_long = self.max_length is not None and length > self.max_length
        if attempt.too_long:  # nobody learns from the row, so the teacher need not read all of it
            attempt.teacher_prompt, attempt.has_feedback = attempt.prompt_ids, False
        attempt.trains = (attempt.has_feedback or self.keeps_right) and not attempt.too_long

    def _viewed(self, batch: Batch, attempts: Sequence[_Attempt]) -> Batch:
        rows = [{"teacher_prompt_ids": a.teacher_prompt, "view_start": len(a.prompt_ids)} for a in attempts]
        views, labels = view_entries(rows, self.pad_token_id, self.pad_to_multiple_of), batch["labels"]
        trains = torch.tensor([a.trains for a in attempts], device=labels.device)
        views = {name: entry.to(labels.device) for name, entry in views.items()}
        return {**without_feedback(batch), **views, "labels": labels.masked_fill(~trains[:, None], IGNORED)}


def refuse_collator(collator: Any) -> None:
    """Refuse a collator whose batches do not hold what feedback is made of.

    Raises:
        ConfigurationError: which one, and what to do.
    """
    if not isinstance(collator, DistillCollator):
        raise ConfigurationError(
            f"Got the data collator {getattr(collator, 'name', type(collator).__name__)} with `feedback`, which needs "
            "texts of each row in its batches; expected none, or DistillCollator. Leave one of the two out."
        )


def without_feedback(batch: Batch) -> Batch:
    """Return a batch as models read it: its teacher reads what the student does."""
    return {name: entry for name, entry in batch.items() if name != FEEDBACK}


def judged(
    text: str, answer: str, kind: str = "auto", formats: Sequence[str] = (), choices: Sequence[str] | None = None
) -> str:
    """Tell whether a whole response is right: the `reason` of a `Verdict`.

    Both the response and the right answer may be worked out: the answer of either is what it states in one of
    `formats` (by default `#### 42`, a box or `the answer is`). A response without such a statement answers with its
    last number where the right answer is a number, with its choice in multiple choice, else with its first line.

    Args:
        formats: see `parse_response`; with some, nothing else is looked for. `first_line` is one of them.
        choices: of a multiple-choice question, in order.
    """
    stated = parse_response(answer, [name for name in formats if name != "first_line"]).answer
    reference = answer.strip() if stated is None else stated
    if formats:
        return verify_answer(answer_parser(formats)(text), reference, kind, choices).reason
    if kind == "choice" or (kind == "auto" and choices):
        found = parse_response(text, ("choice",)).answer or whole_text(text)
        return verify_answer(found, reference, kind, choices).reason
    found, number = parse_response(text).answer, as_number(reference)
    if found is None and number is not None and kind != "exact":
        last = final_number(text)
        return verify_answer(None, reference, kind).reason if last is None else _same(last, number)
    return verify_answer(found or whole_text(text), reference, kind).reason


def _same(one: Any, other: Any) -> str:
    return RIGHT if same_number(one, other) else WRONG
