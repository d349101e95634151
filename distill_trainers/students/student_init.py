"""How a recipe makes its student out of its teacher: `student_init`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

from transformers import PreTrainedModel

from ..exceptions import ConfigurationError
from ..models import without_weights
from .layer_importance import MEASURES, Batch, choose_layers, layer_importance
from .layers import (
    check_count,
    even_layers,
    find_decoder_layers,
    kept_layers,
    prune_layers,
    refuse_unprunable,
    remember_layers,
)
from .planning import Candidate, candidates
from .pruning import SIZES, Choice, check_sizes, choose, take
from .shapes import asked_shape, write_shape

STRATEGIES = ("even", "importance")


def make_student(
    teacher: PreTrainedModel,
    keep_layers: int | Sequence[int],
    strategy: str = "even",
    *,
    batches: Iterable[Batch] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Make a student of some of the teacher's layers; the teacher stays as it is.

    On SmolLM2-135M (20 of 30 layers, untrained) the KL to the teacher was 7.7 nats per token with "even" and 2.0 with
    "importance": prefer the latter wherever there is text to measure on.

    Args:
        teacher: see `prune_layers`.
        keep_layers: how many layers, or which.
        strategy: "even" spaces them; "importance" measures every layer on `batches` and keeps the best.
        batches, options: for `layer_importance`; used by "importance" alone.

    Raises:
        ConfigurationError: settings that contradict each other, or what `prune_layers` refuses.
    """
    _check_strategy(keep_layers, strategy)
    if strategy == "even" or not isinstance(keep_layers, int):  # only "even" may name the layers
        return prune_layers(teacher, keep_layers)
    if batches is None:
        raise ConfigurationError('strategy="importance" measures layers on text; give `batches`, or use "even".')
    refuse_unprunable(teacher)  # before anything is measured in vain
    check_count(len(find_decoder_layers(teacher)[1]), keep_layers)
    return prune_layers(teacher, choose_layers(layer_importance(teacher, batches, **options), keep_layers))


