"""Generalized Knowledge Distillation: On-Policy Distillation of Language Models (Agarwal et al., ICLR 2024).

arXiv 2306.13649:  L = (1−λ)·E_{(x,y)~data}[D(p‖q)(y|x)] + λ·E_{x, y~q(·|x)}[D(p‖q)(y|x)], where D is any per-token
divergence and no gradient flows through sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from ...data.feedback import FeedbackTemplate
from ...exceptions import CheckpointError
from ...losses import token_divergence, token_logps
from ...losses.divergences import Divergence, TaidSchedule, resolve_divergence, taid
from ...losses.sampler_ratio import WEIGHT, weighted
from ...rollouts import AdaptiveProbability, ReplayBuffer, draws_on_policy
from ...rollouts.replay import parts_of, scored_rows, with_rows
from ...signals import TokenLogits, TokenSignal
from ..base import Batch
from ..rewarded.scoring import ADVANTAGE
from ..rewarded.trainer import OPD_WEIGHT, POLICY, RewardedTrainer
from .config import GKDConfig
from .feedback import AttemptFeedback, refuse_collator, without_feedback


class GKDTrainer(RewardedTrainer):
    """Matches the teacher's next-token distributions on dataset tokens, on the student's own, or on both.

    Eq. 3 of arXiv 2306.13649, with one draw of λ per optimiser step, the same on every process.
    """

    args: GKDConfig
    config_class = GKDConfig
    method_name = "GKD"
    paper = {
        "title": "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        "id": "2306.13649",
        "authors": "Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem",
        "year": "2024",
    }

    def set_up_method(self) -> None:
        super().set_up_method()
        self.on_policy_step = False
        self.lmbda = AdaptiveProbability(self.args.lmbda)
        self.replay = ReplayBuffer(self.args.replay_buffer_size) if self.args.replay_buffer_size else None
        self.divergence = resolve_divergence(self.args.divergence, **self.args.divergence_params())
        moves = self.args.divergence == "taid" and self.args.t is None
        self.taid_schedule = TaidSchedule() if moves else None
        self.feedback = self.build_feedback()

    def build_feedback(self) -> AttemptFeedback | None:
        """What the teacher is told of the student's attempts; None: nothing.

        Raises:
            ConfigurationError: a data collator of the user's, whose batches do not hold what it takes.
        """
        args, tokenizer = self.args, self.processing_class
        if args.feedback_template is None:
            return None
        refuse_collator(self.data_collator)
        return AttemptFeedback(
            FeedbackTemplate(args.feedback_template),
            args.feedback_kind,
            args.feedback_formats or (),
            keeps_right=args.feedback_right == "keep",
            max_length=args.teacher_max_length,
            student=tokenizer,
            teacher=self.requirements.teacher_tokenizer or tokenizer,
            pad_token_id=self.sampling.pad_token_id,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )

    @property
    def loss_weights(self) -> dict[str, float]:
        scale = self.args.kd_temperature**2 if self.args.tau_squared else 1.0
        weights = {"divergence": scale}
        if self.aligned_loss is not None:  # likelihoods of text, which `alm` compares, are not softened
            weights = {name: w * (1.0 if name == "alm" else scale) for name, w in self.aligned_loss.weights.items()}
        if self.is_rewarded:
            weights = {"divergence": scale * self.args.anchor_weight, POLICY: 1.0}
        # On the student's own samples −log q has zero expected gradient: nothing but noise.
        if self.args.lm_loss_weight and not (self.on_policy_step and self.model.training):
            weights["lm_loss"] = self.args.lm_loss_weight
        return weights

    def samples_at(self, step: int) -> bool:
        return self.must_sample(step) or draws_on_policy(self.lmbda.value, self.args.seed, step)

    def rollout(self, batches: list[Batch]) -> list[Batch]:
        """Return the dataset's rows, the student's own, or, from a replay buffer, what it wrote steps ago.

        One draw serves all of it, as in DistiLLM's own code: u < λ(1−t/T) samples, u < λ replays.
        """
        seed, step, rank = self.args.seed, self.state.global_step, self.accelerator.process_index
        self.on_policy_step = self.samples_at(step)
        if self.feedback is not None:
            return self._attempted(self.feedback, batches)
        if not self.on_policy_step:
            return batches
        if self.replay is None:
            return self.sample_completions(batches)
        window = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        sampling = self.lmbda.value * (1 - step / max(1, self.state.max_steps))
        if draws_on_policy(sampling, seed, step) or len(self.replay) < window:
            batches = self.sample_completions(batches)
            self.replay.push(gather_object(scored_rows(batches)), parts_of(batches))
            return batches
        rows = self.replay.sample(sum(len(b["prompt_ids"]) for b in batches), seed=seed, step=step, rank=rank)
        return with_rows(batches, rows, self.sampling.pad_token_id, self.args.pad_to_multiple_of)

    def _attempted(self, feedback: AttemptFeedback, batches: list[Batch]) -> list[Batch]:
        """Sample, and tell the teacher of what is wrong; given completions are nobody's attempt."""
        if not self.on_policy_step:
            return [without_feedback(batch) for batch in batches]
        batches, counts = feedback.added_to(self.sample_completions(batches))
        rows = counts.pop("rows")
        self.metrics.add_sums(trained_rows=counts.pop("trained_rows"))
        self.metrics.add_means(counts, rows)
        return batches

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if self.args.adaptive_rollouts and self.is_in_train:
            self.lmbda.evaluated(metrics["eval_loss"])
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.adaptive_rollouts and "loss" in logs:
            logs = {**logs, "lmbda": self.lmbda.value}
        super().log(logs, start_time)

    def after_step(self, loss: float) -> None:
        if self.taid_schedule is not None:
            self.taid_schedule.step(loss, self.state.global_step / self.state.max_steps)

    def _remembered(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"taid": self.taid_schedule, "replay": self.replay}
        parts["lmbda"] = self.lmbda if self.args.adaptive_rollouts else None
        return {name: part for name, part in parts.items() if part is not None}

    def method_state(self) -> dict[str, Any]:
        return super().method_state() | {name: part.state_dict() for name, part in self._remembered().items()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        for name, part in self._remembered().items():
            if name in state:
                part.load_state_dict(state[name])
        if self.args.sampler_correction != "none" and self.replay is not None:
            unknown = sum(len(row) == self.replay.parts for row in self.replay.rows)
            if unknown:
                raise CheckpointError(
                    f"Got a replay buffer with {unknown} rows without log-probabilities of their sampler; expected "
                    "them for all. Resume with `sampler_correction: none`, or start a new run from its weights."
                )

    def divergence_now(self) -> Divergence:
        """Return this step's divergence; evaluation takes a moving target at its end, so that scores compare."""
        if self.taid_schedule is None:
            return self.divergence
        schedule = self.taid_schedule
        return partial(taid, t=schedule.t if self.model.training else schedule.t_end)

    def distill_terms(
        self, student: TokenLogits, teacher: TokenSignal | None, tokens: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        assert teacher is not None
        if self.aligned_loss is not None:
            terms = self.aligned_loss.terms(student, teacher, tokens, self.divergence_now())
        else:
            divergence = token_divergence(self.divergence_now(), student, teacher, self.args.kd_temperature)
            terms = {"divergence": weighted(divergence, tokens[WEIGHT]) if WEIGHT in tokens else divergence}
        terms |= self.sampler_ratio.metrics(student, tokens)
        if OPD_WEIGHT in tokens:
            terms["divergence"] = tokens[OPD_WEIGHT] * terms["divergence"]
        if ADVANTAGE in tokens:
            terms |= self.policy_terms(student, teacher, tokens)
        if "lm_loss" in self.loss_weights:
            terms["lm_loss"] = -token_logps(student, tokens["labels"])
        return terms
