"""Settings of the correction for a sampler that is not the student."""

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
