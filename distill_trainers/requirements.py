"""What a method, under its settings and on its rows, asks of a dataset, a student and a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Requirements:
    """Known before anything is loaded: a config says it (`DistillConfig.requirements`), and `preflight` enforces it.

    Attributes:
        trainer: name of the trainer, for messages.
        needs: kinds of signal that the teacher must give (see `Teacher.provides`); with none, there may be no teacher.
        samples_completions: training batches may get completions of the student, so they must carry prompts.
        needs_completions: training rows must come with a completion.
        replaces_completions: the teacher's own completions take the place of the dataset's.
        streams_rows: training rows come as a stream: nobody knows which of them come again.
        reuses_rollouts: what the teacher says of a rollout serves several optimiser steps.
        keeps_reference: the teacher's log-probabilities are kept on disk, apart from any cache.
        accepts_sparse_teachers: the loss can be had from a few ids of each token (`TokenTopK`, `TokenSampled`).
        accepts_next_bytes: the loss can be had from `NextBytes` of a teacher with a tokenizer of its own.
        accepts_encoder_decoders: students such as T5 can be trained.
        encoder_decoder: the student is one: its encoder reads the prompt, its decoder the completion.
        divergence: that sparse signals are held against.
        kd_temperature: likewise.
        teacher_tokenizer: the teacher's, where it is not the student's: its chat template renders what it is asked.
        why_no_chat: what keeps a conversation from being rendered for the teacher, as the end of a sentence.
        other: an `OtherTokenizer` where the teacher reads its own ids of the student's text; None: it reads the same.
        teachers: names of the teachers that a row may belong to; none where there is one for all rows.
    """

    trainer: str
    needs: frozenset[str] = frozenset({"distribution"})
    samples_completions: bool = False
    needs_completions: bool = True
    replaces_completions: bool = False
    streams_rows: bool = False
    reuses_rollouts: bool = False
    keeps_reference: bool = False
    accepts_sparse_teachers: bool = False
    accepts_next_bytes: bool = False
    accepts_encoder_decoders: bool = False
    encoder_decoder: bool = False
    divergence: str = "forward_kl"
    kd_temperature: float = 1.0
    teacher_tokenizer: Any = field(default=None, compare=False, repr=False)
    why_no_chat: str = ""
    other: Any = field(default=None, compare=False, repr=False)
    teachers: tuple[str, ...] = ()