@dataclass(frozen=True)
class StudentInit:
    """How a recipe makes its student: `student_init: {from_teacher: true, keep_layers: 12}`.

    Args:
        keep_layers: how many of the teacher's layers, or which.
        from_teacher: must be true; written out in recipes because it says where the weights come from.
        strategy: of a number of layers: "even" or "importance"; by default the first for layers alone, and the second
            beside other sizes.
        measure: "kl" or "angular", see `layer_importance`; used by "importance" alone.
        importance_batches: batches of training data that importance is measured on.
        intermediate_size, hidden_size, num_attention_heads, num_key_value_heads, num_experts, parameters: see `prune`.

    Raises:
        ConfigurationError: settings that contradict each other.
    """

    keep_layers: int | list[int] | None = None
    from_teacher: bool = True
    strategy: str | None = None
    measure: str = "kl"
    importance_batches: int = 4
    intermediate_size: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    num_experts: int | None = None
    parameters: float | None = None

    def __post_init__(self) -> None:
        check_sizes(self.keep_layers, self.sizes, self.parameters)
        if self.keep_layers is None and self.parameters is None and not self.sizes:
            raise ConfigurationError(
                "student_init does not say how small the student is; set keep_layers (how many of the teacher's "
                f"layers, or a list), some of {', '.join(SIZES)}, or parameters."
            )
        if self.keep_layers is not None:
            _check_strategy(self.keep_layers, self.strategy)
        elif self.strategy == "even":
            raise ConfigurationError(
                'student_init has strategy="even" and no keep_layers, so there are no layers to space; leave it out.'
            )
        if self.from_teacher is not True:
            raise ConfigurationError(
                f"student_init has from_teacher={self.from_teacher!r}, but the teacher is the only source of layers; "
                "set it to true, or leave student_init out and name a student model."
            )
        if self.measure not in MEASURES:
            raise ConfigurationError(f"measure={self.measure!r} is not known; choose one of {', '.join(MEASURES)}.")
        if self.importance_batches < 1:
            raise ConfigurationError(f"importance_batches={self.importance_batches}; expected 1 or more.")

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes other than layers that are set."""
        return {name: getattr(self, name) for name in SIZES if getattr(self, name) is not None}

    @property
    def needs_text(self) -> bool:
        """Tell whether something is measured."""
        return self.strategy == "importance" or bool(self.sizes) or self.parameters is not None

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> StudentInit:
        """Read a recipe's mapping; a name that is no setting is refused with the nearest one that is."""
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}."
                raise ConfigurationError(f"student_init has no setting {name!r}; {hint}")
        return cls(**settings)

    def choose(self, teacher: PreTrainedModel, batches: Iterable[Batch] | None = None, **options: Any) -> Choice:
        """Choose what the student keeps, on the first `importance_batches` of `batches` if something is measured.

        `options` go to `students.choose`.
        """
        texts = None if batches is None or not self.needs_text else islice(batches, self.importance_batches)
        if texts is None and self.needs_text:
            raise ConfigurationError('What matters is measured on text; give `batches`, or use strategy="even" alone.')
        layers = self.keep_layers
        evenly = self.strategy == "even" or not self.needs_text
        if isinstance(layers, int) and evenly:
            layers = even_layers(len(find_decoder_layers(teacher)[1]), layers)
        how = {"sizes": self.sizes, "parameters": self.parameters, "batches": texts, "measure": self.measure}
        return choose(teacher, keep_layers=layers, **how, **options)  # type: ignore[arg-type]

    def build(
        self, teacher: PreTrainedModel, batches: Iterable[Batch] | None = None, **options: Any
    ) -> PreTrainedModel:
        """Make the student; the teacher stays as it is. See `choose`."""
        return take(teacher, self.choose(teacher, batches, **options))

    def shrink(self, config: Any, *, trust_remote_code: bool = False) -> list[Candidate]:
        """Make a teacher's config the student's, in place, without weights; of a plan it becomes the middle candidate.

        Returns:
            The candidates of a plan, which are measured once there are weights; else none.

        Raises:
            ConfigurationError: sizes that this model cannot have.
        """
        text, tried = config.get_text_config(), []
        layers: int | list[int] | None = self.keep_layers
        shape = asked_shape(text, self.sizes) if self.sizes else None
        if self.parameters is not None:
            shell = without_weights(deepcopy(config), trust_remote_code=trust_remote_code)
            tried = candidates(shell, self.parameters)
            shape = tried[len(tried) // 2].shape
            layers = shape.num_hidden_layers
        if layers is not None:
            kept = kept_layers(text.num_hidden_layers, layers)
            if getattr(text, "layer_types", None):
                text.layer_types = [text.layer_types[i] for i in kept]
            remember_layers(text, kept, text.num_hidden_layers)
            text.num_hidden_layers = len(kept)
        if shape is not None:
            write_shape(text, shape)
        return tried


def made_of(settings: Mapping[str, Any], teacher: str) -> str:
    """Say what a student with these settings of `student_init` is: "12 of the layers of org/large", for instance."""
    layers, sizes = settings.get("keep_layers"), [f"{n} {settings[n]}" for n in SIZES if settings.get(n) is not None]
    if settings.get("parameters") is not None:
        sizes.append(f"{settings['parameters']:,.0f} parameters")
    if layers is None:
        return f"{teacher} pruned to {', '.join(sizes)}"
    count = f"{len(layers) if isinstance(layers, list) else layers} of the layers of {teacher}"
    return f"{count}, pruned to {', '.join(sizes)}" if sizes else count


def _check_strategy(keep_layers: int | Sequence[int], strategy: str | None) -> None:
    if strategy is not None and strategy not in STRATEGIES:
        raise ConfigurationError(f"strategy={strategy!r} is not known; choose one of {', '.join(STRATEGIES)}.")
    if isinstance(keep_layers, bool) or not isinstance(keep_layers, (int, Sequence)) or isinstance(keep_layers, str):
        raise ConfigurationError(f"keep_layers={keep_layers!r}; expected a number of layers or a list of them.")
    if strategy == "importance" and not isinstance(keep_layers, int):
        raise ConfigurationError(
            f'keep_layers={list(keep_layers)} names the layers, which leaves strategy="importance" nothing to choose; '
            'give a number of layers, or use strategy="even".'
        )
