"""What callbacks, measures and the methods' helpers may use of a trainer: this, and nothing else of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from ..requirements import Requirements
from ..rollouts import SamplingSettings
from ..signals import TeacherSignal
from ..teachers import Teacher
from .config import DistillConfig
from .lifecycle.metrics import RunningMetrics
from .step import TwoModels

# Config and trainer by the `method` of recipes; the package fills it, so that nobody below imports a method.
METHODS: dict[str, tuple[type[DistillConfig], type[Any]]] = {}

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase, TrainerState

Batch = dict[str, Any]


class Run(Protocol):
    """A run as those see it who are not its trainer.

    Attributes:
        model: the student; `model_wrapped` is what runs it under DDP, ZeRO or FSDP.
        vocab_size: ids from here on are padding of either model; None: none are.
        window_loss: summed over the micro-steps since the last optimiser step.
        run_checkpoints: folders that this run has saved, or went on from.
    """

    method_name: ClassVar[str]
    paper: ClassVar[dict[str, str]]
    model: nn.Module
    model_wrapped: Any
    teacher: Teacher
    requirements: Requirements
    two_models: TwoModels
    vocab_size: int | None
    sampling: SamplingSettings
    processing_class: PreTrainedTokenizerBase
    accelerator: Accelerator
    state: TrainerState
    metrics: RunningMetrics
    callback_handler: Any
    control: Any
    is_in_train: bool
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    window_loss: Tensor
    run_checkpoints: list[str]

    @property
    def args(self) -> DistillConfig:
        """The config; a method's helpers narrow it to their method's."""

    def teacher_signal(self, inputs: Batch, predicts: Tensor) -> TeacherSignal | None:
        """Ask the teacher about a batch's trained tokens, as the method does."""

    def sample_completions(self, batches: list[Batch], generate: Callable[..., Any] | None = None) -> list[Batch]:
        """Return batches with the student's own completions."""

    def get_train_dataloader(self) -> Any:
        """Load rows as they are trained on."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Load rows as they are scored."""

    def after_step(self, loss: float) -> None:
        """Tell the method the loss of the step that is over."""

    def save_aside(self, method_state: dict[str, Any] | None = None) -> None:
        """Write a checkpoint that takes no other's place."""
