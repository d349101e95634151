"""Trainers whose loss takes completions for the student's own: where they are not quite, it is corrected, or told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ..exceptions import ConfigurationError
from ..losses.reduction import trained_mask
from ..losses.sampler_ratio import OUTSIDE, RATIO, SAMPLED, SamplerRatio
from ..rollouts import Completions, SamplingSettings, draws_on_policy
from ..rollouts.sampler_logps import with_sampler_logps
from ..rollouts.sampling import logits_processors
from .base import Batch, DistillTrainer
from .lifecycle.ahead import SampleAhead


class OnPolicyTrainer(DistillTrainer):
    """A `DistillTrainer` that knows how likely the student's completions were where they were sampled.

    `sampler_ratio` has the weights of its loss, and the metrics, means over tokens whose sampler is known.
    """

    logged_divisors: ClassVar[dict[str, str]] = {RATIO: SAMPLED, OUTSIDE: SAMPLED}

    def set_up_method(self) -> None:
        super().set_up_method()
        self.sampler_ratio = self.build_sampler_ratio()
        self.two_models.sampler_ratio = self.sampler_ratio
        if self.args.sampler_correction != "none" and self.requirements.samples_completions:
            self._refuse_silent(self.engine.processed)
        self.ahead = SampleAhead(self, self.samples_at) if self.args.sample_ahead else None

    def samples_at(self, step: int) -> bool:
        """Tell whether optimiser step `step` trains on the student's own text."""
        args: Any = self.args
        return draws_on_policy(args.lmbda, args.seed, step)

    def next_batches(self, epoch_iterator: Iterator, num_batches: int) -> list[Batch]:
        if self.ahead is None:
            return super().next_batches(epoch_iterator, num_batches)
        return self.ahead.next_batches(epoch_iterator, num_batches)

    def method_state(self) -> dict[str, Any]:
        return super().method_state() | ({} if self.ahead is None else {"ahead": self.ahead.state_dict()})

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        if self.ahead is not None:
            self.ahead.load_state_dict(state.get("ahead", {}))

    def build_sampler_ratio(self) -> SamplerRatio:
        """Hold the student, sampled as the settings say, against the sampler: mu = q has the ratio 1 at any setting."""
        args, processors = self.args, logits_processors(self.sampling)
        bounds = args.sampler_ratio_min, args.sampler_ratio_max
        if not len(processors) or self.sampling.reads_text:  # then its ratios are not known
            return SamplerRatio(args.sampler_correction, *bounds)
        no_ids: Any = None  # which these processors do not read
        return SamplerRatio(args.sampler_correction, *bounds, lambda logits: processors(no_ids, logits))

    def sample_completions(self, batches: list[Batch], generate: Callable[..., Any] | None = None) -> list[Batch]:
        """Add what the engine thought of each token (`rollouts.sampler_logps`), where it tells."""
        answers: list[Any] = []
        engine = self.engine if self.ahead is None else self.ahead

        def listened(*given: Any) -> Any:
            answers.append((generate or engine.generate)(*given))
            return answers[-1]

        sampled = super().sample_completions(batches, listened)
        told = known_logps(answers[0], self.sampling)
        if told is None:
            if generate is None and self.args.sampler_correction != "none":
                self._refuse_silent(None)
            return sampled
        ends = [len(batch["labels"]) for batch in sampled]
        starts = [sum(ends[:place]) for place in range(len(ends))]
        parts = zip(sampled, starts, ends, strict=True)
        return [with_sampler_logps(batch, told[start : start + count]) for batch, start, count in parts]

    def token_terms(
        self, model: nn.Module, inputs: Batch, terms_fn: Any, weights: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = super().token_terms(model, inputs, terms_fn, weights)
        if RATIO in terms and model.training:
            known = inputs[SAMPLED][:, 1:][trained_mask(inputs["labels"])]
            self.metrics.add_quantiles(RATIO, terms[RATIO], known)
        return total, terms

    def _refuse_silent(self, processed: bool | None) -> None:
        """Refuse an engine whose log-probabilities are none, or not of what it drew from."""
        if processed or (processed is False and not self.sampling.changes_distribution):
            return
        told = "of the model itself, before temperature and filters" if processed is False else "none that are known"
        raise ConfigurationError(
            f"Got `sampler_correction: {self.args.sampler_correction}` with `rollout_engine: "
            f"{self.args.rollout_engine}`, whose log-probabilities are {told}; expected those of the distribution that "
            "it drew from. Start vLLM with `logprobs_mode: processed_logprobs`, or set `sampler_correction: none`."
        )


def known_logps(completions: Any, sampling: SamplingSettings) -> list[list[float]] | None:
    """Return log-probabilities by which the student can be held against its sampler; None without any."""
    if not isinstance(completions, Completions) or sampling.reads_text:
        return None
    return completions.drawn_logps(sampling)
