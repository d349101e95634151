"""Every field of `transformers.TrainingArguments`: whether it acts here, is refused, or is ignored, and why."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from typing import Any, get_args, get_type_hints

from transformers import TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.trainer_pt_utils import AcceleratorConfig

from ...exceptions import ConfigurationError, refuse_unknown_keys
from ...settings import Bounds, require, shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Argument:
    """What becomes of a field.

    Attributes:
        does: "acts", "refused" (any value but its default), or "ignored" (which is said, but for values of `only`).
        why: what differs from transformers, or why the value is refused or ignored.
        only: values that are taken all the same: they ask for what happens anyway.
        bounds: where its number must lie.
        also: a type that is taken though transformers declares another.
    """

    does: str = "acts"
    why: str = ""
    only: tuple[Any, ...] = ()
    bounds: Bounds | None = None
    also: Any = None


_TRACKER = "read by its tracker, with `report_to`"
_SCORES = "with `compute_metrics` or `predict`; otherwise evaluation keeps no logits"
_SCRIPT = "transformers leaves it to scripts; call `train`, `evaluate` or `predict`"
_COUNT, _AMOUNT, _ABOVE_0 = Bounds(least=1), Bounds(least=0), Bounds(above=0)
_DECAY, _SEED, _PROCESSES = Bounds(least=0, below=1), Bounds(least=0, most=2**32 - 1), Bounds(least=0, most=1024)
_SECONDS = Bounds(least=1, most=10**9)
_CAST = "the student would stay rounded; set `bf16: true`, which evaluates under autocast"

ARGUMENTS: dict[str, Argument] = {
    "output_dir": Argument(),
    "per_device_train_batch_size": Argument(bounds=_COUNT),
    "num_train_epochs": Argument(bounds=_AMOUNT),
    "max_steps": Argument(bounds=Bounds(least=-1)),
    "learning_rate": Argument(why="default by method", bounds=_AMOUNT),
    "lr_scheduler_type": Argument(why="default by method"),
    "lr_scheduler_kwargs": Argument(),
    "warmup_steps": Argument(bounds=_AMOUNT),
    "optim": Argument(why="its package is looked for first"),
    "optim_args": Argument(),
    "weight_decay": Argument(bounds=_AMOUNT),
    "adam_beta1": Argument(bounds=_DECAY),
    "adam_beta2": Argument(bounds=_DECAY),
    "adam_epsilon": Argument(bounds=_ABOVE_0),
    "optim_target_modules": Argument(why="by GaLore and APOLLO, as in transformers"),
    "gradient_accumulation_steps": Argument(bounds=_COUNT),
    "average_tokens_across_devices": Argument("ignored", "tokens are counted over all processes in any case"),
    "max_grad_norm": Argument(bounds=_AMOUNT),
    "label_smoothing_factor": Argument("refused", "a teacher's distribution takes the place of smoothed labels"),
    "bf16": Argument(),
    "fp16": Argument(),
    "bf16_full_eval": Argument("refused", _CAST),
    "fp16_full_eval": Argument("refused", _CAST),
    "tf32": Argument(),
    "activation_checkpointing": Argument(),
    "activation_checkpointing_kwargs": Argument(),
    "gradient_checkpointing": Argument(why="the older name of `activation_checkpointing`"),
    "gradient_checkpointing_kwargs": Argument(why="the older name of `activation_checkpointing_kwargs`"),
    "torch_compile": Argument(),
    "torch_compile_backend": Argument(),
    "torch_compile_mode": Argument(),
    "use_liger_kernel": Argument(why="norms, RoPE and MLP of the student; its fused cross-entropy stays off"),
    "liger_kernel_config": Argument(why="`cross_entropy` and `fused_linear_cross_entropy` are refused"),
    "use_cache": Argument("ignored", "rollouts always have a KV cache, training never needs one"),
    "neftune_noise_alpha": Argument(why="in training forwards; rollouts have no noise", bounds=_AMOUNT),
    "torch_empty_cache_steps": Argument(bounds=_COUNT),
    "auto_find_batch_size": Argument(why="refused where MiniLLM trains on rollouts several times"),
    "logging_strategy": Argument(),
    "logging_steps": Argument(why="default 10", bounds=_ABOVE_0),
    "logging_first_step": Argument(),
    "log_on_each_node": Argument(),
    "logging_nan_inf_filter": Argument(why="default false; a NaN stops the run in any case"),
    "include_num_input_tokens_seen": Argument(why="counts what is trained on, so rollouts where there are any"),
    "log_level": Argument(),
    "log_level_replica": Argument(),
    "disable_tqdm": Argument(why="the command has a progress bar of its own"),
    "report_to": Argument(why="its package is looked for first"),
    "run_name": Argument(why=_TRACKER),
    "project": Argument(why=_TRACKER),
    "trackio_space_id": Argument(why=_TRACKER),
    "trackio_bucket_id": Argument(why=_TRACKER),
    "trackio_static_space_id": Argument(why=_TRACKER),
    "eval_strategy": Argument(),
    "eval_steps": Argument(bounds=_ABOVE_0),
    "eval_delay": Argument(bounds=_AMOUNT),
    "per_device_eval_batch_size": Argument(bounds=_COUNT),
    "prediction_loss_only": Argument(
        why="leaves out predictions and `compute_metrics`; evaluation gives its own scores in any case"
    ),
    "eval_on_start": Argument(),
    "eval_do_concat_batches": Argument(why=_SCORES),
    "eval_use_gather_object": Argument(why=_SCORES),
    "eval_accumulation_steps": Argument(why=_SCORES, bounds=_COUNT),
    "include_for_metrics": Argument(why=_SCORES),
    "batch_eval_metrics": Argument(why=_SCORES),
    "save_only_model": Argument(why="its checkpoints cannot be resumed from"),
    "save_strategy": Argument(),
    "save_steps": Argument(bounds=_ABOVE_0),
    "save_on_each_node": Argument(),
    "save_total_limit": Argument(why="never removes the last whole checkpoint; 0 is no limit", bounds=_AMOUNT),
    "enable_jit_checkpoint": Argument(why="the command writes a checkpoint at SIGTERM in any case"),
    "push_to_hub": Argument(why="access is checked first"),
    "hub_token": Argument(),
    "hub_private_repo": Argument(),
    "hub_model_id": Argument(),
    "hub_strategy": Argument(),
    "hub_always_push": Argument(),
    "hub_revision": Argument(),
    "load_best_model_at_end": Argument(),
    "metric_for_best_model": Argument(
        why="default `perplexity`, not `loss`; a name that no evaluation gives is refused"
    ),
    "greater_is_better": Argument(why="default by metric"),
    "ignore_data_skip": Argument(why="refused where MiniLLM trains on rollouts several times"),
    "restore_callback_states_from_checkpoint": Argument(),
    "full_determinism": Argument(),
    "seed": Argument(bounds=_SEED),
    "data_seed": Argument(bounds=_SEED),
    "use_cpu": Argument(),
    "accelerator_config": Argument(
        why="`dispatch_batches: true` and `even_batches: false` are refused", also=AcceleratorConfig
    ),
    "parallelism_config": Argument(why="tensor, context and sequence parallelism are refused"),
    "dataloader_drop_last": Argument(),
    "dataloader_num_workers": Argument(bounds=_PROCESSES),
    "dataloader_pin_memory": Argument(),
    "dataloader_persistent_workers": Argument(),
    "dataloader_prefetch_factor": Argument(why="with `dataloader_num_workers` above 0", bounds=_COUNT),
    "dataloader_multiprocessing_context": Argument(),
    "dataloader_in_order": Argument(),
    "remove_unused_columns": Argument("refused", "the collator reads more than the model's forward does"),
    "label_names": Argument("refused", "labels are always in `labels`", (["labels"],)),
    "train_sampling_strategy": Argument(),
    "length_column_name": Argument("ignored", "lengths are counted in tokenised rows"),
    "ddp_find_unused_parameters": Argument(),
    "ddp_bucket_cap_mb": Argument(bounds=_COUNT),
    "ddp_broadcast_buffers": Argument(),
    "ddp_static_graph": Argument(),
    "ddp_backend": Argument(),
    "ddp_timeout": Argument(bounds=_SECONDS),
    "fsdp": Argument(why="version 2 only", also=bool | list[str]),
    "fsdp_config": Argument(why="version 2 only"),
    "deepspeed": Argument(),
    "debug": Argument(also=list[str] | None),
    "skip_memory_metrics": Argument(),
    "do_train": Argument("ignored", _SCRIPT, (True, False)),
    "do_eval": Argument("ignored", _SCRIPT, (True, False)),
    "do_predict": Argument("ignored", _SCRIPT, (True, False)),
    "resume_from_checkpoint": Argument(
        why="read by the command and by `train()`, which transformers leaves to scripts"
    ),
    "local_rank": Argument("ignored", "the launcher says it"),
}


@functools.cache
def also_taken() -> dict[str, Any]:
    """Return types that fields take beside those that transformers declares; a switch takes None for false."""
    hints = get_type_hints(TrainingArguments)
    more = {name: None for name, hint in hints.items() if hint is bool}
    return more | {name: argument.also for name, argument in ARGUMENTS.items() if argument.also is not None}


def check_arguments(args: Any) -> None:
    """Refuse fields of `TrainingArguments` that cannot act, or whose words are not known; say which are ignored.

    Raises:
        ConfigurationError: naming the field.
    """
    choices = _choices()
    for field in fields(args):
        value, argument = getattr(args, field.name), ARGUMENTS.get(field.name, Argument())
        if (choice := choices.get(field.name)) is not None:
            words = [member.value for member in choice]
            require(value in words, field.name, value, f"one of {', '.join(words)}")
        elif value is not None and (listed := field.metadata.get("choices")):
            require(value in listed, field.name, value, f"one of {', '.join(map(str, listed))}")
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if argument.does == "acts" or value in (None, default, *argument.only):
            continue
        if argument.does == "ignored":
            logger.warning("`%s: %s` has no effect here: %s.", field.name, value, argument.why)
        else:
            require(False, field.name, value, f"{default}: {argument.why}")
    for option in args.debug if isinstance(args.debug, list) else ():
        require(option in [*DebugOption], "debug", option, f"any of {', '.join(DebugOption)}")
    _check_steps(args)
    _check_workers(args)
    _check_kwargs(args)


@contextlib.contextmanager
def refusals_of_transformers() -> Iterator[None]:
    """Turn what transformers refuses about its own arguments into an error that is shown without a traceback."""
    try:
        yield
    except ConfigurationError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, ImportError, OSError) as error:
        said = shown(error, 300).rstrip(".") or type(error).__name__
        raise ConfigurationError(
            f"transformers cannot work with these settings: {said}. Change the one that it names, or leave it out for "
            "its default."
        ) from error


def _check_steps(args: Any) -> None:
    require(args.max_steps != 0, "max_steps", 0, "1 or more, or -1 to train for `num_train_epochs`")
    for name in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
        value = getattr(args, name)
        whole = value is None or value < 1 or value == int(value)
        require(whole, name, value, "a whole number of steps, or a share of all of them below 1")


def _check_workers(args: Any) -> None:
    for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        value = getattr(args, name)
        beside = "`dataloader_num_workers` above 0 beside it: without workers nothing is loaded ahead. Leave it out"
        require(not value or args.dataloader_num_workers > 0, name, value, beside)


def _check_kwargs(args: Any) -> None:
    """Refuse keys of mappings that torch and accelerate refuse only once they run."""
    from torch.utils.checkpoint import checkpoint

    taken_out = {"every_n_layers", "offload"}  # of transformers, which takes them out before torch sees the rest
    of_torch = {*inspect.signature(checkpoint).parameters, "preserve_rng_state"} - {"function", "args", "kwargs"}
    for name, known in (
        ("activation_checkpointing_kwargs", of_torch | taken_out),
        ("gradient_checkpointing_kwargs", of_torch | taken_out),
        ("accelerator_config", {field.name for field in fields(AcceleratorConfig)}),
    ):
        if isinstance(given := getattr(args, name, None), dict):
            refuse_unknown_keys(given, known, f"`{name}`")


@functools.cache
def _choices() -> dict[str, type[Enum] | None]:
    return {name: _enum(hint) for name, hint in get_type_hints(TrainingArguments).items()}


def _enum(hint: Any) -> type[Enum] | None:
    """The words that a field takes, where it has a list of them; `debug` has a list of its own."""
    return next((part for part in get_args(hint) or (hint,) if isinstance(part, type) and issubclass(part, Enum)), None)
