"""The models and tokenizers that a trainer is given, by name or in memory: what is refused, and how they are loaded."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import models
from ..exceptions import ConfigurationError
from ..teachers import (
    CachedTeacher,
    DeferredTeacher,
    LocalTeacher,
    NoTeacher,
    RemoteTeacher,
    Teacher,
    shared_vocabulary,
)
from ..teachers.base import is_remote
from ..teachers.local import AdapterOff
from ..teachers.placement import check_teacher
from .config import DistillConfig

logger = logging.getLogger(__name__)


def check(
    student: Any,
    teacher: Any,
    args: DistillConfig,
    needs: frozenset[str] = frozenset({"distribution"}),
    encoder_decoders: bool = False,
    adapted: bool = False,
) -> None:
    """Refuse models and parallel modes that cannot work, before anything is loaded.

    Args:
        needs: what the method needs of a teacher; with nothing, there may be none.
        encoder_decoders: whether the method trains such students.
        adapted: whether the student gets an adapter.

    Raises:
        ConfigurationError: a model is missing, is both student and teacher, or the launch would split rows of tokens.
    """
    config = args.parallelism_config
    if config is not None and any(getattr(config, f"{kind}_size", 1) > 1 for kind in ("tp", "cp", "sp")):
        raise ConfigurationError(
            "Got a parallelism_config with tensor, context or sequence parallelism; expected data parallelism only "
            "(DDP, ZeRO, FSDP2): the loss needs whole rows of tokens."
        )
    adapted = adapted or (isinstance(student, nn.Module) and models.is_peft(student))
    check_teacher(args, teacher, adapted=adapted, needs=needs, world_size=args.world_size)
    for source, role in ((student, "student"), (teacher, "teacher")):
        if source is None and role == "teacher" and (not needs or args.teacher_placement in ("adapter_off", "cached")):
            continue
        if source is None:
            raise ConfigurationError(f"Got no {role} model; expected a folder, a Hub id or a model.")
        if isinstance(source, str) and not (role == "teacher" and is_remote(source)):
            models.check_model_source(source, role)
    _check_architecture(student, teacher, args, encoder_decoders)
    frozen = teacher.model if isinstance(teacher, LocalTeacher) else teacher
    if isinstance(student, nn.Module) and isinstance(frozen, nn.Module):
        shared = {id(p) for p in student.parameters()} & {id(p) for p in frozen.parameters()}
        if shared:
            raise ConfigurationError(
                f"Student and teacher are the same model, or share {len(shared)} of their parameters (as an adapter "
                "and the base it was put on do), and the teacher's are frozen. Pass a copy as `teacher_model` "
                "(`copy.deepcopy(model)`, before it gets an adapter), or its name."
            )


def _check_architecture(student: Any, teacher: Any, args: DistillConfig, encoder_decoders: bool) -> None:
    config = student_config(student, args)
    if not getattr(config, "is_encoder_decoder", False):
        return
    if not encoder_decoders:
        raise ConfigurationError(
            f"The student is an encoder-decoder ({config.model_type}), which this method cannot train; expected a "
            "causal LM. Encoder-decoders are for `method: rationale` with `objective: step_by_step`."
        )
    if teacher is not None or args.teacher_placement == "cached":
        raise ConfigurationError(
            f"The student is an encoder-decoder ({config.model_type}) and there is a teacher: their tokens do not lie "
            "in the same places. Leave the teacher out (`distill_weight: 0`), or take a causal LM as student."
        )


def student_config(student: Any, args: DistillConfig) -> Any:
    """The student's configuration, read from its folder or the Hub if it is given by name."""
    if isinstance(student, str):
        return models.load_config(student, "student", trust_remote_code=args.trust_remote_code)
    return getattr(models.causal_lm_of(student), "config", None)


def student_tokenizer(student: Any, args: DistillConfig) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the student."""
    name = student if isinstance(student, str) else models.source_of(student)
    if not name:
        raise ConfigurationError(
            "The student does not say where it came from, so pass its tokenizer as `processing_class`."
        )
    try:
        return models.load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"No tokenizer could be loaded from the student {name!r}: {error}. Pass one as `processing_class`, or "
            "save one beside the model."
        ) from error


def teacher_tokenizer(
    teacher: Any, own: PreTrainedTokenizerBase, args: DistillConfig
) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer where it has a source that holds one; else None, and only sizes can be compared."""
    if is_remote(teacher) or isinstance(teacher, RemoteTeacher):
        return own  # its servers compare it with theirs
    name = teacher if isinstance(teacher, str) else None
    model = teacher.model if isinstance(teacher, LocalTeacher) else teacher
    if isinstance(model, nn.Module):
        name = models.source_of(model)
        if not name:
            logger.warning(
                "The teacher was made in memory and does not say where it came from, so its tokenizer could not be "
                "compared with the student's: they must be the same. Pass `teacher_processing_class` to check it."
            )
    if not name:
        return None
    if name == getattr(own, "name_or_path", None):
        return own
    try:
        return models.load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError):
        logger.warning("No tokenizer was found beside the teacher %r: only vocabulary sizes can be compared.", name)
        return None


