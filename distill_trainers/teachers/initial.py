"""The student as it was before training, as a reference: a frozen model of its own, or itself without its adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..signals import TeacherSignal
from .local import LocalTeacher, weights_fingerprint


class AdapterOff(LocalTeacher):
    """A PEFT student with its adapter switched off: the base model, without a second copy of it.

    Args:
        student: gives the student in its wrappers as they are now.
    """

    def __init__(self, student: Callable[[], nn.Module]):
        self.name = "the student without its adapter"
        self._student = student
        self._fingerprint = base_fingerprint(student())
        self._fused: bool | None = None

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # read only
        return self._student()

    def prepare(self, accelerator: Any) -> None:
        """The student is prepared by its trainer."""

    @torch.no_grad()
    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> TeacherSignal:
        with _without_adapter(self.model):
            return super().signal(inputs, predicts, vocab_size)


@contextlib.contextmanager
def _without_adapter(wrapped: nn.Module) -> Iterator[None]:
    peft: Any = models.unwrapped(wrapped)
    training = wrapped.training
    try:
        with peft.disable_adapter():
            yield
    finally:
        wrapped.train(training)


def base_fingerprint(student: nn.Module, **how: Any) -> str:
    """`weights_fingerprint` without adapters, whose weights start at random."""
    return weights_fingerprint(student, leave_out=("lora_",) if models.is_peft(student) else (), **how)


def reference_fingerprint(student: nn.Module) -> str:
    """What tells the weights that a student, not yet trained, is the reference by: an adapter's if they do anything."""
    known_by = base_fingerprint if adapter_is_neutral(student) else weights_fingerprint
    return known_by(student, with_config=False)


def adapter_is_neutral(student: nn.Module) -> bool:
    """Whether a LoRA student's adapter still changes nothing, as a newly added one does (its B is 0)."""
    second = [p for name, p in student.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    with models.whole_parameters(*second):
        return bool(second) and not any(bool(p.detach().any()) for p in second)
