"""Settings of MiniLLM, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...data import prepare_dataset
from ...exceptions import DatasetError
from ...losses import policy_gradient
from ...requirements import Requirements
from ...settings import documented, require, setting
from ..config import DistillConfig
from ..rewarded.settings import RewardSettings


@documented
@dataclass
class MiniLLMConfig(RewardSettings, DistillConfig):
    """Settings of `MiniLLMTrainer`."""

    learning_rate: float = setting(5e-6, "That of the paper's code; adapters take about ten times as much.")
    lr_scheduler_type: str = setting("constant_with_warmup", "Schedule; in the paper's code, too, the rate stays.")
    objective: str = setting(
        "sequence", "sequence: the reverse KL of whole sequences; token: that of each token by itself, without Long."
    )
    estimator: str = setting(
        "exact",
        "Single by the sum over the vocabulary (exact), or by the sampled tokens alone (sampled), for which a teacher "
        "has to know no more than their log-probabilities.",
    )
    lmbda: float = setting(
        1.0, "λ: with objective token, the probability that a step trains on student rollouts.", least=0, most=1
    )
    teacher_mix_alpha: float | None = setting(
        None,
        "α: share of the teacher in the sampler; if not set 0.2 (the paper's) for sequences, 0 for tokens.",
        least=0,
        below=1,
    )
    importance: str = setting(
        "token", "Weights of teacher-mixed samples: token (the paper's, biased) or prefix (exact)."
    )
    length_normalization: bool = setting(True, "Long takes the mean of the rewards that follow a token, not their sum.")
    gamma: float = setting(1.0, "γ: discount of rewards by their distance from the token.", least=0, most=1)
    reward_scale: float = setting(
        1.0,
        "Factor on the rewards log p − log q: those of Long alone with estimator exact, whose Single has none, and of "
        "both with sampled.",
        above=0,
    )
    reward_clip: float | None = setting(
        None, "Bound on the size of a scaled reward, in Long or in both as reward_scale.", above=0
    )
    clip_range: float | None = setting(
        0.2, "PPO: bound on how far q now / q at sampling may leave 1; null does not clip.", above=0
    )
    num_minibatches: int = setting(
        1, "Optimiser steps whose prompts are sampled in one go (the paper: 4 of 64 rows).", least=1
    )
    num_inner_epochs: int = setting(
        1, "How often each rollout is trained on (the paper: 4); 1 is strictly on-policy.", least=1
    )
    loss_reduction: str = setting(
        "token", "token: mean over tokens (the paper's code); sequence: sum of each row, mean over rows."
    )
    lm_loss_weight: float = setting(0.0, "With objective token: weight of −log q(y) of given completions.", least=0)
    pretraining_weight: float = setting(
        1.0, "Weight of −log q of the pretraining dataset's text; at 0 it is not read.", least=0
    )
    pretraining_batch_size: int | None = setting(
        None, "Rows of text beside each micro-batch; by default as many as it has.", least=1
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

    has_plain_text_loss = True
    weighs_samples = True

    @property
    def needs(self) -> frozenset[str]:
        kinds = {"token_logprobs" if self.estimator == "sampled" else "distribution"}
        return frozenset(kinds | ({"completions"} if self.alpha else set()))

    why_no_hidden_states = "the teacher is asked about a rollout once, ahead of the steps that train on it"
    why_no_packing = "the loss weighs whole rows"

    @property
    def why_no_views(self) -> str:
        mixes = f"student and teacher write one text behind one prompt (`teacher_mix_alpha: {self.alpha:g}`; 0 is off)"
        return mixes if self.alpha else ""

    @property
    def why_shared_tokenizer(self) -> str:
        if self.reward_names:
            return "rewards (`reward_funcs`) are weighed against the divergence of each sampled token"
        if self.alpha:
            return f"student and teacher sample one text together, token by token (`teacher_mix_alpha: {self.alpha:g}`)"
        if self.objective == "sequence" and self.estimator == "exact":
            return (
                "Single is a sum over one vocabulary (`objective: sequence`, `estimator: exact`; `estimator: sampled` "
                "takes likelihoods of text alone, `objective: token` the terms of `cross_tokenizer`)"
            )
        kind = self.sampler_correction
        return (
            f"weights of sampled tokens (`sampler_correction: {kind}`) are of one token each" if kind != "none" else ""
        )

    @property
    def compares_chunks(self) -> bool:
        return self.estimator == "exact"

    @property
    def why_one_teacher(self) -> str:
        reused = "rollouts that are reused (`num_inner_epochs`, `num_minibatches`) do not keep whose rows they are"
        return reused if self.reuses_rollouts else super().why_one_teacher

    @property
    def why_fixed_rows(self) -> str:
        reused = "rollouts are reused by steps of a fixed number of rows (`num_inner_epochs`, `num_minibatches`)"
        return reused if self.reuses_rollouts else ""

    @property
    def loss_terms(self) -> frozenset[str]:
        single = set(self.single_terms)
        return frozenset(single | ({"lm_loss"} if self.lm_loss_weight else set()))

    @property
    def single_terms(self) -> dict[str, float]:
        """Names and weights of what stands for Single: it is itself, unless it is a sum over two vocabularies."""
        return (self.aligned_terms if self.estimator == "exact" else {}) or {"single": 1.0}

    @property
    def follows_teacher_alone(self) -> bool:
        return not self.reward_names and not self.lm_loss_weight and not self.pretraining_weight

    @property
    def other_scores(self) -> frozenset[str]:
        return self.reward_scores

    @property
    def samples_completions(self) -> bool:
        return self.lmbda > 0

    @property
    def needs_completions(self) -> bool:
        return self.lmbda < 1

    def check_datasets(self, train: Any, evaluation: Any, text: Any, wants: Requirements) -> None:
        self.check_reward_rows(train, wants)
        if self.reuses_rollouts and train is not None and wants.streams_rows:
            raise DatasetError(
                f"Got a stream with `num_minibatches: {self.num_minibatches}` and `num_inner_epochs: "
                f"{self.num_inner_epochs}`; expected a `datasets.Dataset`, or 1 for both, since rollout "
                "batches of a stream cannot be counted."
            )
        if text is not None and self.pretraining_weight > 0 and not hasattr(text, "__len__"):
            raise DatasetError("Got a stream as `pretraining_dataset`; expected a `datasets.Dataset`.")

    def prepare_rows(self, dataset: Any, tokenizer: Any, name: str, wants: Requirements) -> Any:
        if name != "pretraining":
            return super().prepare_rows(dataset, tokenizer, name, wants)
        if not self.pretraining_weight:
            return dataset
        size, workers = self.max_length, self.dataset_num_proc
        return prepare_dataset(dataset, tokenizer, max_length=size, num_proc=workers, name=name)

    def __post_init__(self) -> None:
        super().__post_init__()
        split = self.accelerator_config.split_batches  # type: ignore[union-attr]  # parsed by now
        require(not self.reuses_rollouts or not split, "accelerator_config.split_batches", split, COUNTED)

    def check_rewarded(self) -> None:
        whole = "sequence with `reward_funcs`, which reward whole completions; for single tokens take the method gkd"
        self._require("objective", self.objective == "sequence", whole)
        always = "false: MiniLLM counts what a token does to later ones by itself (Long)"
        self._require("future_kl", not self.future_kl, always)
        self._require("token_weighting", self.token_weighting == "none", "none, or the method gkd")

    def _check(self) -> None:
        super()._check()
        for name, choices in CHOICES.items():
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        scored, alpha = self.scores_rollouts, self.alpha
        wants_rollouts = "1 with objective sequence or estimator sampled, which need the student's own text"
        self._require("lmbda", self.lmbda == 1 or not scored, wants_rollouts)
        mixes = "0 with objective token, which has no importance weights"
        require(alpha == 0 or self.objective == "sequence", "teacher_mix_alpha", alpha, mixes)
        loop = "decode: only its loop mixes the teacher in. Or set `teacher_mix_alpha: 0`"
        self._require("rollout_engine", alpha == 0 or self.rollout_engine == "decode", loop)
        one = "1 while the teacher is mixed in. Or set `teacher_mix_alpha: 0`"
        self._require("temperature", alpha == 0 or self.temperature == 1, one)
        if scored:
            self._require("temperature", self.temperature > 0, "a positive number: greedy text is no sample")
            for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
                value = getattr(self, name)
                require(value == off, name, value, f"{off}: tokens that are never drawn bias the policy gradient")
            self._require("kd_temperature", self.kd_temperature == 1, "1: rewards are at temperature 1")
            kind = self.sampler_correction
            products = "prefix with `sampler_correction: prefix`, and token with truncate and mask, which bound ratios"
            self._require("importance", kind == "none" or (kind == "prefix") == (self.importance == "prefix"), products)
        self.check_rewards()
        reused = "1 with objective token and estimator exact, which has no ratio that tells how old a rollout is"
        for name in ("num_minibatches", "num_inner_epochs"):
            self._require(name, scored or getattr(self, name) == 1, reused)
        for name in ("ignore_data_skip", "auto_find_batch_size"):
            self._require(name, not self.reuses_rollouts or not getattr(self, name), COUNTED)
        expected = "0 where no step trains on given completions (lmbda is 1). Pass a pretraining dataset instead"
        self._require("lm_loss_weight", self.lm_loss_weight == 0 or self.lmbda < 1, expected)
        room = f"less than max_length ({self.max_length}), which counts prompt and completion"
        fits = self.max_new_tokens < self.row_limit or self.lmbda == 0
        self._require("max_new_tokens", fits, room)


COUNTED = "false with num_minibatches or num_inner_epochs above 1: rollouts are reused by a fixed count of rows a step"
CHOICES = {
    "objective": ("sequence", "token"),
    "estimator": ("exact", "sampled"),
    "importance": policy_gradient.IMPORTANCE,
    "loss_reduction": ("token", "sequence"),
}
