"""Hidden states beside the divergence: what each layer of the student hands on, held against the teacher's.

    L = (1/M) Σ_m |h_m − H_m|² / |H_m|²   per trained token

(TinyBERT, arXiv 1909.10351, eq. 8, without its projection; Minitron, arXiv 2407.14679.) H_m is the output of the
teacher's last layer before the next kept one, so the term is 0 where a student's layer does the work of those that it
stands for.
Shapes: B rows, T positions, N trained tokens, D width, M layers of the student.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..exceptions import ConfigurationError
from ..settings import require
from ..students.layers import find_decoder_layers, remembered_layers
from ..teachers.base import Teacher

HIDDEN_MSE = "hidden_mse"  # as logs call the term
States = dict[int, Tensor]  # [N, D] by layer


class HiddenMatch:
    """Collects hidden states of both models as they run, and compares them.

    Args:
        places: of each of the student's layers, the teacher's layer (from 0) whose output it is held against.
        weight: of the term in the loss.
    """

    def __init__(self, places: Sequence[int], weight: float):
        self.places = list(places)
        self.weight = weight

    def of_teacher(self, teacher: Teacher, predicts: Tensor) -> contextlib.AbstractContextManager[States]:
        """Collect states at each place while the teacher runs over a batch, where `predicts` `[B, T-1]` is True."""
        return _collecting(teacher.model, self.places, predicts)  # type: ignore[attr-defined]  # a local one's

    def of_student(self, student: nn.Module, predicts: Tensor) -> contextlib.AbstractContextManager[States]:
        """Collect states of each layer, with gradients, while the student runs."""
        return _collecting(student, range(len(self.places)), predicts)

    def term(self, student: States, teacher: States) -> Tensor:
        """Return the term `[N]`; states are let go of one by one, so that not all are there beside all differences.

        Raises:
            ConfigurationError: a model has not run over the batch, or its layers return something else.
        """
        for whose, states, layers in (("teacher", teacher, self.places), ("student", student, range(len(self.places)))):
            if not states.keys() >= set(layers):
                raise ConfigurationError(
                    f"Got `hidden_weight: {self.weight:g}`, and layers of the {whose} that gave no hidden states of "
                    "the batch; expected a method that runs both models over each batch as it trains on it, as GKD, "
                    "and layers that return `[rows, tokens, width]`. Leave `hidden_weight` out."
                )
        errors = [_relative_error(student.pop(m), teacher.pop(place)) for m, place in enumerate(self.places)]
        return torch.stack(errors).mean(0)


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = student.float(), teacher.float()
    size = teacher.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (student - teacher).square().sum(-1) / size


@contextlib.contextmanager
def _collecting(model: nn.Module, layers: Iterable[int], predicts: Tensor) -> Iterator[States]:
    """Collect the outputs of these decoder layers, within it, at the positions that `predicts` marks."""
    states: States = {}

    def keep(index: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        rows, length = predicts.shape[0], predicts.shape[1] + 1
        # Kernels read packed rows as one. Any other shape is a look at a few tokens ahead of the batch, or unknown.
        if hidden.shape[:-1] in ((rows, length), (1, rows * length)):
            chosen = hidden.reshape(rows, length, -1)[:, :-1][predicts.to(hidden.device)]
            states[index] = chosen.to(predicts.device)  # a teacher may be spread over GPUs

    stack = find_decoder_layers(models.causal_lm_of(model))[1]
    hooks = [
        stack[index].register_forward_hook(lambda module, args, output, index=index: keep(index, output))
        for index in layers
    ]
    try:
        yield states
    finally:
        for hook in hooks:  # before the backward pass, in which checkpointed layers run again
            hook.remove()


def places_of(student: Any, teacher: Any, chosen: Sequence[int] | None) -> list[int]:
    """Return of each of the student's layers the teacher's layer whose output it is held against.

    A student that was made of a teacher of as many layers hands on what the next one kept used to read. One that has as
    many layers itself goes by number.

    Args:
        student, teacher: their configs.
        chosen: `hidden_layers`.

    Raises:
        ConfigurationError: the models differ in width, or nothing says which layers belong together.
    """
    student, teacher = student.get_text_config(decoder=True), teacher.get_text_config(decoder=True)
    if student.hidden_size != teacher.hidden_size:
        raise ConfigurationError(
            f"Got `hidden_weight` with a student of width {student.hidden_size} and a teacher of width "
            f"{teacher.hidden_size}; expected one width, since hidden states are compared as they are. Leave it out, "
            "or make the student of some of the teacher's layers (`student_init: {keep_layers: …}`)."
        )
    count, total = student.num_hidden_layers, teacher.num_hidden_layers
    if chosen is not None:
        fits = len(chosen) == count and list(chosen) == sorted(set(chosen)) and 0 <= min(chosen, default=0)
        expected = f"{count} different layers of the teacher, ascending, from 0 to {total - 1}: one for each layer"
        require(fits and max(chosen, default=0) < total, "hidden_layers", list(chosen), expected)
        return list(chosen)
    kept, made_of = remembered_layers(student)
    if made_of != total:  # of another model than this one
        kept = list(range(total)) if count == total else []
    if len(kept) != count:
        of = f" (made of a model of {made_of})" if made_of else ""
        raise ConfigurationError(
            f"Got `hidden_weight` with a student of {count} layers{of} and a teacher of {total}, and nothing says "
            "which belong together; expected a student that was made of this teacher (`student_init`, `prune`), or "
            f"`hidden_layers`: of each of its {count} layers the teacher's (from 0) that it is held against."
        )
    return [*(index - 1 for index in kept[1:]), total - 1]


def check_hidden_states(args: Any, student: Any, teacher: Callable[[], Any], kind: type[Teacher]) -> None:
    """Refuse `hidden_weight` where there is nothing to compare, before weights are loaded.

    Args:
        student: its config.
        teacher: gives its config, if it is of a kind that has one.
        kind: of teacher.

    Raises:
        ConfigurationError: by name.
    """
    if not args.hidden_weight:
        alone = "a `hidden_weight` above 0 beside it; set that, or leave it out"
        require(args.hidden_layers is None, "hidden_layers", args.hidden_layers, alone)
        return
    said = f"Got `hidden_weight: {args.hidden_weight:g}`"
    if args.why_no_hidden_states:
        raise ConfigurationError(f"{said} where {args.why_no_hidden_states}. Leave it out, or train by GKD.")
    if args.teacher_cache is not None or not kind.shows_layers:
        raise ConfigurationError(
            f"{said} with a teacher whose layers are not at hand (one behind an address, in a cache, several, or the "
            "student itself); expected one model that runs here. Leave `hidden_weight` out."
        )
    if args.has_own_tokenizer:
        raise ConfigurationError(
            f"{said} with `teacher_tokenizer: {args.teacher_tokenizer}`: the teacher reads other tokens, so that no "
            "position of both is the same. Leave one of them out."
        )
    reentrant: Mapping[str, Any] = args.gradient_checkpointing_kwargs or {}
    if reentrant.get("use_reentrant"):
        raise ConfigurationError(
            f"{said} with `use_reentrant: true`, which keeps no graph between the layers; expected "
            "`gradient_checkpointing_kwargs: {use_reentrant: false}`."
        )
    if getattr(student, "is_encoder_decoder", False):
        raise ConfigurationError(f"{said} with an encoder-decoder ({student.model_type}); expected a causal LM.")
    places_of(student, teacher(), args.hidden_layers)


def hidden_match(args: Any, student: nn.Module, teacher: Teacher) -> HiddenMatch | None:
    """Return what compares hidden states under these settings; None where nothing does."""
    if not args.hidden_weight:
        return None
    config = models.causal_lm_of(student).config
    for model in (student, teacher.model):  # type: ignore[attr-defined]  # of a local one
        find_decoder_layers(models.causal_lm_of(model))  # refuses architectures whose layers are not known
    return HiddenMatch(places_of(config, teacher.config, args.hidden_layers), args.hidden_weight)  # type: ignore[attr-defined]
