"""Settings of a sampler that is not the student: its correction, and text that is sampled a step ahead."""

from __future__ import annotations

from typing import Any

from ...losses.sampler_ratio import CORRECTIONS
from ...settings import require


def check_correction(args: Any) -> None:
    """Refuse a correction that cannot work under the settings of a `DistillConfig`.

    Raises:
        ConfigurationError: naming the setting.
    """
    kind, low, high = args.sampler_correction, args.sampler_ratio_min, args.sampler_ratio_max
    require(kind in CORRECTIONS, "sampler_correction", kind, f"one of {', '.join(CORRECTIONS)}")
    if kind == "none":
        return
    trainer = type(args).__name__.removesuffix("Config") + "Trainer"
    expected = f"none: no loss of {trainer} is an expectation over the student's own text"
    require(args.weighs_samples, "sampler_correction", kind, expected)
    require(args.samples_completions, "sampler_correction", kind, "none where no step trains on sampled text")
    bounded = f"a bound, as `sampler_ratio_max: 2.0`, with `sampler_correction: {kind}`"
    require(kind == "prefix" or (low, high) != (None, None), "sampler_ratio_max", high, bounded)
    greedy = f"a positive number with `sampler_correction: {kind}`: greedy text is no sample, and has no weights"
    require(args.temperature > 0, "temperature", args.temperature, greedy)
    alone = f"1.0 with `sampler_correction: {kind}`, whose ratios are those of a token by itself"
    require(args.repetition_penalty == 1, "repetition_penalty", args.repetition_penalty, alone)


def check_ahead(args: Any) -> None:
    """Refuse `sample_ahead` where it gains nothing, and where a step's text cannot be told before it is due.

    Raises:
        ConfigurationError: naming the setting.
    """
    if not args.sample_ahead:
        return
    require(args.weighs_samples, "sample_ahead", True, "false: the method has no correction for text that is old")
    require(args.samples_completions, "sample_ahead", True, "false where no step trains on sampled text")
    old = "truncate, mask or prefix with `sample_ahead: true`, whose text is one step old"
    require(args.sampler_correction != "none", "sampler_correction", args.sampler_correction, old)
    waits = "vllm, with `vllm_kwargs: {mode: server}`: every other engine samples where training would go on meanwhile"
    require(args.rollout_engine == "vllm", "rollout_engine", args.rollout_engine, f"{waits}. Or `sample_ahead: false`")
    reused = "with `sample_ahead: true`, which is for steps that sample their own text"
    for name, off in (("replay_buffer_size", 0), ("num_minibatches", 1), ("num_inner_epochs", 1)):
        value = getattr(args, name, off)
        require(value == off, name, value, f"{off} {reused}")
    told = "false with `sample_ahead: true`: a step must know whether, and after which rows, the next one samples"
    for name in ("adaptive_rollouts", "ignore_data_skip", "auto_find_batch_size"):
        value = getattr(args, name, False)
        require(not value, name, value, told)
