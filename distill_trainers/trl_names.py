"""TRL's names of settings and metrics: what they are called here, and what to do where there is no counterpart.

Read for recipes, and for configs of TRL that are passed as `args`. It imports nothing: a recipe is checked at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

# Other names of keys that a recipe takes: those of TRL's commands, and shorter ones.
KEYS = {
    "dataset_name": "dataset",
    "dataset_train_split": "dataset_split",
    "dataset_test_split": "eval_split",
    "dataset_streaming": "streaming",
    "max_completion_length": "max_new_tokens",
    "max_seq_length": "max_length",
    "teacher_prompt_template": "teacher_prompt",
    "torch_dtype": "dtype",
    "student_model_name_or_path": "model_name_or_path",
    "teacher_model": "teacher_model_name_or_path",
    "teacher_tokenizer_name_or_path": "teacher_tokenizer",
    "model": "model_name_or_path",
}

# Names of transformers 5.23, which an older one knows by another.
NEWER = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}

# Metrics that are the same quantity in TRL, by our names; trackers are given both. Rewards of DPKD are so without
# `length_normalized`.
METRICS = {
    "completion_length": "completions/mean_length",
    "completion_clipped": "completions/clipped_ratio",
    "reward_mean": "reward",
    "reward_flat_groups": "frac_reward_zero_std",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "reward_margin": "rewards/margins",
    "reward_accuracy": "rewards/accuracies",
}


# What takes the place of TRL's trainers, by the beginning of their names; docs/from_trl.md has both sides.
TRAINERS = {
    "SFT": "`GKDTrainer` with a `teacher_model`, and `lmbda=0.0, divergence='forward_kl'` in `GKDConfig`",
    "Distillation": "`GKDTrainer`, with `lmbda=1.0, divergence='reverse_kl'` in `GKDConfig`",
    "GOLD": "`GKDTrainer`, with `teacher_tokenizer='own'` in `GKDConfig`",
    "DPO": "`DPKDTrainer` with a `teacher_model`",
    "GRPO": "`GKDTrainer` with `reward_funcs` and a `teacher_model`",
    "SDFT": "`GKDTrainer`, with `self_teacher` in `GKDConfig`",
    "SDPO": "`GKDTrainer`, with `self_teacher` and `feedback` in `GKDConfig`",
}


def class_instead(name: str, known: Collection[str]) -> str:
    """Say what to take in place of a trainer or config that is not here.

    Args:
        known: names that are.
    """
    kind = name.removesuffix("Trainer").removesuffix("Config")
    if kind in TRAINERS:
        return f"That is TRL's; what it does here is {TRAINERS[kind]}: docs/from_trl.md."
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
        return f"Did you mean {near[0]}?"
    there = ", ".join(sorted(each for each in known if each.endswith("Trainer")))
    return f"What is here: {there}, each with its config. Others are imported from `trl` or `transformers`, as before."


def other_names(known: Collection[str]) -> dict[str, str]:
    """Return other names of settings, and ours, where the settings are these."""
    return KEYS | {new: old for new, old in NEWER.items() if new not in known}


def with_trl_metrics(logs: Mapping[str, float]) -> dict[str, float]:
    """Return metrics with TRL's names of the same quantities beside ours; a name that is there already stays."""
    theirs = {f"{name}/mean": value for name, value in logs.items() if name.startswith("rewards/")}
    for prefix in ("", "eval_"):
        theirs |= {prefix + their: logs[prefix + our] for our, their in METRICS.items() if prefix + our in logs}
    return {**theirs, **logs}


_TOKENIZER = "set it on the tokenizer that you pass as `processing_class`, or save it with the model's tokenizer"
_CORRECTION = "set `sampler_correction` (truncate or mask, of single tokens), `sampler_ratio_min` and `_max`"
_ULD = (
    "set `teacher_tokenizer: own` (or the name of the teacher's), and `cross_tokenizer`, whose default compares chunks "
    "of text and next bytes; {uld: 1.0} is ULD"
)

