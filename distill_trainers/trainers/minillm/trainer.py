"""MiniLLM: Knowledge Distillation of Large Language Models (Gu et al., ICLR 2024).

arXiv 2306.08543:  L = KL(q‖p) of whole sequences (+ −log q of plain text), by the policy gradient of its eq. 2, split
into Single, the reverse KL of each token over the vocabulary, and Long, what a token does to all that follow it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...data import DistillCollator
from ...data.views import view_of
from ...losses import policy_gradient, token_divergence, token_entropy, token_logps
from ...losses.aligned import TEACHER_LOGPS, by_chunk, by_event
from ...losses.divergences import reverse_kl
from ...losses.reduction import IGNORE_INDEX, first_trained
from ...losses.sampler_ratio import (
    SAMPLED,
    SAMPLER_LOGPS,
    WEIGHT,
    SamplerRatio,
    sampler_weights,
    weighted,
)
from ...signals import TeacherSignal, TokenLogits, TokenLogprobs, TokenSignal, padded
from ..base import Batch
from ..rewarded.scoring import ADVANTAGE, without_reward_rows
from ..rewarded.trainer import RewardedTrainer
from .config import MiniLLMConfig
from .cycles import LOGPS, RolloutCycles
from .plain_text import SHAPE, PlainText
from .scoring import SIGNAL, check_mixture, sample_scored


class MiniLLMTrainer(RewardedTrainer):
    """Minimises the reverse KL of the student's own sequences to the teacher's (arXiv 2306.08543, algorithm 1).

    Args:
        pretraining_dataset: text for a language-model loss beside it, a `datasets.Dataset` of any layout that has
            something to train on. All other arguments are those of `DistillTrainer`.
    """

    args: MiniLLMConfig
    config_class = MiniLLMConfig
    method_name = "MiniLLM"
    paper = {
        "title": "MiniLLM: Knowledge Distillation of Large Language Models",
        "id": "2306.08543",
        "authors": "Gu, Dong, Wei, Huang",
        "year": "2024",
    }
    pretraining_dataset: Any = None

    def __init__(self, *args: Any, pretraining_dataset: Any = None, **kwargs: Any):
        self.pretraining_dataset = pretraining_dataset
        super().__init__(*args, **kwargs)

    def set_up_method(self) -> None:
        super().set_up_method()
        self.cycles = RolloutCycles(self, self.args.num_minibatches, self.args.num_inner_epochs)
        self.text: PlainText | None = None
        if self.reads_text:
            collator = DistillCollator(self.processing_class.pad_token_id, self.args.pad_to_multiple_of)
            rows = self.args.pretraining_batch_size or self.args.per_device_train_batch_size
            self.text = PlainText(self.pretraining_dataset, rows, collator, self.args.seed)
        if self.args.alpha:
            check_mixture(self.model, self.teacher)

    # ---- What the loss is made of -----------------------------------------------------------------------------------

    @property
    def loss_weights(self) -> dict[str, float]:
        anchor = self.anchor if self.model.training and self.args.estimator == "exact" else 1.0
        weights = {name: anchor * weight for name, weight in self.args.single_terms.items()}
        if self.args.lm_loss_weight and not (self.on_policy_step and self.model.training):
            weights["lm_loss"] = self.args.lm_loss_weight
        if self.model.training and self.args.objective == "sequence":
            weights["long"] = 1.0
        if self.model.training and self.text is not None:
            weights["pretraining"] = self.args.pretraining_weight
        return weights

    @property
    def loss_divisors(self) -> dict[str, str]:
        if not self.has_entries:
            return {}
        of_own = ("ratio", "clipped", *(("entropy",) if self.is_rewarded else ()))
        divisors = dict.fromkeys((*self.args.single_terms, "long", "lm_loss"), "token_unit")
        divisors |= dict.fromkeys(of_own, "token_own")
        return divisors if self.text is None else {**divisors, "pretraining": "token_text"}

    @property
    def reads_text(self) -> bool:
        """Whether there is text with a weight."""
        return self.pretraining_dataset is not None and self.args.pretraining_weight > 0

    @property
    def has_entries(self) -> bool:
        """Whether batches of training come with `token_*` entries."""
        return self.args.scores_rollouts or self.text is not None or self.args.loss_reduction == "sequence"

    def distill_terms(
        self, student: TokenLogits, teacher: TokenSignal | None, tokens: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Add `ratio` and `clipped`, how far the student is from the one that sampled; `entropy` with rewards."""
        terms: dict[str, Tensor] = {}
        own_mask: Tensor | float = tokens.get("token_own", 1.0)
        reads_given = "lm_loss" in self.loss_weights  # on the student's own samples it is no part of the loss
        if {"token_logps", "token_text"} & tokens.keys() or reads_given:
            logps = token_logps(student, tokens["labels"])
            if "token_logps" in tokens:
                terms |= self._surrogates(logps, tokens)
            if reads_given:
                terms["lm_loss"] = -logps * own_mask
            if "token_text" in tokens:
                terms["pretraining"] = -logps * tokens["token_text"]
        if self.is_rewarded:
            terms["entropy"] = own_mask * token_entropy(student)
        if self.aligned_loss is not None and self.args.estimator == "exact":
            terms |= self.aligned_loss.terms(student, teacher, tokens, reverse_kl)
        elif "single" not in terms:
            terms["single"] = self._exact_single(student, teacher, tokens)
        return terms | self.sampler_ratio.metrics(student, tokens)

    def _surrogates(self, logps: Tensor, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Terms whose gradient is that of the sampled tokens' log-probabilities.

        Where both are there, it is the sum of their advantages that is clipped: they are parts of one surrogate.
        """
        ratio = policy_gradient.probability_ratio(logps, tokens["token_logps"])
        advantages = {"long": tokens["token_long"]} if self.args.objective == "sequence" else {}
        if self.args.estimator == "sampled":
            advantages["single"] = tokens["token_single"]
        clip = self.args.clip_range
        total = torch.stack(list(advantages.values())).sum(0)
        bounded = policy_gradient.clipped_ratio(ratio, total, clip)
        terms = {name: -bounded * advantage for name, advantage in advantages.items()}
        clipped = policy_gradient.is_clipped(ratio, total, clip)
        return terms | {"ratio": tokens["token_own"] * ratio.detach(), "clipped": tokens["token_own"] * clipped}

    def _exact_single(self, student: TokenLogits, teacher: TokenSignal | None, tokens: Mapping[str, Tensor]) -> Tensor:
        """Reverse KL; log p − log q of given text where a teacher tells no more (evaluation alone comes to that)."""
        assert teacher is not None
        if TEACHER_LOGPS in tokens:  # of its own tokens of the text
            return tokens[TEACHER_LOGPS] - token_logps(student, tokens["labels"])
        if isinstance(teacher, TokenLogprobs):
            return teacher.values - token_logps(student, tokens["labels"])
        divergence = token_divergence("reverse_kl", student, teacher, self.args.kd_temperature)
        for weight in ("token_single", WEIGHT):
            divergence = weighted(divergence, tokens[weight]) if weight in tokens else divergence
        return divergence

    # ---- Rollouts and their scores ----------------------------------------------------------------------------------

    on_policy_step = True

    @property
    def sampled_step(self) -> int:
        return self.cycles.start if self.args.reuses_rollouts else super().sampled_step

    @property
    def anchor(self) -> float:
        """Weight of the reverse KL in the coming step."""
        return self.args.anchor_weight if self.rewards_have_begun else 1.0

    def next_batches(self, epoch_iterator: Iterator, num_batches: int) -> list[Batch]:
        if not self.args.reuses_rollouts:
            return super().next_batches(epoch_iterator, num_batches)
        return self.cycles.next_batches(epoch_iterator, num_batches, self.sample)

    def rollout(self, batches: list[Batch]) -> list[Batch]:
        self.on_policy_step = self.samples_at(self.state.global_step)
        if self.args.reuses_rollouts or not self.on_policy_step:
            return batches
        return self.sample(batches) if self.args.scores_rollouts else self.sample_completions(batches)

    def sample(self, batches: list[Batch]) -> list[Batch]:
        """Return scored rollouts for these batches; log what they tell about the student."""
        args, exact = self.args, self.args.estimator == "exact"
        batches = sample_scored(self, batches, args.alpha, keep_signal=exact and not args.reuses_rollouts)
        batches = self._rewarded(batches)
        for batch in batches:
            mask = batch["labels"] != IGNORE_INDEX
            student, sampler, teacher, *_ = batch[LOGPS].unbind(-1)
            rewards = policy_gradient.sequence_rewards(student, teacher, mask)
            _, weights = self._importance_weights(student, sampler, mask)
            tokens = {"reward": rewards.sum()}
            if args.alpha:
                shares = policy_gradient.mixture_share(teacher, sampler, args.alpha, mask)
                tokens["teacher_mix_share"] = shares.sum()
            self.metrics.add_means(tokens, mask.sum())
            self.metrics.add_means({"sequence_kl": -(weights * rewards).sum()}, len(mask))
        return batches

    def _rewarded(self, batches: list[Batch]) -> list[Batch]:
        """Add the rewards' advantages behind the log-probabilities of sampled tokens, with which they travel."""
        if self.rewards is None:
            return batches
        begin = self.args.begins_at(self.state.max_steps)
        if self.state.global_step >= begin:
            batches = self.rewards.added_to(batches)
        entries = [batch.get(ADVANTAGE, torch.zeros_like(batch[LOGPS][..., 0])) for batch in batches]
        return [
            {**batch, LOGPS: torch.cat([batch[LOGPS], entry.to(batch[LOGPS])[..., None]], dim=-1)}
            for batch, entry in zip(batches, entries, strict=True)
        ]

    def score(self, batches: list[Batch]) -> list[Batch]:
        """Add advantages and weights of the sampled tokens, and text below them."""
        batches = [without_reward_rows(batch) for batch in batches]
        if self.has_entries:
            batches = [self._scored(batch) for batch in batches]
        if self.args.objective == "sequence":
            self._log_advantages(batches)
        if self.text is not None:
            step, accumulated = self.state.global_step, self.args.gradient_accumulation_steps
            world, rank = self.accelerator.num_processes, self.accelerator.process_index
            batches = self.text.added_to(batches, step=step, accumulated=accumulated, world=world, rank=rank)
        return batches

    def _scored(self, batch: Batch) -> Batch:
        args, mask = self.args, batch["labels"] != IGNORE_INDEX
        own_mask = mask.float()
        unit = own_mask if args.loss_reduction == "token" else first_trained(batch["labels"]).float()
        batch = {**batch, "token_own": own_mask, "token_unit": unit}
        if not args.scores_rollouts:
            return {**batch, "token_single": own_mask}
        student, sampler, teacher, *told = batch.pop(LOGPS).unbind(-1)
        advantage = told.pop() if self.rewards is not None else None
        batch.pop(ADVANTAGE, None)
        scale, clip = args.reward_scale, args.reward_clip
        rewards = self._rewards(batch, student, teacher, mask, scale=scale, clip=clip)
        before, through = self._importance_weights(student, sampler, mask)
        long = policy_gradient.sequence_advantages(
            rewards, through, mask, args.importance, gamma=args.gamma, normalise=args.length_normalization
        )
        if advantage is not None:
            whole = policy_gradient.row_weights(through, mask) if self.weighs_prefixes else through
            long = self.anchor * long + args.reward_weight * whole * advantage
        if args.estimator == "sampled":
            single = self.anchor * through * rewards
        else:  # with a correction it is weighted in the loss, by the student as it is then
            single = before if args.sampler_correction == "none" else own_mask
        entries = {SAMPLER_LOGPS: told[0] if told else sampler, SAMPLED: own_mask}
        return {**batch, **entries, "token_logps": student, "token_long": long, "token_single": single}

    def _rewards(self, batch: Batch, student: Tensor, teacher: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        """Rewards of tokens; of a teacher with other tokens, those of stretches of text that both read as a whole.

        With objective token each token of a chunk has its chunk's, which no single one could be given.
        """
        if self.aligned_loss is None:
            return policy_gradient.sequence_rewards(student, teacher, mask, **settings)
        chunks, sides = batch["token_chunk"], (torch.where(mask, side, 0) for side in (student, teacher))
        if self.args.objective == "token":
            own, theirs = (by_chunk(side, chunks) for side in sides)
        else:
            own, theirs = (by_event(side, chunks, batch["token_comparable"], mask) for side in sides)
        return policy_gradient.sequence_rewards(own, theirs, mask, **settings)

    @property
    def weighs_prefixes(self) -> bool:
        """Whether weights are products along the row."""
        return "prefix" in (self.args.importance, self.args.sampler_correction)

    def _importance_weights(self, student: Tensor, sampler: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, of what tokens before and what tokens through t decide, by the one ratio that there is."""
        args = self.args
        if args.sampler_correction == "none":
            return policy_gradient.importance_weights(student, sampler, mask, args.importance)
        bounds = args.sampler_ratio_min, args.sampler_ratio_max
        return sampler_weights(student - sampler, mask, args.sampler_correction, *bounds)

    def build_sampler_ratio(self) -> SamplerRatio:
        """Hold the student itself against the sampler where rollouts are scored: policy gradients know no filters.

        Terms of sampled tokens have their weights from `score`; the exact Single gets them in the loss.
        """
        ratio = super().build_sampler_ratio()
        if not self.args.scores_rollouts:
            return ratio
        return replace(ratio, processed=None, kind=ratio.kind if self.args.estimator == "exact" else "none")

    def _log_advantages(self, batches: list[Batch]) -> None:
        """Their mean, and their deviation over the tokens of a step (of this process), averaged over steps."""
        values = torch.cat([batch["token_long"][batch["token_own"] > 0] for batch in batches])
        self.metrics.add_means({"advantage": values.sum()}, len(values))
        deviation = values.std(correction=0) if len(values) else 0.0  # rollouts may be empty, on some processes
        self.metrics.add_means({"advantage_std": deviation}, int(len(values) > 0))

    def teacher_signal(self, inputs: Batch, predicts: Tensor) -> TeacherSignal | None:
        """Ask once for each token of the student's, not of the text below; never again where it has answered."""
        if self.args.estimator == "sampled" and "token_logps" in inputs:
            return None
        rows, width = inputs.get(SHAPE, inputs["labels"].shape)
        signal: TeacherSignal | None = inputs.get(SIGNAL)
        if signal is None:
            rollouts = {name: inputs[name][:rows, :width] for name in ("input_ids", "attention_mask")}
            rollouts |= {name: inputs[name][:rows] for name in self.teacher.reads & inputs.keys()}
            view = view_of(inputs)
            view |= {name: entry[:rows, :width] for name, entry in view.items() if name.startswith("token_")}
            signal = super().teacher_signal(rollouts | view, predicts[:rows, : width - 1])
        return padded(signal, int(predicts.sum())) if signal is not None and SHAPE in inputs else signal

    # ---- Data and checkpoints ---------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        order = super()._get_train_sampler(train_dataset)
        return self.cycles.sampler(order) if self.args.reuses_rollouts else order

    def method_state(self) -> dict[str, Any]:
        cycle = {"cycle": self.cycles.state_dict()} if self.args.reuses_rollouts else {}
        return super().method_state() | cycle

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        self.cycles.load_state_dict(state.get("cycle", {}))
