"""What both models think of sampled tokens, by one forward of each over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses import token_logps
from ..losses.aligned import TEACHER_LOGPS
from ..signals import TokenLogits, TokenSignal
from .protocol import Batch, Run


@torch.no_grad()
def logps_of_both(run: Run, batch: Batch) -> Tensor:
    """Return log-probabilities `[N, 3]` of a batch's trained tokens: the student's, at the sampling temperature, the
    teacher's."""
    temperature = run.sampling.temperature

    def terms(student: TokenLogits, teacher: TokenSignal | None, tokens: Any) -> dict[str, Tensor]:
        labels = tokens["labels"]
        student_logps = token_logps(student, labels)
        drawn = student_logps if temperature == 1.0 else token_logps(TokenLogits(student.logits / temperature), labels)
        if TEACHER_LOGPS in tokens:  # it has ids of its own
            teacher_logps = tokens[TEACHER_LOGPS]
        else:
            teacher_logps = token_logps(teacher, labels) if isinstance(teacher, TokenLogits) else teacher.values  # type: ignore
        return {"student": student_logps, "drawn": drawn, "teacher": teacher_logps}

    model: Any = run.model_wrapped
    was_training = model.training
    model.eval()
    try:
        with run.two_models.autocast():
            _, logps = run.two_models.terms(model, batch, run.teacher_signal, terms, {})
    finally:
        model.train(was_training)
    return torch.stack([logps[name] for name in ("student", "drawn", "teacher")], dim=1)
