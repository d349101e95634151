"""No teacher: methods that learn from given text may go without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import Teacher


class NoTeacher(Teacher):
    """Stands where a teacher would, says nothing, and serves methods whose `needs` are empty."""

    name = "none"

    def prepare(self, accelerator: Any) -> None:
        pass

    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> Any:
        return None

    def fingerprint(self) -> str:
        return "none"
