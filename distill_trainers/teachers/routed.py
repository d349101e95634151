"""Several teachers, each of its own rows: a column of the data says which."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.routing import TEACHER_INDEX
from ..exceptions import ConfigurationError, DatasetError
from ..settings import shown
from ..signals import Routed, TeacherSignal
from .base import Teacher
from .several import Several

if TYPE_CHECKING:
    from .options import TeacherOptions


class RoutedTeacher(Several):
    """Asks, for each row of a batch, the teacher that the row names (MOPD, arXiv 2601.02780).

    Batches have an entry `teacher_index` `[B]`: the place of the row's teacher among `members`. Rows are asked together
    by teacher, and the answers lie in the order of the batch, so that a loss over them has one denominator: the tokens
    of the whole step, whoever taught them.

    Args:
        members: teachers by name.

    Raises:
        ConfigurationError: they answer in different ways, such as one by hidden states and one by a top k.
    """

    def __init__(self, members: Mapping[str, Teacher], *, told_late: bool = False):
        super().__init__(members, told_late=told_late)
        self.tells = told_by_all({name: member.tells for name, member in self.members.items()})
        self.reads = frozenset({TEACHER_INDEX}).union(*(member.reads for member in self.members.values()))
        self.names = tuple(self.members)
        self.can_generate = all(member.can_generate for member in self.members.values())  # type: ignore[misc]

    @property
    def writers(self) -> tuple[Teacher, ...]:
        return tuple(self.members.values())

    @classmethod
    def refuse_idle(cls, options: TeacherOptions) -> None:
        if options.teacher_column != "teacher":
            raise ConfigurationError(
                f"Got `teacher_column: {shown(options.teacher_column)}` with one teacher for all rows; expected "
                "several by name (`teachers: {a: …, b: …}` in a recipe, a mapping as `teacher_model` in Python). Name "
                "them, or leave it out."
            )

    @torch.no_grad()
    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> TeacherSignal:
        index = self._index(inputs, len(predicts))
        inputs = {name: value for name, value in inputs.items() if name != TEACHER_INDEX}
        owners, tokens = index.cpu(), predicts.sum(1).cpu()
        parts: list[TeacherSignal | None] = []
        for k, member in enumerate(self.members.values()):
            rows = (owners == k).nonzero()[:, 0].to(predicts.device)
            trained = predicts[rows]
            if not len(rows) and member.is_collective:
                # Each process holds a share of it: those that ask would wait forever for one that does not.
                rows, trained = rows.new_zeros(1), torch.zeros_like(predicts[:1])
            asked = {name: value[rows] for name, value in inputs.items()}
            parts.append(self.ask(member, asked, trained, vocab_size) if len(rows) else None)
        if self._announcing:
            return None  # type: ignore[return-value]  # nobody looks at it
        return Routed(tuple(parts), owners.repeat_interleave(tokens))

    def _index(self, inputs: Mapping[str, Tensor], rows: int) -> Tensor:
        index = inputs.get(TEACHER_INDEX)
        if index is None or index.shape != (rows,):
            got = "no such entry" if index is None else f"one of the shape {list(index.shape)}"
            raise DatasetError(
                f"Got a batch of {rows} rows with several teachers and {got}; expected `{TEACHER_INDEX}` `[{rows}]`, "
                "which says whose row is whose. Leave `data_collator` out, or let it pass the column on."
            )
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self.members):
            raise DatasetError(
                f"Got `{TEACHER_INDEX}` from {int(index.min())} to {int(index.max())}; expected 0 to "
                f"{len(self.members) - 1}: places among the teachers {', '.join(self.members)}."
            )
        return index

    @contextlib.contextmanager
    def whole_head(self, signal: TeacherSignal) -> Iterator[TeacherSignal]:
        assert isinstance(signal, Routed)
        with self.whole_heads(signal.parts) as parts:
            yield replace(signal, parts=parts)

    def expects(self, rows: Iterable[Mapping[str, Any]] | None, name: str) -> None:
        """Tell each member of its own rows alone; `rows` can be gone through once for each."""
        for k, member in enumerate(self.members.values()):
            member.expects(None if rows is None else _Own(rows, k), name)


def told_by_all(told: Mapping[str, str]) -> str:
    """Return what each teacher tells of a token (`Teacher.tells`), given by name.

    Raises:
        ConfigurationError: they answer in different ways.
    """
    if len(set(told.values())) > 1:
        raise ConfigurationError(
            f"Got teachers that answer in different ways ({', '.join(f'{n}: {kind}' for n, kind in told.items())}); "
            "expected one, since a loss reads them together. Give all the same `teacher_cache_kind`, "
            "`teacher_server_kind` and top k."
        )
    return next(iter(told.values()))


class _Own:
    """The rows of one teacher, each time that they are gone through."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], index: int):
        self.rows, self.index = rows, index

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (row for row in self.rows if row[TEACHER_INDEX] == self.index)