# Settings that would change what is trained; each with what to do instead.
REFUSED = {
    "completion_only_loss": "the prompt is never trained on; give whole texts as `text` to train on all of it",
    "eval_packing": "evaluation is not packed, and scores each row by itself; leave it out",
    "packing_strategy": "`packing: true` fits whole rows together, TRL's `bfd`; leave it out",
    "eos_token": _TOKENIZER,
    "pad_token": _TOKENIZER,
    "chat_template_path": _TOKENIZER,
    "dataset_text_field": "set `column_mapping: {that column: text}`",
    "dataset_kwargs": "rows that are tokenised already are known by their columns; leave it out",
    "formatting_func": "call `dataset.map` with it first",
    "max_prompt_length": "set `max_length`, which counts prompt and completion; a prompt loses its beginning",
    "router_aux_loss_coef": "set it in the student's own config, in recipes by `model_init_kwargs`",
    "teacher_model_revision": "set `teacher_model_init_kwargs: {revision: …}`",
    "use_vllm": "set `rollout_engine: vllm`, and `vllm_kwargs`",
    "vllm_importance_sampling_correction": _CORRECTION,
    "vllm_importance_sampling_mode": _CORRECTION,
    "vllm_importance_sampling_clip_min": _CORRECTION,
    "vllm_importance_sampling_clip_max": _CORRECTION,
    "vllm_importance_sampling_cap": _CORRECTION,
    "accelerate_config": "start it with `accelerate launch --config_file …`",
    "datasets": "name one as `dataset`",
    "generation_kwargs": "set `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty` and `stop_strings`",
    "vllm_structured_outputs_regex": "completions are not constrained here; leave it out",
    "loss_weights": "one loss is trained at a time; name it as `loss_type`",
    "label_smoothing": "leave it out",
    "f_divergence_type": "leave it out",
    "f_alpha_divergence_coef": "leave it out",
    "ld_alpha": "set `length_normalized` instead",
    "use_weighting": "leave it out",
    "discopop_tau": "leave it out",
    "sync_ref_model": "the reference stays as it is; leave it out",
    "num_generations": "it is a setting of the methods gkd and minillm",
    "reward_weights": "it is a setting of the methods gkd and minillm, beside `reward_funcs`",
    "scale_rewards": "it is a setting of the methods gkd and minillm, beside `reward_funcs`",
    "epsilon": "set `clip_range`, which acts with `sampler_correction` and in MiniLLM's inner epochs",
    "epsilon_high": "set `clip_range`, one bound for both sides",
    "num_iterations": "set `num_inner_epochs` of the method minillm",
    "steps_per_generation": "set `num_minibatches` of the method minillm",
    "multi_objective_aggregation": "rewards are summed by weight; leave it out",
    "reward_model_path": "write a function that asks your model, as `reward_funcs: module:function`",
    "mask_truncated_completions": "leave it out: completions that were cut are rewarded as they are",
    "use_uld_loss": _ULD,
    "use_extended_uld": "chunks are those that both tokenisations share; leave it out",
    "uld_token_merge_strategy": "chunks are those that both tokenisations share; leave it out",
    "uld_use_hybrid_loss": "set `cross_tokenizer: {exact_overlap: 1.0, uld: 1.0}`, with weights of your own",
    "uld_hybrid_matched_weight": "set the weight of `exact_overlap` in `cross_tokenizer`",
    "uld_hybrid_unmatched_weight": "set the weight of `uld` in `cross_tokenizer`",
    "uld_crossentropy_weight": "set `lm_loss_weight`",
    "uld_distillation_weight": "set the weights in `cross_tokenizer`",
    "uld_student_temperature": "set `kd_temperature`, which divides the logits of both",
    "uld_teacher_temperature": "set `kd_temperature`, which divides the logits of both",
    "uld_skip_student_eos": "the ends of both texts are compared with each other; leave it out",
    "uld_skip_teacher_eos": "the ends of both texts are compared with each other; leave it out",
    "callbacks": "pass callbacks to the trainer",
    "precompute_ref_log_probs": "set `reference_logps_dir`",
    "ref_model_init_kwargs": "the reference is the teacher; set `teacher_model_init_kwargs`",
    "rpo_alpha": "set `lm_loss_weight`",
    "shuffle_dataset": "set `train_sampling_strategy: sequential`",
    "loss_type": "name one as `divergence`",
}

# Settings of transformers that newer versions do not have; each with what to do instead.
OLDER = {
    "group_by_length": "set `train_sampling_strategy: group_by_length`",
    "no_cuda": "set `use_cpu`",
    "per_gpu_train_batch_size": "set `per_device_train_batch_size`",
    "evaluation_strategy": "set `eval_strategy`",
}

# Settings that change nothing about what is trained; each with what does the same here.
HARMLESS = {
    "padding_free": "batches are padded",
    "activation_offloading": "`activation_checkpointing` saves memory here",
    "truncation_mode": "where a row is too long, the prompt loses its beginning before the completion loses its end",
    "ds3_gather_for_generation": "weights are gathered where they have to be",
    "cache_implementation": "the rollout engine chooses its own",
    "max_tool_calling_iterations": "tools are not called",
    "log_completions": "set `eval_measures` to see completions",
    "log_completions_steps": "set `eval_measures` to see completions",
    "num_completions_to_print": "set `eval_measures_shown`",
    "log_unique_prompts": "set `eval_measures_shown`",
    "wandb_log_unique_prompts": "set `eval_measures_shown`",
    "precompute_ref_batch_size": "`per_device_train_batch_size` is taken",
    "ref_model_mixup_alpha": "the reference stays as it is",
    "ref_model_sync_steps": "the reference stays as it is",
    "ignore_bias_buffers": "it is not needed",
    "teacher_model_name_or_path": "pass it to the trainer as `teacher_model`",
}
