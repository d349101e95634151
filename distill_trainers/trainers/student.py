"""The student, by name or in memory: its configuration, its tokenizer, and how it is loaded."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedTokenizerBase

from .. import models
from ..exceptions import ConfigurationError
from .config import DistillConfig


def student_config(student: Any, args: DistillConfig) -> Any:
    """Return the student's configuration, read from its folder or the Hub if it is given by name."""
    if isinstance(student, str):
        given: Any = args.model_init_kwargs or {}
        return models.with_overrides(models.load_config(student, "student", **args.files_of("student")), given)
    return getattr(models.causal_lm_of(student), "config", None)


def student_tokenizer(student: Any, args: DistillConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved beside the student."""
    name = student if isinstance(student, str) else models.source_of(student)
    if not name:
        raise ConfigurationError(
            "The student does not say where it came from, so pass its tokenizer as `processing_class`."
        )
    try:
        return models.load_tokenizer(name, **args.files_of("student"))
    except ConfigurationError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"No tokenizer could be loaded from the student {name!r}: {error}. Pass one as `processing_class`, or "
            "save one beside the model."
        ) from error


def load_student(
    student: Any, args: DistillConfig, peft_config: Any, quantization_config: Any, trains: bool = False
) -> Any:
    """Return the student, loaded by name if need be, with its adapter and without dropout.

    Raises:
        ConfigurationError: it is to be trained, and nothing of it can be.
    """
    if args.use_liger_kernel and args.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigurationError(
            "Got `use_liger_kernel: True` on a CPU; expected a GPU, for which its kernels are made."
        )
    if isinstance(student, str):
        given = models.settled_kwargs(args.model_init_kwargs, "model_init_kwargs")  # type: ignore[arg-type]  # parsed
        kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **given}
        kwargs |= {} if quantization_config is None else {"quantization_config": quantization_config}
        student = models.load_causal_lm(student, role="student", **kwargs)
    if peft_config is not None:
        student = models.add_adapter(student, peft_config, models.recomputes_activations(args))
    elif getattr(student, "active_peft_config", None) and student.active_peft_config.is_prompt_learning:
        raise ConfigurationError("The student is a prompt-learning PeftModel; only adapters of weights are supported.")
    if trains and not models.num_parameters(student, trainable_only=True):
        _refuse_frozen(student)
    models.keep_4bit_trainable(student)
    if args.disable_dropout:
        models.disable_dropout(student)
    if models.is_peft(student) and models.recomputes_activations(args):
        student.enable_input_require_grads()  # frozen embeddings would cut the graph
    return student


def _refuse_frozen(student: Any) -> None:
    remedy = "Call `requires_grad_(True)` on the model, or on the parts that are to train"
    if models.is_peft(student):
        remedy = (
            "An adapter is frozen when it is loaded for inference: pass `is_trainable=True` to "
            "`PeftModel.from_pretrained`, and `inference_mode=False` in its config"
        )
    elif getattr(student, "is_quantized", False):
        remedy = "Quantised weights do not train: give an adapter (`peft_config`, `use_peft: true` in a recipe)"
    raise ConfigurationError(
        f"Got a {type(student).__name__} to train, but none of the student's {models.num_parameters(student):,} "
        f"parameters requires a gradient; expected some that do. {remedy}."
    )
