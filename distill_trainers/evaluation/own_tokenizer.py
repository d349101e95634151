"""A teacher with a tokenizer of its own beside students that have another one: the same rows, read by each in its own.

Both read the same texts, so what is counted in bytes can be compared: bits per byte, and the likeliest next byte at the
boundaries that both tokenisations share (`data/alignment.py`). What is counted in tokens cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data.alignment import align
from ..data.other_tokenizer import OtherTokenizer
from ..exceptions import ConfigurationError
from .collect import Collected, Workshop
from .examples import ExampleSet, read_examples
from .intervals import Sums
from .settings import EvaluationSettings
from .subjects import Subject, reference_tokenizer

# Counted in tokens: a teacher's says nothing about a student's, so no gap is closed in it.
IN_TOKENS = frozenset({"perplexity", "ece", "distinct_4", "completion_tokens", "tokens_per_answer"})
_NEEDS_SHARED = "exposure_bias"


def choose_without_shared(settings: EvaluationSettings, metrics: list[str], notes: list[str]) -> None:
    """Take out of `metrics` what only models of one tokenizer have, with a note.

    Raises:
        ConfigurationError: it was asked for by name.
    """
    if settings.metrics is not None and _NEEDS_SHARED in settings.metrics:
        raise ConfigurationError(
            f"Got the metric {_NEEDS_SHARED} with `teacher_tokenizer: own`; expected metrics that need no KL between "
            "tokens, which two tokenizers do not have. Leave it out."
        )
    if _NEEDS_SHARED in metrics:
        metrics.remove(_NEEDS_SHARED)
        notes.append(f"{_NEEDS_SHARED} was left out: student and teacher have different tokens.")


@dataclass
class OwnReading:
    """How the teacher reads the examples.

    Args:
        workshop, examples: in the teacher's tokens.
        other: both tokenizers.
    """

    workshop: Workshop
    examples: ExampleSet
    other: OtherTokenizer

    @classmethod
    def of(cls, subject: Subject | None, rows: Any, ours: ExampleSet, workshop: Workshop, data_name: str) -> OwnReading:
        """Read the rows as the teacher does.

        Args:
            subject: the teacher.
            ours: the same rows as the students read them.
            workshop: of the students.

        Raises:
            ConfigurationError: there is no teacher, a tokenizer loses text, or only one side had to cut a row.
        """
        if subject is None:
            raise ConfigurationError("Got `teacher_tokenizer: own` without a teacher; expected one. Leave it out.")
        tokenizer, _ = reference_tokenizer([subject])
        other = OtherTokenizer.of(workshop.tokenizer, tokenizer)
        settings = workshop.settings
        examples = ExampleSet(read_examples(rows, tokenizer, settings, name=data_name))
        if examples.subsets != ours.subsets:
            raise ConfigurationError(
                f"The teacher's tokenizer reads {len(examples.examples)} rows of {data_name!r} as other kinds of "
                f"examples than the student's: max_length={settings.max_length} cuts some for one of them alone. Raise "
                "max_length."
            )
        own = replace(workshop, tokenizer=tokenizer, vocab_size=None)
        return cls(own, examples, other)

    def with_texts_of(self, written: Sequence[list[int]], ours: ExampleSet, ends: Sequence[int]) -> ExampleSet:
        """Put the teacher's completions in place of the references that the data lacks; return the students' examples.

        Args:
            written: the teacher's completions of all prompts, in its own tokens.
            ends: ids of the teacher that end them.
        """
        self.examples = self.examples.with_texts_of(written)
        asked = [example.prompt_of(teacher=True) for example in self.examples.prompted]
        answered, other = zip(written, ours.prompted, asked, strict=True), self.other.ended_by(teacher=ends)
        return ours.with_texts_of([other.answer(ids, own.prompt_ids, theirs) for ids, own, theirs in answered])

    def agreement(self, student: Collected, teacher: Collected, ours: ExampleSet) -> Sums:
        """Count by example at how many shared boundaries both find the same next byte likeliest."""
        agreed, places = [], []
        texts = zip(ours.with_text, self.examples.with_text, strict=True)
        spelled = self.other.student.tokens, self.other.teacher.tokens
        told = zip(student.reference, teacher.reference, strict=True)
        for (our, their), (one, other) in zip(texts, told, strict=True):
            chunks = align(our.completion_ids, their.completion_ids, *spelled)
            # Without a prompt nothing predicts the first token.
            skipped = [int(not example.prompt_ids) for example in (our, their)]
            starts = zip(
                chunks.student_starts[chunks.same_start].tolist(),
                chunks.teacher_starts[chunks.same_start].tolist(),
                strict=True,
            )
            pairs = [
                (i - skipped[0], j - skipped[1])
                for i, j in starts
                if skipped[0] <= i < len(our.completion_ids) and skipped[1] <= j < len(their.completion_ids)
            ]
            agreed.append(sum(one["next_byte"][i] == other["next_byte"][j] for i, j in pairs))
            places.append(len(pairs))
        return Sums.of_means(agreed, places)
