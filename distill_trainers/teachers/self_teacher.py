"""The student as its own teacher: as it was, as an average of all that it has been, or as it is.

A teacher that is the student says nothing new until it sees more than the student does, or has moved on from it: see
SDFT (arXiv 2601.19897), OPSD (2601.18734) and SDPO (2601.20802). None of these kinds needs a second model; only a
student without an adapter is copied for `initial`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .. import models
from ..exceptions import CheckpointError, ConfigurationError
from ..requirements import Requirements
from ..signals import HiddenStates, TeacherSignal
from .base import Pair, named
from .local import LocalTeacher, base_fingerprint, is_initial_without_adapter, weights_fingerprint
from .placement import is_collective
from .self_refusals import (
    refuse_body,
    refuse_mixture,
    refuse_moving_base,
    refuse_renewed,
    refuse_uncopied,
    refuse_writing,
    said,
    warn_of_thinking,
    writes_nothing,
)

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from .options import TeacherOptions

StudentFn = Callable[[], nn.Module]


class StudentItself(LocalTeacher):
    """A teacher whose body is the student's, in eval mode and without gradient.

    Args:
        student: gives the student in its wrappers as they are now.
        name: for logs and the model card.
        fingerprint: of what answers, where that stays the same.
    """

    is_the_student = True
    has_files: ClassVar[bool] = False
    shows_layers: ClassVar[bool] = False
    _is_looked_at = False  # as the student: under ZeRO-3 its first forward must not be one of other weights

    def __init__(self, student: StudentFn, name: str, fingerprint: str = ""):
        self.name = name
        self.placement = "auto"
        self._student = student
        self._fingerprint = fingerprint
        self._fused: bool | None = None
        self._shared_by: Any = None

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # read only
        return self._student()

    def prepare(self, accelerator: Any) -> None:
        """Do nothing: the student is prepared by its trainer."""
        self._shared_by = accelerator

    @property
    def is_collective(self) -> bool:
        launch = self._shared_by
        if launch is None or launch.num_processes == 1:
            return False
        return is_collective("auto", models.zero_stage(launch), models.fsdp_version(launch))

    @torch.no_grad()
    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> TeacherSignal:
        with self.answering():
            return super().signal(inputs, predicts, vocab_size)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        # What teaches is the student unrounded: with `quantize_student`, its original where it was not trained yet.
        with models.evaluating(self.model), models.without_rounding(self.model), self.in_its_state():
            yield

    @contextlib.contextmanager
    def in_its_state(self) -> Iterator[None]:
        """Let the student, within it, be what teaches."""
        yield


class AdapterOff(StudentItself):
    """A PEFT student with its adapter switched off: the base model, or with another adapter on it.

    Args:
        student: gives the student in its wrappers as they are now.
        adapter: of the student's adapters, the one to answer with; None for the base alone.

    Raises:
        ConfigurationError: the student trains weights of the base too.
    """

    place = "the student without its adapter"

    @classmethod
    def refuse(cls, pair: Pair, options: TeacherOptions, wants: Requirements) -> None:
        asked = said(options)
        if pair.teacher is not None:
            raise ConfigurationError(
                f"Got {asked} and the teacher {named(pair.teacher)}; expected no teacher: it is the student without "
                "its adapter. Leave the teacher out, or take another placement."
            )
        if not pair.adapted:
            raise ConfigurationError(
                f"Got {asked} with a student that has no adapter; expected `peft_config` (`use_peft: true` in a "
                "recipe) or a PeftModel: the teacher is what the adapter is put on."
            )
        refuse_mixture(asked, wants)
        if options.teacher_model_init_kwargs:
            raise ConfigurationError(
                f"Got `teacher_model_init_kwargs` with {asked}, where nothing is loaded for the teacher. Leave them "
                "out; `model_init_kwargs` are those of the shared base."
            )

    @classmethod
    def loaded(cls, pair: Pair, options: TeacherOptions, student: StudentFn | None = None) -> AdapterOff:
        assert student is not None
        adapter = options.teacher_adapter and models.load_adapter(student(), options.teacher_adapter)
        return cls(student, adapter)

    def __init__(self, student: StudentFn, adapter: str | None = None):
        refuse_moving_base(student())
        name = f"the student with the adapter {adapter}" if adapter else "the student without its adapter"
        super().__init__(student, name, base_fingerprint(student(), adapter))
        self.adapter = adapter
        self.placement = "adapter_off"

    @contextlib.contextmanager
    def in_its_state(self) -> Iterator[None]:
        with models.answering_with(self.model, self.adapter):
            yield


class KeptStudent(StudentItself):
    """The student with the trained weights that it began with; all others are shared with the student.

    What is kept is in float32 (float64 of a student in float64), each process its own share, outside of the model: no
    checkpoint of the student has it, and no optimiser sees it.
    """

    def __init__(self, student: StudentFn, name: str = "the student before training"):
        super().__init__(student, name, weights_fingerprint(student()))
        self._kept: dict[str, Tensor] = {}
        self._kept_of: nn.Module | None = None
        self._saved: Mapping[str, Tensor] | None = None
        self._head: Any = None

    def begin(self) -> None:
        """Keep the weights to train, unless a checkpoint or an earlier `train` of this student says what they were."""
        saved, self._saved, self._head = self._saved, None, None
        student = models.unwrapped(self.model)
        if saved is None and self._kept_of is student:
            saved = self._kept
        self._kept_of = student
        shares = models.trained_shares(self.model)
        self._kept = {name: _as_kept(share) for name, share in shares.items()}
        if saved is None:
            return
        unlike = [n for n, kept in self._kept.items() if n not in saved or saved[n].shape != kept.shape]
        if unlike or len(saved) != len(shares):
            self._kept_of = None
            raise CheckpointError(
                f"{len(saved)} tensors are kept of {self.name}, in the checkpoint or since an earlier `train`, and the "
                f"student trains {len(shares)} ({', '.join(unlike[:3])}: another shape, or missing); expected the same "
                "ones. Resume with the same model, adapter, launch and number of processes."
            )
        self._kept = {name: saved[name].to(kept) for name, kept in self._kept.items()}

    def state(self) -> dict[str, Tensor]:
        return dict(self._kept)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self._saved = tensors or None
        if not tensors:
            self._kept_of = None
            logger.warning(
                "The checkpoint holds nothing of %s, so what it was is not known: it starts anew from the weights of "
                "the checkpoint.",
                self.name,
            )

    @contextlib.contextmanager
    def in_its_state(self) -> Iterator[None]:
        with models.having(self.model, self._kept):
            yield

    def signal_of(self, hidden: Tensor, vocab_size: int | None) -> HiddenStates:
        # The loss reads the head later, when the parameter has the student's values again.
        if self._head is None:
            head = models.read_head(models.causal_lm_of(self.model))
            self._head = dataclasses.replace(
                head, weight=_settled(head.weight), bias=None if head.bias is None else _settled(head.bias)
            )
        return HiddenStates(hidden, self._head.cut_to(vocab_size))


class AveragedStudent(KeptStudent):
    """φ ← decay · φ + (1 − decay) · θ after each optimiser step, from φ = θ₀: the mean teacher (arXiv 1703.01780).

    Adapters are averaged factor by factor from their first values, not from zeros, with which A and B would both be
    1 − decayⁿ too small after n steps, and their product quadratically so.

    Args:
        decay: weight of the average before, between 0 and 1.
    """

    moves = True
    can_generate: ClassVar[bool] = False
    keeps_logps: ClassVar[bool] = False
    provides = frozenset({"distribution"})
    place = "an average of the student"

    @classmethod
    def refuse(cls, pair: Pair, options: TeacherOptions, wants: Requirements) -> None:
        refuse_body(pair, options)
        refuse_writing(options, wants)
        super(LocalTeacher, cls).refuse(pair, options, wants)

    @classmethod
    def loaded(cls, pair: Pair, options: TeacherOptions, student: StudentFn | None = None) -> AveragedStudent:
        assert student is not None and options.self_teacher_decay is not None
        warn_of_thinking(pair, options)
        return cls(student, options.self_teacher_decay)

    def __init__(self, student: StudentFn, decay: float):
        super().__init__(student, f"an average of the student (decay {decay:g})")
        self.decay = decay

    @torch.no_grad()
    def after_step(self) -> None:
        self._head = None
        for name, share in models.trained_shares(self.model).items():
            average = self._kept[name]
            average.lerp_(share.to(average.dtype), 1 - self.decay)

    def live(self) -> Any:
        raise ConfigurationError(writes_nothing("`self_teacher: ema`"))

    def fingerprint(self) -> str:
        with self.in_its_state():
            return weights_fingerprint(self.model)


class LiveStudent(StudentItself):
    """The student as it is, its answer held fixed (φ = θ, no gradient): what it learns is what it sees less of."""

    moves = True
    can_generate: ClassVar[bool] = False
    keeps_logps: ClassVar[bool] = False
    provides = frozenset({"distribution"})
    place = "the student itself"

    @classmethod
    def refuse(cls, pair: Pair, options: TeacherOptions, wants: Requirements) -> None:
        refuse_body(pair, options)
        refuse_writing(options, wants)
        super(LocalTeacher, cls).refuse(pair, options, wants)

    @classmethod
    def loaded(cls, pair: Pair, options: TeacherOptions, student: StudentFn | None = None) -> LiveStudent:
        assert student is not None
        warn_of_thinking(pair, options)
        return cls(student)

    def __init__(self, student: StudentFn):
        super().__init__(student, "the student itself")

    def live(self) -> Any:
        raise ConfigurationError(writes_nothing("`self_teacher: live`"))

    def fingerprint(self) -> str:
        return weights_fingerprint(self.model)


class InitialStudent(LocalTeacher):
    """The student before training: its adapter switched off where that is it, else its first weights, kept.

    With an adapter it is an `AdapterOff`, or a `KeptStudent` where that was trained before. Without one it is a frozen
    copy, which may be placed and loaded as any other teacher (`teacher_placement`, `teacher_model_init_kwargs`).
    """

    is_the_student = True
    keeps_logps: ClassVar[bool] = False  # those of the student are kept by `reference: student`
    has_files: ClassVar[bool] = False
    shows_layers: ClassVar[bool] = False
    place = "the student before training"

    @classmethod
    def refuse(cls, pair: Pair, options: TeacherOptions, wants: Requirements) -> None:
        if pair.adapted:
            refuse_body(pair, options, allowed=("auto", "adapter_off"))
            refuse_mixture(said(options), wants)
        else:
            refuse_uncopied(pair, options)
        super(LocalTeacher, cls).refuse(pair, options, wants)

    @classmethod
    def loaded(cls, pair: Pair, options: TeacherOptions, student: StudentFn | None = None) -> LocalTeacher:
        assert student is not None
        warn_of_thinking(pair, options)
        whole = student()
        if models.is_peft(whole):
            return AdapterOff(student) if is_initial_without_adapter(whole) else KeptStudent(student)
        refuse_renewed(pair)
        theirs: Any = options.teacher_model_init_kwargs or {}
        given: Any = {**(options.model_init_kwargs or {}), **theirs}
        placement, name = options.teacher_placement, cls.place
        if isinstance(pair.student, str):
            settings = {"dtype": "float32", "trust_remote_code": options.trust_remote_code, **given}
            with models.loading_placed(pair.student, placement, options.device, settings) as placed:
                return cls(models.load_causal_lm(pair.student, role="teacher", **placed), name, placement)
        if any(hasattr(parameter, "ds_id") for parameter in whole.parameters()):
            raise ConfigurationError(
                "Got `self_teacher: initial` with a student whose weights ZeRO-3 has partitioned already, so they "
                "cannot be copied. Pass the student by name, or train an adapter (`peft_config`)."
            )
        frozen = models.unquantized(copy.deepcopy(whole))
        if given.get("dtype", "auto") != "auto":
            frozen.to(models.dtype_of(given["dtype"], None))
        return cls(frozen, name, placement)


# ---- Details --------------------------------------------------------------------------------------------------------


def _as_kept(share: Tensor) -> Tensor:
    return share.detach().to(torch.promote_types(share.dtype, torch.float32), copy=True)


def _settled(weight: Tensor) -> Tensor:
    """The values that a trained weight has now; any other as it is."""
    if not weight.requires_grad:
        return weight
    with models.whole_parameters(weight):
        return models.whole(weight.detach()).clone()
