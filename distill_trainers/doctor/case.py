"""What the doctor looks at: one run before it starts. Whatever could not be read is None, and is not judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .launch import Gpus, Launch
from .memory import Workload
from .shapes import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..trainers import DistillConfig
    from .several import TeacherOnPaper


@dataclass
class Case:
    """A run on paper.

    Attributes:
        student, teacher: folders or Hub ids; the teacher's may be an address (http…), or None.
        taught_by: who teaches, in words; several teachers are named here alone.
        tokenizer, teacher_tokenizer: None where there is none to be read.
        stops: ids that end a completion by the student's generation config.
        prepared: some training rows as they are trained on, tokenised.
        cache_bytes: that a teacher cache is still going to take.
        sample: some training rows as they are in the dataset, columns named as layouts want them.
        features: of the dataset of those rows.
        first_row: the first row as text, in stretches, each with whether it is trained.
        teacher_row: likewise as the teacher reads it; empty where it reads the same.
        lengths: tokens of those rows before they are cut, and prompt_lengths likewise.
        num_rows: of the training data; None for a stream.
        steps: optimiser steps of the run, 0 if unknown.
        steps_are_estimated: whether they hang on rows whose tokens are not known yet.
        samples: whether training samples the student's own completions.
        trainable_dtype, teacher_dtype: as text, such as `float32`.
        placement: of the teacher, one of `teachers.placement.PLACEMENTS` but `auto`.
        teachers: several of them, by name; `teacher_shape` is None then.
        composed: whether each row is read by all of these.
        gpus: hardware that need not be here; None: this machine's.
    """

    args: DistillConfig
    launch: Launch
    student: str
    teacher: str | None
    taught_by: str = "no teacher"
    student_config: Any = None
    teacher_config: Any = None
    tokenizer: PreTrainedTokenizerBase | None = None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    stops: list[int] = field(default_factory=list)
    sample: Sequence[dict[str, Any]] = ()
    features: Any = None
    first_row: Sequence[tuple[str, bool]] = ()
    teacher_row: Sequence[tuple[str, bool]] = ()
    lengths: Sequence[int] = ()
    prompt_lengths: Sequence[int] = ()
    prepared: Any = None
    cache_bytes: float = 0.0
    num_rows: int | None = None
    steps: int = 0
    steps_are_estimated: bool = False
    samples: bool = False
    peft: bool = False
    student_dtype: str = "float32"
    teacher_dtype: str = "float32"
    student_shape: ModelShape | None = None
    teacher_shape: ModelShape | None = None
    work: Workload | None = None
    placement: str = "replicate"
    teachers: dict[str, TeacherOnPaper] = field(default_factory=dict)
    composed: bool = False
    gpus: Gpus | None = None
