"""The student's own base as a teacher: itself without its adapter, or with another one, and no second copy of it."""

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
    """A PEFT student with its adapter switched off: the base model, or with another adapter on it.

    Args:
        student: gives the student in its wrappers as they are now.
        adapter: of the student's adapters, the one to answer with; None for the base alone.
    """

    def __init__(self, student: Callable[[], nn.Module], adapter: str | None = None):
        self.name = f"the student with the adapter {adapter}" if adapter else "the student without its adapter"
        self.adapter = adapter
        self.placement = "adapter_off"
        self._student = student
        self._fingerprint = base_fingerprint(student(), adapter)
        self._fused: bool | None = None

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # read only
        return self._student()

    def prepare(self, accelerator: Any) -> None:
        """The student is prepared by its trainer."""

    @torch.no_grad()
    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> TeacherSignal:
        with self.answering():
            return super().signal(inputs, predicts, vocab_size)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        wrapped = self.model
        training = wrapped.training
        try:
            with models.answering_with(wrapped, self.adapter):
                yield
        finally:
            wrapped.train(training)


def base_fingerprint(student: nn.Module, adapter: str | None = None, **how: Any) -> str:
    """`weights_fingerprint` without adapters, whose weights start at random, but for `adapter`."""
    if not models.is_peft(student):
        return weights_fingerprint(student, **how)
    adapters: Any = models.unwrapped(student).peft_config
    return weights_fingerprint(student, leave_out=frozenset(adapters) - {adapter}, **how)


def reference_fingerprint(student: nn.Module) -> str:
    """What tells the weights that a student, not yet trained, is the reference by: an adapter's if they do anything."""
    known_by = base_fingerprint if adapter_is_neutral(student) else weights_fingerprint
    return known_by(student, with_config=False)


def adapter_is_neutral(student: nn.Module) -> bool:
    """Whether a LoRA student's adapter still changes nothing, as a newly added one does (its B is 0)."""
    second = [p for name, p in student.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    with models.whole_parameters(*second):
        return bool(second) and not any(bool(p.detach().any()) for p in second)
