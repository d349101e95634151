"""What every teacher offers, wherever it runs."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..exceptions import ConfigurationError
from ..signals import TeacherSignal

if TYPE_CHECKING:
    from accelerate import Accelerator


class Teacher(ABC):
    """A frozen model that says, for each trained token of a batch, what the student should have predicted.

    Attributes:
        name: for logs, caches and the model card.
        provides: kinds of signal it can give: `"distribution"` (the whole vocabulary), `"token_logprobs"` (of the given
            tokens, which a distribution tells too) and `"completions"` (it generates). A method states what it
            `needs`; what is missing is refused at construction.
    """

    provides: ClassVar[frozenset[str]] = frozenset()
    name: str = "teacher"

    def check(self, needs: frozenset[str], method: str) -> None:
        """Raises ConfigurationError if this teacher cannot serve `method`."""
        missing = needs - self.provides
        if "distribution" in self.provides:
            missing -= {"token_logprobs"}
        if missing:
            raise ConfigurationError(
                f"{method} needs {sorted(missing)} of its teacher, but {type(self).__name__} provides only "
                f"{sorted(self.provides)}. Use a local teacher, or settings that need less."
            )

    @abstractmethod
    def prepare(self, accelerator: Accelerator) -> None:
        """Place the teacher for the launch it finds. Called once, before the first signal."""

    @abstractmethod
    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> TeacherSignal:
        """The teacher's signal for the positions that predict a trained token.

        Args:
            inputs: `input_ids` and `attention_mask`, `[B, T]`.
            predicts: bool `[B, T-1]`; True where position t predicts a trained token t+1.
            vocab_size: ids from here on are padding; None keeps all.

        Returns:
            a signal of N = `predicts.sum()` tokens, in row-major order.
        """

    @contextlib.contextmanager
    def whole_head(self, signal: TeacherSignal) -> Iterator[TeacherSignal]:
        """Within it, the weights that `signal` refers to are whole on every process."""
        yield signal

    @contextlib.contextmanager
    def asking_ahead(self) -> Iterator[bool]:
        """Within it, `signal` only asks an answer from afar to set out; yields whether that is of any use."""
        yield False

    def stop_waiting(self) -> None:  # noqa: B027  # most teachers are never away
        """The run is asked to end: a teacher that is away is not waited for. May be called by a signal's handler."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies weights and configuration, for anything kept on disk."""


def is_remote(name: Any) -> bool:
    """Whether a teacher is named by the address of its server, or by several with commas between."""
    return isinstance(name, str) and name.strip().lower().startswith(("http://", "https://"))


class NoTeacher(Teacher):
    """Stands where a teacher would, says nothing, and serves methods whose `needs` are empty."""

    name = "none"

    def prepare(self, accelerator: Any) -> None:
        pass

    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> Any:
        return None

    def fingerprint(self) -> str:
        return "none"
