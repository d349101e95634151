"""What every teacher offers, wherever it runs. Whoever uses one asks its members, never which kind it is."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..exceptions import ConfigurationError, TeacherServerError
from ..requirements import Requirements
from ..signals import TeacherSignal

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from .cache.shards import TeacherCache
    from .options import TeacherOptions


@dataclass(frozen=True)
class Pair:
    """A student and its teacher before their weights are loaded.

    Attributes:
        student: a name or a model, as the user gave it.
        teacher: a name, a model, a `Teacher` or None, as the user gave it.
        adapted: the student is trained with a PEFT adapter.
        tokenizer: the student's; None reads the one saved beside it.
        teacher_tokenizer: likewise; None also where it is unknown.
        renewed: the student is made anew for each `train` (`model_init`).
    """

    student: Any
    teacher: Any
    adapted: bool = False
    tokenizer: Any = None
    teacher_tokenizer: Any = None
    renewed: bool = False

    def of_ids(self) -> Pair:
        """Return it for a teacher with a tokenizer of its own: what it answers has to do with no student's ids."""
        return replace(self, student=None, tokenizer=self.teacher_tokenizer)


class Teacher(ABC):
    """A frozen model that says, for each trained token of a batch, what the student should have predicted.

    A kind of teacher is a subclass, a row in `placement.PLACEMENTS` and one in `loading.KINDS`.

    Attributes:
        name: for logs, caches and the model card.
        provides: kinds of signal it can give: `"distribution"` (the whole vocabulary), `"token_logprobs"` (of the given
            tokens, which a distribution tells too) and `"completions"` (it generates). A method states what it
            `needs`; what is missing is refused at construction.
        has_files: its configuration and tokenizer can be read where its name says, before it is loaded.
        keeps_logps: its log-probabilities of given pairs may be kept on disk (`reference_logps_dir`).
        can_generate: it writes completions.
        may_generate: one of this class may, as its servers tell.
        can_read_rollouts: it says what it thinks of any text, the student's own too.
        shows_layers: it is one model, not the student, that runs here layer by layer.
        is_nobody: it stands where a teacher would, and says nothing.
        place: where it is, for a plan.
        tells: what it says of a token: `"hidden"` is its whole distribution, anything else a part of it.
        reads: entries of a batch that it needs beside what a model takes.
        parts: names of the models of several teachers, by the teachers' names; none of one alone.
        names: of the teachers that a row may belong to, in the order that `teacher_index` counts; none of one alone.
        failure: why nobody is asked any more within `holding_failures`; None as long as all is well.
        may_be_away: it can fail while a run goes on, for this process alone.
        moves: its weights change while a run goes on, so that nothing it said holds later.
        is_the_student: it is a state of the model that trains.
    """

    provides: ClassVar[frozenset[str]] = frozenset()
    can_generate: ClassVar[bool] = False
    may_generate: ClassVar[bool] = False
    can_read_rollouts: ClassVar[bool] = False
    shows_layers: ClassVar[bool] = False
    is_nobody: ClassVar[bool] = False
    has_files: ClassVar[bool] = False
    keeps_logps: ClassVar[bool] = False
    may_be_away: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    is_the_student: ClassVar[bool] = False
    place: ClassVar[str] = ""
    name: str = "teacher"
    tells: str = "hidden"
    reads: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()
    parts: Mapping[str, str] = {}
    failure: TeacherServerError | None = None

    # ---- How it comes to be -----------------------------------------------------------------------------------------

    @classmethod
    def refuse(cls, pair: Pair, options: TeacherOptions, wants: Requirements) -> None:
        """Refuse what this kind cannot serve, from settings alone.

        Raises:
            ConfigurationError: naming what it lacks, or the settings that exclude each other.
        """
        kind = pair.teacher if isinstance(pair.teacher, cls) else cls
        cls._refuse_missing(wants.needs, kind.provides, wants.trainer)
        if wants.keeps_reference and not cls.keeps_logps:
            raise ConfigurationError(
                f"Got `reference_logps_dir` with a {cls.__name__}; expected a model or its name. Leave one of them out."
            )
        if wants.reuses_rollouts and kind.moves:
            raise ConfigurationError(
                f"Got a teacher that moves with the student ({cls.__name__}) and rollouts that are reused; expected "
                "one that stays, since its rewards of a rollout serve all steps on it. Set `num_inner_epochs: 1` and "
                "`num_minibatches: 1`, or take `self_teacher: initial`."
            )

    @classmethod  # noqa: B027
    def refuse_idle(cls, options: TeacherOptions) -> None:
        """Refuse settings of this kind where the teacher is of another."""

    @classmethod
    def opened(cls, pair: Pair, options: TeacherOptions) -> Teacher | None:
        """Return this kind of teacher, if it needs no weights; None if `loaded` has to make it.

        Raises:
            ConfigurationError: it is not there, or belongs to another student.
        """
        return None

    @classmethod
    def loaded(cls, pair: Pair, options: TeacherOptions, student: Callable[[], nn.Module] | None = None) -> Teacher:
        """Return this kind of teacher, with its weights.

        Args:
            student: gives the loaded student in its wrappers as they are now.
        """
        raise ConfigurationError(f"A {cls.__name__} cannot be loaded by name; pass one as `teacher_model`.")

    def check(self, needs: frozenset[str], method: str) -> None:
        """Raise ConfigurationError if this teacher cannot serve `method`."""
        self._refuse_missing(needs, self.provides, method)

    @classmethod
    def _refuse_missing(cls, needs: frozenset[str], provides: frozenset[str], method: str) -> None:
        missing = needs - provides
        if "distribution" in provides:
            missing -= {"token_logprobs"}
        if missing:
            raise ConfigurationError(
                f"{method} needs {sorted(missing)} of its teacher, but {cls.__name__} provides only "
                f"{sorted(provides)}. Use a local teacher, or settings that need less."
            )

    @abstractmethod
    def prepare(self, accelerator: Accelerator) -> None:
        """Place the teacher for the launch it finds. Called once, before the first signal."""

    # ---- What it says -----------------------------------------------------------------------------------------------

    @abstractmethod
    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> TeacherSignal:
        """Return the teacher's signal for the positions that predict a trained token.

        Args:
            inputs: `input_ids` and `attention_mask`, `[B, T]`.
            predicts: bool `[B, T-1]`; True where position t predicts a trained token t+1.
            vocab_size: ids from here on are padding; None keeps all.

        Returns:
            a signal of N = `predicts.sum()` tokens, in row-major order.
        """

    @contextlib.contextmanager
    def whole_head(self, signal: TeacherSignal) -> Iterator[TeacherSignal]:
        """Keep, within it, the weights that `signal` refers to whole on every process."""
        yield signal

    @abstractmethod
    def fingerprint(self) -> str:
        """Identify weights and configuration, for anything kept on disk."""

    def shared_ids(self, tokenizer: Any, student_rows: int, teacher_tokenizer: Any = None) -> int | None:
        """Count the ids in the softmax of both models; None for all (see `shared_vocabulary`).

        Args:
            tokenizer: the student's.
            student_rows: rows of the student's head.
            teacher_tokenizer: None where it is unknown.

        Raises:
            VocabularyError: both do not mean the same token by the same id.
        """
        return None

    @property
    def writers(self) -> tuple[Teacher, ...]:
        """Who writes the completions of the rows of each of `names`; of one teacher, itself those of all."""
        return (self,)

    # ---- What it writes ---------------------------------------------------------------------------------------------

    def live(self) -> Any:
        """Return the `LocalTeacher` that generates; loaded if need be.

        Raises:
            ConfigurationError: there is none.
        """
        raise ConfigurationError(
            f"{type(self).__name__} cannot generate completions. Give the dataset completions, or use a local teacher."
        )

    @contextlib.contextmanager
    def generating(self, accelerator: Accelerator) -> Iterator[Any]:
        """Yield the model, ready to generate; it is loaded only now."""
        with self.live().generating(accelerator) as model:
            yield model

    def eos_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the tokens that end its completions."""
        return self.live().eos_ids(tokenizer)

    # ---- What a run tells it ----------------------------------------------------------------------------------------

    @property
    def is_collective(self) -> bool:
        """Whether it answers only when all processes ask, since each of them holds a share of it."""
        return False

    def expects(self, rows: Iterable[Mapping[str, Any]] | None, name: str) -> None:  # noqa: B027  # most do not care
        """Hear which tokenised rows of the dataset `name` are going to be asked for; None: those of a stream."""

    def expects_rollouts(self) -> None:  # noqa: B027
        """Hear that the student's own completions will be asked for, which are new at every step."""

    @contextlib.contextmanager
    def asking_ahead(self) -> Iterator[bool]:
        """Let `signal`, within it, only send its question to a remote teacher; yield whether that is of any use."""
        yield False

    @contextlib.contextmanager
    def holding_failures(self) -> Iterator[None]:
        """Keep, within it, what `signal` would raise in `failure`; the signal then says nothing.

        One of several processes that raised alone would leave the others waiting for it in their next collective.
        """
        yield

    def stop_waiting(self) -> None:  # noqa: B027
        """Stop waiting for a teacher that is away, as the run is to end. A signal's handler may call it."""

    def begin(self) -> None:  # noqa: B027
        """Hear that training begins: the student is in its wrappers, with the weights that it starts from."""

    def after_step(self) -> None:  # noqa: B027
        """Hear that the optimiser has stepped."""

    def state(self) -> dict[str, Tensor]:
        """Return what of it must survive in a checkpoint; each process its own share where it `is_collective`."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take up `state` again at the next `begin`; empty of a checkpoint that holds none."""

    @property
    def can_load(self) -> bool:
        """Tell whether hearing of rows may load weights, so that it is told after the student's are loaded."""
        return False

    @property
    def store(self) -> TeacherCache | None:
        """What it records in, for whoever fills it ahead."""
        return None

    def flush(self) -> None:  # noqa: B027
        """Write out what it has recorded."""

    def release(self) -> None:  # noqa: B027
        """Let weights go that can be loaded again."""

    def close(self) -> None:  # noqa: B027
        """End connections; it cannot be asked any more."""


def is_remote(name: Any) -> bool:
    """Tell whether a teacher is named by the address of its server, or by several with commas between."""
    return isinstance(name, str) and name.strip().lower().startswith(("http://", "https://"))


def named(teacher: Any) -> str:
    """Name a teacher as it was given, for messages."""
    return "None" if teacher is None else repr(teacher) if isinstance(teacher, str) else type(teacher).__name__


class NoTeacher(Teacher):
    """Stands where a teacher would, says nothing, and serves methods whose `needs` are empty."""

    is_nobody = True
    name = "none"

    @classmethod
    def refuse(cls, pair: Pair, options: TeacherOptions, wants: Requirements) -> None:
        if wants.needs:
            raise ConfigurationError(
                f"Got no teacher model, which {wants.trainer} learns from; expected a folder, a Hub id or a model as "
                "`teacher_model` (in a recipe: `teacher_model_name_or_path`)."
            )

    @classmethod
    def opened(cls, pair: Pair, options: TeacherOptions) -> NoTeacher:
        return cls()

    def prepare(self, accelerator: Any) -> None:
        pass

    def signal(self, inputs: Mapping[str, Tensor], predicts: Tensor, vocab_size: int | None) -> Any:
        return None

    def fingerprint(self) -> str:
        return "none"