def compare_vocabularies(student: Any, teacher: Any, own: Any, other: Any, args: DistillConfig) -> None:
    """The vocabulary check from configs alone, for models given by name: before weights are loaded."""
    if isinstance(student, str) and isinstance(teacher, str) and not is_remote(teacher):
        roles = {"student": student, "teacher": teacher}
        configs = [models.load_config(n, role, trust_remote_code=args.trust_remote_code) for role, n in roles.items()]
        rows = [config.get_text_config().vocab_size for config in configs]
        shared_vocabulary(own, other, *rows)


def common_vocabulary(student: Any, teacher: Teacher, own: Any, other: Any) -> int | None:
    """Number of ids in both softmaxes, or None for all (see `shared_vocabulary`)."""
    rows = models.causal_lm_of(student).config.get_text_config().vocab_size
    if isinstance(teacher, CachedTeacher):  # its rows were made with the student's tokenizer
        return shared_vocabulary(own, other or own, rows, teacher.identity.teacher_rows)
    if isinstance(teacher, RemoteTeacher):
        return ids_shared_with_server(teacher, own, rows)
    if not isinstance(teacher, LocalTeacher):
        return None
    teacher_rows = teacher.config.get_text_config().vocab_size
    return shared_vocabulary(own, other, rows, teacher_rows)


def ids_shared_with_server(teacher: RemoteTeacher, own: Any, student_rows: int) -> int | None:
    """As `shared_vocabulary`; None from a server that does not tell its number of ids."""
    teacher.limit_ids(student_rows)
    told = teacher.info["vocab_rows"]
    return None if told is None else shared_vocabulary(own, own, student_rows, told)


def load_student(student: Any, args: DistillConfig, peft_config: Any, quantization_config: Any) -> Any:
    """The student, loaded by name if need be, with its adapter and without dropout."""
    if isinstance(student, str):
        kwargs: dict[str, Any] = {"dtype": "float32", "trust_remote_code": args.trust_remote_code}
        kwargs |= args.model_init_kwargs or {}  # type: ignore[arg-type]
        student = models.load_causal_lm(student, role="student", quantization_config=quantization_config, **kwargs)
    elif quantization_config is not None or args.model_init_kwargs:
        raise ConfigurationError(
            "`quantization_config` and `model_init_kwargs` act while a student is loaded by name, but `model` is "
            f"already a {type(student).__name__}. Pass its name, or leave them out."
        )
    if peft_config is not None:
        student = models.add_adapter(student, peft_config, models.recomputes_activations(args))
    elif getattr(student, "active_peft_config", None) and student.active_peft_config.is_prompt_learning:
        raise ConfigurationError("The student is a prompt-learning PeftModel; only adapters of weights are supported.")
    if args.disable_dropout:
        models.disable_dropout(student)
    if models.is_peft(student) and models.recomputes_activations(args):
        student.enable_input_require_grads()  # frozen embeddings would cut the graph
    return student


def load_teacher(teacher: Any, args: DistillConfig, student: Callable[[], nn.Module] | None = None) -> Teacher:
    """The teacher, loaded by name if need be; a `NoTeacher` where none was given.

    Args:
        student: gives the student in its wrappers as they are now, for a teacher that shares its base.
    """
    if args.teacher_placement == "adapter_off":
        assert student is not None
        adapter = args.teacher_adapter and models.load_adapter(student(), args.teacher_adapter)
        return AdapterOff(student, adapter)
    if teacher is None:
        return NoTeacher()
    if isinstance(teacher, Teacher):
        if isinstance(teacher, LocalTeacher) and args.teacher_placement != "auto":
            teacher.placement = args.teacher_placement
        return teacher
    if isinstance(teacher, str):
        kwargs: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
        kwargs |= args.teacher_model_init_kwargs or {}  # type: ignore[arg-type]
        load = functools.partial(_load_placed, teacher, args, kwargs)
        if args.defers_teacher:
            config = models.load_config(teacher, "teacher", trust_remote_code=args.trust_remote_code)
            return DeferredTeacher(load, config, teacher, args.teacher_placement)
        return LocalTeacher(load(), teacher, args.teacher_placement)
    if args.teacher_model_init_kwargs:
        raise ConfigurationError(
            "`teacher_model_init_kwargs` act while a teacher is loaded by name, but `teacher_model` is already a "
            f"{type(teacher).__name__}. Pass its name, or leave them out."
        )
    return LocalTeacher(teacher, placement=args.teacher_placement)


def _load_placed(name: str, args: DistillConfig, kwargs: dict[str, Any]) -> nn.Module:
    with models.loading_placed(name, args.teacher_placement, args.device, kwargs) as placed:
        return models.load_causal_lm(name, role="teacher", **placed)
