"""MiniLLM: Knowledge Distillation of Large Language Models (Gu et al., ICLR 2024).

arXiv 2306.08543:  L = KL(q‖p) of whole sequences (+ −log q of plain text), by the policy gradient of its eq. 2, split
into Single, the reverse KL of each token over the vocabulary, and Long, what a token does to all that follow it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data import DistillCollator, prepare_dataset
from ..exceptions import DatasetError
from ..losses import policy_gradient, token_divergence, token_logps
from ..losses.reduction import IGNORE_INDEX
from ..rollouts import draws_on_policy
from ..signals import TeacherSignal, TokenLogits, TokenLogprobs, TokenSignal, padded
from .base import Batch, DistillTrainer
from .config import DistillConfig, require
from .cycles import LOGPS, RolloutCycles
from .pretraining import SHAPE, PlainText
from .scoring import SIGNAL, check_mixture, sample_scored


@dataclass
class MiniLLMConfig(DistillConfig):
    """Settings of `MiniLLMTrainer`; see each field's help."""

    objective: str = field(
        default="sequence",
        metadata={"help": "sequence: the KL of whole sequences; token: that of each token by itself, without Long."},
    )
    estimator: str = field(
        default="exact",
        metadata={
            "help": "Single by the sum over the vocabulary (exact), or by the sampled tokens alone (sampled), for "
            "which a teacher has to know no more than their log-probabilities."
        },
    )
    lmbda: float = field(
        default=1.0,
        metadata={"help": "λ: with objective token, the probability that a step trains on student rollouts."},
    )
    teacher_mix_alpha: float | None = field(
        default=None,
        metadata={"help": "α: share of the teacher in the sampler; 0.2 (the paper's) for sequences, 0 for tokens."},
    )
    importance: str = field(
        default="token",
        metadata={"help": "Weights of teacher-mixed samples: token (the paper's, biased) or prefix (exact)."},
    )
    length_normalization: bool = field(
        default=True, metadata={"help": "Long takes the mean of the rewards that follow a token, not their sum."}
    )
    gamma: float = field(default=1.0, metadata={"help": "γ: discount of rewards by their distance from the token."})
    reward_scale: float = field(
        default=1.0,
        metadata={
            "help": "Factor on the rewards log p − log q: those of Long alone with estimator exact, whose Single has "
            "none, and of both with sampled."
        },
    )
    reward_clip: float | None = field(
        default=None, metadata={"help": "Bound on the size of a scaled reward, in Long or in both as reward_scale."}
    )
    clip_range: float | None = field(
        default=0.2, metadata={"help": "PPO: bound on how far q now / q at sampling may leave 1; null does not clip."}
    )
    num_minibatches: int = field(
        default=1, metadata={"help": "Optimiser steps whose prompts are sampled in one go (the paper: 4 of 64 rows)."}
    )
    num_inner_epochs: int = field(
        default=1, metadata={"help": "How often each rollout is trained on (the paper: 4); 1 is strictly on-policy."}
    )
    loss_reduction: str = field(
        default="token",
        metadata={"help": "token: mean over tokens (the paper's code); sequence: sum of each row, mean over rows."},
    )
    lm_loss_weight: float = field(
        default=0.0, metadata={"help": "With objective token: weight of −log q(y) of given completions."}
    )
    pretraining_weight: float = field(
        default=1.0, metadata={"help": "Weight of −log q of the pretraining dataset's text; at 0 it is not read."}
    )
    pretraining_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of text beside each micro-batch; by default as many as it has."}
    )

    @property
    def alpha(self) -> float:
        """α in effect."""
        default = 0.2 if self.objective == "sequence" else 0.0
        return default if self.teacher_mix_alpha is None else self.teacher_mix_alpha

    @property
    def scores_rollouts(self) -> bool:
        """Whether the loss weighs sampled tokens by log-probabilities of them."""
        return self.objective == "sequence" or self.estimator == "sampled"

    @property
    def reuses_rollouts(self) -> bool:
        """Whether one rollout batch serves several optimiser steps."""
        return self.num_minibatches * self.num_inner_epochs > 1

    def __post_init__(self) -> None:
        super().__post_init__()
        split = self.accelerator_config.split_batches  # type: ignore[union-attr]  # parsed by now
        require(not self.reuses_rollouts or not split, "accelerator_config.split_batches", split, COUNTED)

    def _check(self) -> None:
        super()._check()
        for name, choices in CHOICES.items():
            require(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")
        scored, alpha = self.scores_rollouts, self.alpha
        require(0 <= self.lmbda <= 1, "lmbda", self.lmbda, "a probability in [0, 1]")
        wants_rollouts = "1 with objective sequence or estimator sampled, which need the student's own text"
        require(self.lmbda == 1 or not scored, "lmbda", self.lmbda, wants_rollouts)
        require(0 <= alpha < 1, "teacher_mix_alpha", alpha, "a share in [0, 1)")
        mixes = "0 with objective token, which has no importance weights"
        require(alpha == 0 or self.objective == "sequence", "teacher_mix_alpha", alpha, mixes)
        loop = "decode: only its loop mixes the teacher in. Or set `teacher_mix_alpha: 0`"
        require(alpha == 0 or self.rollout_engine == "decode", "rollout_engine", self.rollout_engine, loop)
        one = "1 while the teacher is mixed in. Or set `teacher_mix_alpha: 0`"
        require(alpha == 0 or self.temperature == 1, "temperature", self.temperature, one)
        if scored:
            require(
                self.temperature > 0, "temperature", self.temperature, "a positive number: greedy text is no sample"
            )
            for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
                value = getattr(self, name)
                require(value == off, name, value, f"{off}: tokens that are never drawn bias the policy gradient")
            require(self.kd_temperature == 1, "kd_temperature", self.kd_temperature, "1: rewards are at temperature 1")
        require(0 <= self.gamma <= 1, "gamma", self.gamma, "a number in [0, 1]")
        require(self.reward_scale > 0, "reward_scale", self.reward_scale, "a number above 0")
        for name in ("reward_clip", "clip_range"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a number above 0, or null")
        for name in ("num_minibatches", "num_inner_epochs", "pretraining_batch_size"):
            value = getattr(self, name)
            optional = value is None and name == "pretraining_batch_size"
            require(optional or (type(value) is int and value >= 1), name, value, "a whole number, at least 1")
        reused = "1 with objective token and estimator exact, which has no ratio that tells how old a rollout is"
        for name in ("num_minibatches", "num_inner_epochs"):
            require(scored or getattr(self, name) == 1, name, getattr(self, name), reused)
        for name in ("ignore_data_skip", "auto_find_batch_size"):
            require(not self.reuses_rollouts or not getattr(self, name), name, getattr(self, name), COUNTED)
        require(self.lm_loss_weight >= 0, "lm_loss_weight", self.lm_loss_weight, "0 or a positive number")
        given = "0 where no step trains on given completions (lmbda is 1). Pass a pretraining dataset instead"
        require(self.lm_loss_weight == 0 or self.lmbda < 1, "lm_loss_weight", self.lm_loss_weight, given)
        require(self.pretraining_weight >= 0, "pretraining_weight", self.pretraining_weight, "0 or a positive number")
        room = f"less than max_length ({self.max_length}), which counts prompt and completion"
        fits = self.max_new_tokens < self.max_length or self.lmbda == 0
        require(fits, "max_new_tokens", self.max_new_tokens, room)


COUNTED = "false with num_minibatches or num_inner_epochs above 1: rollouts are reused by a fixed count of rows a step"
CHOICES = {
    "objective": ("sequence", "token"),
    "estimator": ("exact", "sampled"),
    "importance": policy_gradient.IMPORTANCE,
    "loss_reduction": ("token", "sequence"),
}


class MiniLLMTrainer(DistillTrainer):
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
        self.cycles = RolloutCycles(self, self.args.num_minibatches, self.args.num_inner_epochs)
        self.text: PlainText | None = None
        if self.reads_text:
            collator = DistillCollator(self.processing_class.pad_token_id, self.args.pad_to_multiple_of)
            rows = self.args.pretraining_batch_size or self.args.per_device_train_batch_size
            self.text = PlainText(self.pretraining_dataset, rows, collator, self.args.seed)
        if self.args.alpha:
            check_mixture(self)

    # ---- What the loss is made of -----------------------------------------------------------------------------------

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        kinds = {"token_logprobs" if self.args.estimator == "sampled" else "distribution"}
        return frozenset(kinds | ({"completions"} if self.args.alpha else set()))

    @property
    def loss_weights(self) -> dict[str, float]:
        weights = {"single": 1.0}
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
        divisors = dict.fromkeys(("single", "long", "lm_loss"), "token_unit")
        divisors |= {"ratio": "token_own", "clipped": "token_own"}
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
        """`ratio` and `clipped` tell how far the student has moved from the one that sampled."""
        terms: dict[str, Tensor] = {}
        own: Tensor | float = tokens.get("token_own", 1.0)
        if {"token_logps", "token_text"} & tokens.keys() or self.args.lm_loss_weight:
            logps = token_logps(student, tokens["labels"])
            if "token_logps" in tokens:
                terms |= self._surrogates(logps, tokens)
            if self.args.lm_loss_weight:
                terms["lm_loss"] = -logps * own
            if "token_text" in tokens:
                terms["pretraining"] = -logps * tokens["token_text"]
        if "single" not in terms:
            terms["single"] = self._exact_single(student, teacher, tokens)
        return terms

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
        terms = {name: -bounded * each for name, each in advantages.items()}
        clipped = policy_gradient.is_clipped(ratio, total, clip)
        return terms | {"ratio": tokens["token_own"] * ratio.detach(), "clipped": tokens["token_own"] * clipped}

    def _exact_single(self, student: TokenLogits, teacher: TokenSignal | None, tokens: Mapping[str, Tensor]) -> Tensor:
        """Reverse KL; log p − log q of given text where a teacher tells no more (evaluation alone comes to that)."""
        assert teacher is not None
        if isinstance(teacher, TokenLogprobs):
            return teacher.values - token_logps(student, tokens["labels"])
        divergence = token_divergence("reverse_kl", student, teacher, self.args.kd_temperature)
        if "token_single" not in tokens:
            return divergence
        weights = tokens["token_single"]
        return torch.where(weights != 0, weights * divergence, 0)

    # ---- Rollouts and their scores ----------------------------------------------------------------------------------

    on_policy_step = True

    @property
    def samples_completions(self) -> bool:
        return self.args.lmbda > 0

    @property
    def needs_completions(self) -> bool:
        return self.args.lmbda < 1

    def next_batches(self, epoch_iterator: Iterator, num_batches: int) -> list[Batch]:
        if not self.args.reuses_rollouts:
            return super().next_batches(epoch_iterator, num_batches)
        return self.cycles.next_batches(epoch_iterator, num_batches, self.sample)

    def rollout(self, batches: list[Batch]) -> list[Batch]:
        seed, step = self.args.seed, self.state.global_step
        self.on_policy_step = draws_on_policy(self.args.lmbda, seed, step)
        if self.args.reuses_rollouts or not self.on_policy_step:
            return batches
        return self.sample(batches) if self.args.scores_rollouts else self.sample_completions(batches)

    def sample(self, batches: list[Batch]) -> list[Batch]:
        """Scored rollouts for these batches, and what they tell about the student."""
        args, exact = self.args, self.args.estimator == "exact"
        batches = sample_scored(self, batches, args.alpha, keep_signal=exact and not args.reuses_rollouts)
        for batch in batches:
            mask = batch["labels"] != IGNORE_INDEX
            student, sampler, teacher = batch[LOGPS].unbind(-1)
            rewards = policy_gradient.sequence_rewards(student, teacher, mask)
            _, weights = policy_gradient.importance_weights(student, sampler, mask, args.importance)
            tokens = {"reward": rewards.sum()}
            if args.alpha:
                shares = policy_gradient.mixture_share(teacher, sampler, args.alpha, mask)
                tokens["teacher_mix_share"] = shares.sum()
            self.metrics.add_means(tokens, mask.sum())
            self.metrics.add_means({"sequence_kl": -(weights * rewards).sum()}, len(mask))
        return batches

    def score(self, batches: list[Batch]) -> list[Batch]:
        """Advantages and weights of the sampled tokens; text below them."""
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
        own = mask.float()
        first = own * (mask.cumsum(1) == 1)
        batch = {**batch, "token_own": own, "token_unit": own if args.loss_reduction == "token" else first}
        if not args.scores_rollouts:
            return {**batch, "token_single": own}
        student, sampler, teacher = batch.pop(LOGPS).unbind(-1)
        shape: dict[str, Any] = {"scale": args.reward_scale, "clip": args.reward_clip}
        rewards = policy_gradient.sequence_rewards(student, teacher, mask, **shape)
        before, through = policy_gradient.importance_weights(student, sampler, mask, args.importance)
        how: dict[str, Any] = {"gamma": args.gamma, "normalise": args.length_normalization}
        long = policy_gradient.sequence_advantages(rewards, through, mask, args.importance, **how)
        single = before if args.estimator == "exact" else through * rewards
        return {**batch, "token_logps": student, "token_long": long, "token_single": single}

    def _log_advantages(self, batches: list[Batch]) -> None:
        """Their mean, and their deviation over the tokens of a step (of this process), averaged over steps."""
        values = torch.cat([batch["token_long"][batch["token_own"] > 0] for batch in batches])
        self.metrics.add_means({"advantage": values.sum()}, len(values))
        self.metrics.add_means({"advantage_std": values.std(correction=0)}, 1)

    def teacher_signal(self, inputs: Batch, predicts: Tensor) -> TeacherSignal | None:
        """Asked once for each token of the student's, not of the text below, and not again where it has spoken."""
        if self.args.estimator == "sampled" and "token_logps" in inputs:
            return None
        rows, width = inputs.get(SHAPE, inputs["labels"].shape)
        signal: TeacherSignal | None = inputs.get(SIGNAL)
        if signal is None:
            own = {name: inputs[name][:rows, :width] for name in ("input_ids", "attention_mask")}
            signal = super().teacher_signal(own, predicts[:rows, : width - 1])
        return padded(signal, int(predicts.sum())) if signal is not None and SHAPE in inputs else signal

    # ---- Data and checkpoints ---------------------------------------------------------------------------------------

    def check_datasets(self, train_dataset: Any, eval_dataset: Any) -> None:
        super().check_datasets(train_dataset, eval_dataset)
        if self.args.reuses_rollouts and train_dataset is not None and not hasattr(train_dataset, "__len__"):
            raise DatasetError(
                f"Got a stream with `num_minibatches: {self.args.num_minibatches}` and `num_inner_epochs: "
                f"{self.args.num_inner_epochs}`; expected a `datasets.Dataset`, or 1 for both, since rollout "
                "batches of a stream cannot be counted."
            )
        if self.reads_text and not hasattr(self.pretraining_dataset, "__len__"):
            raise DatasetError("Got a stream as `pretraining_dataset`; expected a `datasets.Dataset`.")

    def prepare_rows(self, dataset: Any, tokenizer: Any, name: str) -> Any:
        if name == "train" and self.reads_text:
            with self.args.main_process_first(desc="pretraining tokenisation"):
                self.pretraining_dataset = prepare_dataset(
                    self.pretraining_dataset,
                    tokenizer,
                    max_length=self.args.max_length,
                    num_proc=self.args.dataset_num_proc,
                    name="pretraining",
                )
        return super().prepare_rows(dataset, tokenizer, name)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        order = super()._get_train_sampler(train_dataset)
        return self.cycles.sampler(order) if self.args.reuses_rollouts else order

    def method_state(self) -> dict[str, Any]:
        return {"cycle": self.cycles.state_dict()} if self.args.reuses_rollouts else {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        self.cycles.load_state_dict(state.get("cycle", {}))
