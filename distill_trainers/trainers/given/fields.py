"""Every field of `transformers.TrainingArguments`: whether it acts here, is refused, or is ignored, and why."""

from __future__ import annotations

import logging
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from typing import Any, get_args, get_type_hints

from transformers import TrainingArguments

from ...settings import require

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Argument:
    """What becomes of a field.

    Attributes:
        does: "acts", "refused" (any value but its default), or "ignored" (which is said, but for values of `only`).
        why: what differs from transformers, or why the value is refused or ignored.
        only: values that are taken all the same: they ask for what happens anyway.
        least: the smallest number that it takes.
        below: what a number must stay below.
    """

    does: str = "acts"
    why: str = ""
    only: tuple[Any, ...] = ()
    least: float | None = None
    below: float | None = None


_TRACKER = "read by its tracker, with `report_to`"
_SCORES = "with `compute_metrics` or `predict`; otherwise evaluation keeps no logits"
_SCRIPT = "transformers leaves it to scripts; call `train`, `evaluate` or `predict`"
_CAST = "the student would stay rounded; set `bf16: true`, which evaluates under autocast"

ARGUMENTS: dict[str, Argument] = {
    "output_dir": Argument(),
    "per_device_train_batch_size": Argument(least=1),
    "num_train_epochs": Argument(least=0),
    "max_steps": Argument(),
    "learning_rate": Argument(why="default by method", least=0),
    "lr_scheduler_type": Argument(why="default by method"),
    "lr_scheduler_kwargs": Argument(),
    "warmup_steps": Argument(least=0),
    "optim": Argument(why="its package is looked for first"),
    "optim_args": Argument(),
    "weight_decay": Argument(least=0),
    "adam_beta1": Argument(least=0, below=1),
    "adam_beta2": Argument(least=0, below=1),
    "adam_epsilon": Argument(least=0),
    "optim_target_modules": Argument(why="by GaLore and APOLLO, as in transformers"),
    "gradient_accumulation_steps": Argument(least=1),
    "average_tokens_across_devices": Argument("ignored", "tokens are counted over all processes in any case"),
    "max_grad_norm": Argument(least=0),
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
    "neftune_noise_alpha": Argument(why="in training forwards; rollouts have no noise", least=0),
    "torch_empty_cache_steps": Argument(least=1),
    "auto_find_batch_size": Argument(why="refused where MiniLLM trains on rollouts several times"),
    "logging_strategy": Argument(),
    "logging_steps": Argument(why="default 10", least=0),
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
    "eval_steps": Argument(least=0),
    "eval_delay": Argument(least=0),
    "per_device_eval_batch_size": Argument(least=1),
    "prediction_loss_only": Argument(
        why="leaves out predictions and `compute_metrics`; evaluation gives its own scores in any case"
    ),
    "eval_on_start": Argument(),
    "eval_do_concat_batches": Argument(why=_SCORES),
    "eval_use_gather_object": Argument(why=_SCORES),
    "eval_accumulation_steps": Argument(why=_SCORES, least=1),
    "include_for_metrics": Argument(why=_SCORES),
    "batch_eval_metrics": Argument(why=_SCORES),
    "save_only_model": Argument(why="its checkpoints cannot be resumed from"),
    "save_strategy": Argument(),
    "save_steps": Argument(least=0),
    "save_on_each_node": Argument(),
    "save_total_limit": Argument(why="never removes the last whole checkpoint; 0 is no limit", least=0),
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
    "seed": Argument(least=0),
    "data_seed": Argument(least=0),
    "use_cpu": Argument(),
    "accelerator_config": Argument(why="`dispatch_batches: true` and `even_batches: false` are refused"),
    "parallelism_config": Argument(why="tensor, context and sequence parallelism are refused"),
    "dataloader_drop_last": Argument(),
    "dataloader_num_workers": Argument(least=0),
    "dataloader_pin_memory": Argument(),
    "dataloader_persistent_workers": Argument(),
    "dataloader_prefetch_factor": Argument(least=1),
    "dataloader_multiprocessing_context": Argument(),
    "dataloader_in_order": Argument(),
    "remove_unused_columns": Argument("refused", "the collator reads more than the model's forward does"),
    "label_names": Argument("refused", "labels are always in `labels`", (["labels"],)),
    "train_sampling_strategy": Argument(),
    "length_column_name": Argument("ignored", "lengths are counted in tokenised rows"),
    "ddp_find_unused_parameters": Argument(),
    "ddp_bucket_cap_mb": Argument(least=1),
    "ddp_broadcast_buffers": Argument(),
    "ddp_static_graph": Argument(),
    "ddp_backend": Argument(),
    "ddp_timeout": Argument(least=1),
    "fsdp": Argument(why="version 2 only"),
    "fsdp_config": Argument(why="version 2 only"),
    "deepspeed": Argument(),
    "debug": Argument(),
    "skip_memory_metrics": Argument(),
    "do_train": Argument("ignored", _SCRIPT, (True, False)),
    "do_eval": Argument("ignored", _SCRIPT, (True, False)),
    "do_predict": Argument("ignored", _SCRIPT, (True, False)),
    "resume_from_checkpoint": Argument(
        why="read by the command and by `train()`, which transformers leaves to scripts"
    ),
    "local_rank": Argument("ignored", "the launcher says it"),
}


def check_arguments(args: Any) -> None:
    """Refuse fields of `TrainingArguments` that cannot act; say which are ignored.

    Raises:
        ConfigurationError: naming the field.
    """
    choices = {name: _enum(hint) for name, hint in get_type_hints(TrainingArguments).items()}
    for field in fields(args):
        value, argument = getattr(args, field.name), ARGUMENTS.get(field.name, Argument())
        if argument.least is not None and isinstance(value, (int, float)):
            require(not value < argument.least, field.name, value, f"{argument.least:g} or more")
        if argument.below is not None and isinstance(value, (int, float)):
            require(value < argument.below, field.name, value, f"a number below {argument.below:g}")
        if (choice := choices.get(field.name)) is not None:
            words = [member.value for member in choice]
            require(value in words, field.name, value, f"one of {', '.join(words)}")
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if argument.does == "acts" or value in (None, default, *argument.only):
            continue
        if argument.does == "ignored":
            logger.warning("`%s: %s` has no effect here: %s.", field.name, value, argument.why)
        else:
            require(False, field.name, value, f"{default}: {argument.why}")


def _enum(hint: Any) -> type[Enum] | None:
    """The words that a field takes, where it has a list of them; `debug` has a list of its own."""
    return next((part for part in get_args(hint) or (hint,) if isinstance(part, type) and issubclass(part, Enum)), None)
