"""One teacher made of several, by arithmetic on their distributions of each token."""

from __future__ import annotations

import contextlib
import hashlib
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..exceptions import ConfigurationError
from ..joining import Composition
from ..run_files import shown as without_place
from ..settings import require
from ..signals import Composed, TeacherSignal
from .base import Pair, Teacher
from .options import MIXES
from .several import Several

if TYPE_CHECKING:
    from ..requirements import Requirements
    from .options import TeacherOptions


class ComposedTeacher(Several):
    """Answers with one distribution made of those of its members, for each token.

    It is composed chunk by chunk within the loss, and never held whole. Where z are the members' logits, it is
    softmax(sum w_i z_i), or with `arithmetic` the mean sum w_i p_i. The ways to choose the weights have names:
    `mix`, `extrapolate`, `weak_to_strong`.

    Args:
        members: teachers by name, each a whole distribution.
        weights: by the same names, adding up to 1.
        arithmetic: take the mean of probabilities, not of logits.

    Raises:
        ConfigurationError: weights that do not fit, or a member that tells of a part of its distribution.
    """

    def __init__(
        self,
        members: Mapping[str, Teacher],
        weights: Mapping[str, float],
        *,
        arithmetic: bool = False,
        told_late: bool = False,
    ):
        super().__init__(members, told_late=told_late)
        check_weights(weights, list(members), "weights", may_be_negative=not arithmetic)
        for name, member in self.members.items():
            refuse_part(name, member.tells)
        self.weights = {name: float(weights[name]) for name in members if weights[name]}
        self.members = {name: self.members[name] for name in self.weights}  # others have no say in it
        self.composition = Composition(tuple(self.weights.values()), arithmetic)
        self.reads = frozenset().union(*(member.reads for member in self.members.values()))
        said = "probabilities" if arithmetic else "logits"
        self.name = f"{said} " + " + ".join(
            f"{weight:g} × {without_place(self.members[name].name)}" for name, weight in self.weights.items()
        )

    @classmethod
    def refuse(cls, pair: Pair, options: TeacherOptions, wants: Requirements) -> None:
        super().refuse(pair, options, wants)
        given = pair.teacher
        arithmetic = given.composition.arithmetic if isinstance(given, cls) else options.teacher_mix == "arithmetic"
        if arithmetic and wants.kd_temperature != 1:
            raise ConfigurationError(
                f"Got `kd_temperature: {wants.kd_temperature:g}` with an arithmetic mean of teachers; expected 1: the "
                "loss would soften the mean, which is not the mean of the softened teachers. Leave `kd_temperature` "
                "out, or mix them by logits (`teacher_mix: geometric`), where both are the same."
            )

    @classmethod
    def refuse_idle(cls, options: TeacherOptions) -> None:
        for name in ("teacher_mix", "extrapolate", "weak_to_strong"):
            if getattr(options, name) is not None:
                raise ConfigurationError(
                    f"Got `{name}` without a teacher that it could compose; expected `teachers: {{a: …, b: …}}` in a "
                    "recipe, a mapping as `teacher_model` in Python. Name them, or leave it out."
                )

    @classmethod
    def mix(
        cls, members: Mapping[str, Teacher], weights: Mapping[str, float] | None = None, how: str = "geometric"
    ) -> ComposedTeacher:
        """Mix the members by weights, at least 0; without any, equally.

        The reverse KL to the `geometric` mix is sum w_i KL(q||p_i), and the forward KL to the `arithmetic` one
        sum w_i KL(p_i||q), each up to a constant. The latter holds at temperature 1, and a trainer refuses others.

        Raises:
            ConfigurationError: weights that do not fit, or another mean than these two.
        """
        require(how in MIXES, "how", how, f"one of {', '.join(MIXES)}")
        weights = equal_weights(list(members)) if weights is None else weights
        check_weights(weights, list(members), "weights")
        return cls(members, weights, arithmetic=how == "arithmetic")

    @classmethod
    def extrapolate(cls, teacher: Teacher, reference: Teacher, scale: float) -> ComposedTeacher:
        """Return softmax((1 - scale) z_reference + scale z_teacher) (G-OPD, arXiv 2602.12125)."""
        require(_is_number(scale), "scale", scale, "a number, such as 1.25")
        return cls({"reference": reference, "teacher": teacher}, {"reference": 1 - scale, "teacher": scale})

    @classmethod
    def weak_to_strong(cls, base: Teacher, plus: Teacher, minus: Teacher, alpha: float = 1.0) -> ComposedTeacher:
        """Return softmax(z_base + alpha (z_plus - z_minus)) (arXiv 2607.26246)."""
        require(_is_number(alpha), "alpha", alpha, "a number, such as 1.0")
        return cls({"base": base, "plus": plus, "minus": minus}, {"base": 1.0, "plus": alpha, "minus": -alpha})

    @torch.no_grad()
    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> TeacherSignal:
        parts = [self.ask(member, inputs, predicts, vocab_size) for member in self.members.values()]
        if self._announcing:
            return None  # type: ignore[return-value]  # nobody looks at it
        return Composed(tuple(parts), self.composition)  # type: ignore[arg-type]  # all have answered

    @contextlib.contextmanager
    def whole_head(self, signal: TeacherSignal) -> Iterator[TeacherSignal]:
        assert isinstance(signal, Composed)
        with self.whole_heads(signal.parts) as parts:
            yield replace(signal, parts=parts)  # type: ignore[arg-type]  # all have answered

    def fingerprint(self) -> str:
        told = sorted((member.fingerprint(), self.weights[name]) for name, member in self.members.items())
        return hashlib.sha256(repr((self.composition.arithmetic, told)).encode()).hexdigest()[:16]


def equal_weights(names: Sequence[str]) -> dict[str, float]:
    """Return the same weight for each."""
    return {name: 1 / len(names) for name in names}


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_weights(
    given: Mapping[str, Any], names: Sequence[str], setting: str, *, may_be_negative: bool = False
) -> None:
    """Refuse weights that are not one for each name, adding up to 1.

    Raises:
        ConfigurationError: what they are.
    """
    told = f"Got `{setting}: {dict(given)}`"
    if set(given) != set(names):
        raise ConfigurationError(f"{told}; expected one for each of the teachers {', '.join(names)}.")
    for value in given.values():
        if not _is_number(value):
            raise ConfigurationError(f"{told}; expected numbers, such as 0.5.")
        if value < 0 and not may_be_negative:
            raise ConfigurationError(
                f"{told}; expected numbers of at least 0. To move away from a teacher, use `extrapolate` or "
                "`weak_to_strong`."
            )
    if abs(math.fsum(given.values()) - 1) > 1e-6:
        raise ConfigurationError(f"{told}, which add up to {math.fsum(given.values()):g}; expected 1 in all.")


def refuse_part(name: str, tells: str) -> None:
    """Refuse a member that tells of a part of its distribution.

    Raises:
        ConfigurationError: which, and what it tells.
    """
    if tells != "hidden":
        raise ConfigurationError(
            f"Got the teacher {name!r}, which tells {tells} of each token, among teachers that are composed; expected "
            "whole distributions: what is left out of one cannot be composed. Use `hidden` answers of it."
        )
