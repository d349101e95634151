"""What teachers have in common that are made of others: whatever a run tells them, they tell their members."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..exceptions import ConfigurationError, TeacherServerError, VocabularyError
from ..requirements import Requirements
from ..run_files import shown as without_place
from ..settings import shown
from ..signals import TeacherSignal
from .base import Pair, Teacher

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .options import TeacherOptions


class Several(Teacher):
    """Teachers by name, each of any kind; one may be a member of several.

    Args:
        members: by name; text without spaces or slashes, since metrics are called after it.
        told_late: weights were loaded for it, so that it hears of its rows after that.

    Raises:
        ConfigurationError: there are no members, one is no `Teacher`, or a name cannot be used.
    """

    def __init__(self, members: Mapping[str, Teacher], *, told_late: bool = False):
        if not members:
            raise ConfigurationError(f"Got a {type(self).__name__} without teachers; expected at least one, by name.")
        for name, member in members.items():
            check_name(name)
            if not isinstance(member, Teacher) or member.is_nobody:
                raise ConfigurationError(
                    f"Got {type(member).__name__} as the teacher {name!r}; expected a Teacher, such as LocalTeacher. "
                    "Give a trainer the mapping itself (`teacher_model={…}`), which takes models and names too."
                )
        self.members = dict(members)
        self.name = ", ".join(f"{name}: {without_place(member.name)}" for name, member in self.members.items())
        self.parts = {name: member.name for name, member in self.leaves.items()}
        self.provides = frozenset(self._provided())  # type: ignore[misc]
        self.may_be_away = any(member.may_be_away for member in self.members.values())  # type: ignore[misc]
        self.can_read_rollouts = all(m.can_read_rollouts for m in self.members.values())  # type: ignore[misc]
        self.moves = any(member.moves for member in self.members.values())  # type: ignore[misc]
        self._told_late = told_late
        self._announcing = False

    def _provided(self) -> set[str]:
        """Name what all of them tell; completions are written by one model alone."""
        provided = [set(member.provides) for member in self.members.values()]
        for kinds in provided:
            kinds |= {"token_logprobs"} if "distribution" in kinds else set()
        return set.intersection(*provided) - {"completions"}

    @classmethod
    def refuse(cls, pair: Pair, options: TeacherOptions, wants: Requirements) -> None:
        if isinstance(pair.teacher, cls):
            super().refuse(pair, options, wants)
            for member in pair.teacher.members.values():
                if isinstance(member, Several):
                    type(member).refuse(replace(pair, teacher=member), options, wants)
            if wants.replaces_completions and not pair.teacher.can_generate:
                refuse_writing(pair.teacher.name, wants)
        if "completions" in wants.needs:
            refuse_writing("several teachers", wants)

    @classmethod
    def opened(cls, pair: Pair, options: TeacherOptions) -> Teacher | None:
        """Return one that was given, once its members have been held against the student."""
        if not isinstance(pair.teacher, cls):
            return None
        for member in pair.teacher.leaves.values():
            type(member).opened(Pair(pair.student, member, pair.adapted, pair.tokenizer), options)
        return pair.teacher

    @property
    def leaves(self) -> dict[str, Teacher]:
        """All teachers that are made of no others, each once; two of one name have those of their owners before it.

        Raises:
            ConfigurationError: two of them would still have one name.
        """
        found: dict[int, tuple[str, str, Teacher]] = {}
        for name, member in self.members.items():
            inside = {leaf: f"{name}.{leaf}" for leaf in member.leaves} if isinstance(member, Several) else {name: name}
            for leaf, longer in inside.items():
                teacher = member.leaves[leaf] if isinstance(member, Several) else member
                found.setdefault(id(teacher), (leaf, longer, teacher))
        count = Counter(leaf for leaf, _, _ in found.values())
        leaves = {leaf if count[leaf] == 1 else longer: teacher for leaf, longer, teacher in found.values()}
        if len(leaves) < len(found):
            raise ConfigurationError(
                f"Got {len(found)} teachers under the {len(leaves)} names {', '.join(leaves)}; expected a name for "
                "each, since a checkpoint keeps their states by it. Rename one."
            )
        return leaves

    # ---- What it says -----------------------------------------------------------------------------------------------

    def ask(
        self, member: Teacher, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None
    ) -> TeacherSignal | None:
        """Return what a member says, without entries that only others read; None while it has nothing to send ahead."""
        if self._announcing and not member.may_be_away:
            return None
        others = self.reads - member.reads
        inputs = {name: value for name, value in inputs.items() if name not in others}
        return member.signal(inputs, predicts, vocab_size)

    @contextlib.contextmanager
    def whole_heads(self, parts: Iterable[TeacherSignal | None]) -> Iterator[tuple[TeacherSignal | None, ...]]:
        """Keep, within it, the weights of all members' signals whole; in one order on all processes."""
        with contextlib.ExitStack() as stack:
            pairs = zip(self.members.values(), parts, strict=True)
            yield tuple(None if part is None else stack.enter_context(m.whole_head(part)) for m, part in pairs)

    def prepare(self, accelerator: Accelerator) -> None:
        for member in self.leaves.values():
            member.prepare(accelerator)

    def fingerprint(self) -> str:
        told = sorted((name, member.fingerprint()) for name, member in self.members.items())
        return hashlib.sha256(repr((type(self).__name__, told)).encode()).hexdigest()[:16]

    def shared_ids(self, tokenizer: Any, student_rows: int, teacher_tokenizer: Any = None) -> int | None:
        """Count the ids in the softmax of all models: the fewest that any two share.

        Args:
            teacher_tokenizer: that of all members, or by their name.
        """
        counts: dict[str, int | None] = {}
        for name, member in self.leaves.items():
            theirs = teacher_tokenizer.get(name) if isinstance(teacher_tokenizer, Mapping) else teacher_tokenizer
            try:
                counts[name] = member.shared_ids(tokenizer, student_rows, theirs)
            except VocabularyError as error:
                raise VocabularyError(f"The teacher {name!r}: {error}") from error
        least = min((count for count in counts.values() if count is not None), default=None)
        for name, member in self.leaves.items():
            if member.tells != "hidden" and counts[name] != least:
                raise VocabularyError(
                    f"The teacher {name!r} tells {member.tells} of {counts[name]} ids, but all models share {least}. "
                    "Expected as many: use `hidden` answers of it, or teachers whose heads have equally many rows."
                )
        return least

    def live(self) -> Any:
        raise ConfigurationError(
            f"Got prompts without completions, and a {type(self).__name__} ({self.name}) writes none; expected a "
            "dataset with completions, of evaluation rows too. Let one model write them first."
        )

    # ---- What a run tells it ----------------------------------------------------------------------------------------

    @property
    def is_collective(self) -> bool:
        return any(member.is_collective for member in self.members.values())

    @property
    def can_load(self) -> bool:
        return self._told_late or any(member.can_load for member in self.members.values())

    @property
    def failure(self) -> TeacherServerError | None:
        return next((member.failure for member in self.members.values() if member.failure is not None), None)

    @failure.setter
    def failure(self, value: TeacherServerError | None) -> None:
        for member in self.members.values():
            member.failure = value

    def expects(self, rows: Iterable[Mapping[str, Any]] | None, name: str) -> None:
        for member in self.members.values():
            member.expects(rows, name)

    def expects_rollouts(self) -> None:
        for member in self.members.values():
            member.expects_rollouts()

    @contextlib.contextmanager
    def asking_ahead(self) -> Iterator[bool]:
        with contextlib.ExitStack() as stack:
            useful = [stack.enter_context(member.asking_ahead()) for member in self.members.values()]
            self._announcing = True
            try:
                yield any(useful)
            finally:
                self._announcing = False

    @contextlib.contextmanager
    def holding_failures(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for member in self.members.values():
                stack.enter_context(member.holding_failures())
            yield

    def stop_waiting(self) -> None:
        for member in self.members.values():
            member.stop_waiting()

    def begin(self) -> None:
        for member in self.leaves.values():
            member.begin()

    def after_step(self) -> None:
        for member in self.leaves.values():
            member.after_step()

    def state(self) -> dict[str, Tensor]:
        """Return what of the members must survive, each entry after its member's name and a slash."""
        states = {name: member.state() for name, member in self.leaves.items()}
        return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name, member in self.leaves.items():
            own = f"{name}/"
            member.load_state({key.removeprefix(own): t for key, t in tensors.items() if key.startswith(own)})

    def flush(self) -> None:
        for member in self.leaves.values():
            member.flush()

    def release(self) -> None:
        for member in self.leaves.values():
            member.release()

    def close(self) -> None:
        for member in self.leaves.values():
            member.close()


def check_name(name: Any) -> None:
    """Refuse a name that a metric cannot be called after."""
    if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)):
        got = repr(shown(name)) if isinstance(name, str) else f"{shown(name)} ({type(name).__name__})"
        raise ConfigurationError(
            f"Got a teacher by the name {got}; expected text of letters, digits, `_`, `-` and `.`: metrics such as "
            "`eval_kl/NAME` are called after it. Rename it (in quotes, if it is a number or a date), in the column of "
            "the data too."
        )


def refuse_writing(name: str, wants: Requirements) -> None:
    """Refuse a method that wants one model to write completions.

    Raises:
        ConfigurationError: naming the settings that it may be.
    """
    raise ConfigurationError(
        f"Got {name} with {wants.trainer} under settings in which a teacher writes (`seq_kd`, `chosen: teacher`, "
        "`teacher_mix_alpha` above 0); expected settings in which it only reads: no one model is there to write. Leave "
        "that setting out (`teacher_mix_alpha: 0`), or let one model write the rows first."
    )
