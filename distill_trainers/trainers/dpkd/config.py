"""Settings of `DPKDTrainer`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import TrainingArguments

from ...data import prepare_pairs
from ...data.formats import first_row
from ...data.pairs import is_pair
from ...exceptions import ConfigurationError
from ...losses.preference import PREFERENCE_LOSSES
from ...requirements import Requirements
from ...settings import documented, require, setting, shown
from ..config import DistillConfig
from .guard import MODES

CONTRASTIVE = "contrastive_skew"
LOSS_TYPES = (*PREFERENCE_LOSSES, CONTRASTIVE)
_TRL_LOSSES = {
    "sigmoid": ("sigmoid", False),
    "hinge": ("hinge", False),
    "sigmoid_norm": ("sigmoid", True),
    "ipo": ("ipo", True),
}  # TRL's names to ours, and whether log-ratios are divided by lengths

_SCORES = frozenset(
    {"sequence_kl", "reward_accuracy", "reward_margin"}
    | {f"{name}_{side}" for name in ("nll", "reward") for side in ("chosen", "rejected")}
    | {"chosen_length", "rejected_length"}
)


@documented
@dataclass
class DPKDConfig(DistillConfig):
    """Settings of `DPKDTrainer`."""

    learning_rate: float = setting(1e-6, "That of TRL's DPO; adapters take about ten times as much.")
    loss_type: str = setting("sigmoid", f"Loss of a pair: one of {', '.join(LOSS_TYPES)}.")
    beta: float = setting(
        1.0,
        "β: scale of the implicit rewards. On fixed pairs the optimum moves away from the teacher like the power 1/β.",
        above=0,
    )
    length_normalized: bool = setting(True, "Divide the log-ratio of each response by its number of tokens.")
    lm_loss_weight: float | None = setting(
        None, "λ: weight of −log q of the chosen responses; if not set 1, and 0 for contrastive_skew.", least=0
    )
    reference: str = setting(
        "teacher", "Reference of the rewards: teacher (DPKD), or student, as it was before training (DPO)."
    )
    logprob_mse_weight: float = setting(
        0.0, "Weight of the squared difference of both models' mean log-probabilities of each response.", least=0
    )
    target_margin: float | None = setting(
        None, "γ of simpo, the margin from which a pair counts as learnt; 0.5 if not set.", least=0
    )
    chosen: str = setting(
        "teacher", "Of a dataset without pairs: take the teacher's responses, or the dataset's, as chosen."
    )
    refresh_steps: int = setting(
        1, "Sample rejected responses every so many optimiser steps and train on them until then.", least=1
    )
    replay_buffer_size: int | None = setting(
        None, "Pairs kept for the steps between; by default those of the last sampling step.", least=1
    )
    skew_alpha: float = setting(0.1, "α₀ of contrastive_skew: the largest skew.", least=0.01, below=1)
    contrastive_schedules: bool = setting(
        True, "contrastive_skew: adapt α to each response, and raise the rejected side's weight from ½ to ¾."
    )
    reference_logps_dir: str | None = setting(
        None,
        "With a dataset of pairs: keep the reference's log-probabilities here, so that a teacher given by name is "
        "loaded only for what is missing and for evaluation.",
    )
    bad_pairs: str = setting("error", "What happens to given pairs that cannot be trained on: error, or drop.")
    guard: str = setting("warn", f"When the student runs away from both responses: one of {', '.join(MODES)}.")
    guard_limit: float = setting(
        1.0, "Rise of the rejected NLL, in nats per token, that trips the guard if the chosen NLL is up.", above=0
    )

    @property
    def lm_weight(self) -> float:
        """`lm_loss_weight`, or its default for the loss."""
        if self.lm_loss_weight is not None:
            return self.lm_loss_weight
        return 0.0 if self.loss_type == CONTRASTIVE else 1.0

    @property
    def defers_teacher(self) -> bool:
        return self.reference_logps_dir is not None

    def _fill_in(self) -> None:
        if self.target_margin is None and self.loss_type == "simpo":
            self.target_margin = 0.5
        if self.reference_logps_dir is not None:
            self.reference_logps_dir = os.path.expanduser(self.reference_logps_dir)
        super()._fill_in()

    @property
    def loss_terms(self) -> frozenset[str]:
        terms = {"skew_chosen", "skew_rejected"} if self.loss_type == CONTRASTIVE else {"preference"}
        weights = {"lm_loss": self.lm_weight, "logprob_mse": self.logprob_mse_weight}
        return frozenset(terms | {name for name, weight in weights.items() if weight})

    @property
    def other_scores(self) -> frozenset[str]:
        return _SCORES

    why_no_hidden_states = "the loss compares log-probabilities of whole answers"
    why_no_packing = "a loss of whole rows compares the two of each pair"
    scores_all_text = False
    compares_chunks = False  # log-probabilities of responses are all that is compared

    @property
    def why_shared_tokenizer(self) -> str:
        if self.loss_type == CONTRASTIVE:
            return f"distributions of tokens are compared (`loss_type: {CONTRASTIVE}`)"
        kept = self.reference == "teacher" and self.reference_logps_dir is not None
        return "what is kept of the teacher is kept by the student's tokens (`reference_logps_dir`)" if kept else ""

    why_one_teacher = "the reference of its rewards is one model"

    sequences_of_row = 2  # both responses of a pair

    @property
    def why_fixed_rows(self) -> str:
        kept = "pairs that were kept, of any length, take the places of a batch's own (`refresh_steps`)"
        return kept if self.refresh_steps > 1 else ""

    @property
    def samples_completions(self) -> bool:
        """Where rows are prompts; a dataset of pairs is trained on as it is (see `requirements`)."""
        return True

    @property
    def needs_completions(self) -> bool:
        return self.chosen == "dataset"

    @property
    def replaces_completions(self) -> bool:
        return self.chosen == "teacher"

    may_be_infinite = DistillConfig.may_be_infinite | {"guard_limit"}
    stands_for = frozenset({"DPOConfig", "DPKDConfig"})
    reads_first_row = True

    @classmethod
    def taken_from(cls, args: TrainingArguments, changed: dict[str, Any]) -> dict[str, Any]:
        """Return what a `DPOConfig` of TRL says: log-ratios of whole responses, and no other loss beside them."""
        given = getattr(args, "loss_type", None)
        if not isinstance(given, list):
            return {}
        require(len(given) == 1 and given[0] in _TRL_LOSSES, "loss_type", given, f"one of {', '.join(_TRL_LOSSES)}")
        loss_type, normalized = _TRL_LOSSES[given[0]]
        values: dict[str, Any] = {"loss_type": loss_type, "length_normalized": normalized, "lm_loss_weight": 0.0}
        if changed.pop("precompute_ref_log_probs", False):
            values["reference_logps_dir"] = os.path.join(str(args.output_dir), "reference_logps")
        return values

    def requirements(self, first_row: Mapping[str, Any] | None = None) -> Requirements:
        wants = super().requirements(first_row)
        keeps = self.reference == "teacher" and self.reference_logps_dir is not None
        if self.has_pairs(first_row):
            wants = replace(wants, samples_completions=False, needs_completions=True, replaces_completions=False)
        return replace(wants, keeps_reference=keeps)

    def has_pairs(self, row: Mapping[str, Any] | None) -> bool:
        """Tell whether the dataset of this row has chosen and rejected responses."""
        return row is not None and is_pair(row, self.column_mapping)  # type: ignore[arg-type]  # parsed by now

    def check_datasets(self, train: Any, evaluation: Any, text: Any, wants: Requirements) -> None:
        if self.reference_logps_dir is not None and wants.samples_completions:
            raise ConfigurationError(
                f"Got `reference_logps_dir: {shown(self.reference_logps_dir)}` with a training dataset of prompts; "
                "expected one of pairs (chosen and rejected): the student's own responses are new at every step. Make "
                "pairs with `distill-trainers pairs`, or leave it out."
            )

    def prepare_rows(self, dataset: Any, tokenizer: Any, name: str, wants: Requirements) -> Any:
        if not self.has_pairs(first_row(dataset, name=name)):
            return super().prepare_rows(dataset, tokenizer, name, wants)
        return prepare_pairs(
            dataset,
            tokenizer,
            max_length=self.row_limit,
            column_mapping=self.column_mapping,  # type: ignore[arg-type]  # parsed by now
            chat_template_kwargs=self.chat_template_kwargs,  # type: ignore[arg-type]  # parsed by now
            num_proc=self.dataset_num_proc,
            drop_bad=self.bad_pairs == "drop",
            name=name,
            teacher_prompts=self.teacher_prompts(wants),
        )

    def answers_prompts(self, name: str, wants: Requirements) -> bool:
        # The student answers those of evaluation in any case.
        return name != "train" or super().answers_prompts(name, wants)

    def _check(self) -> None:
        super()._check()
        for name, allowed in (
            ("loss_type", LOSS_TYPES),
            ("reference", ("teacher", "student")),
            ("chosen", ("teacher", "dataset")),
            ("bad_pairs", ("error", "drop")),
            ("guard", MODES),
        ):
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        self._require(
            "target_margin",
            self.target_margin is None or self.loss_type == "simpo",
            "`loss_type: simpo` beside it, whose margin it is",
        )
        self._require(
            "length_normalized",
            self.length_normalized or self.loss_type != "simpo",
            "true with `loss_type: simpo`, whose rewards are per token",
        )
        self._require(
            "reference",
            self.reference == "teacher" or self.loss_type not in ("simpo", CONTRASTIVE),
            f"teacher with `loss_type: {self.loss_type}`, which compares with nothing else",
        )
        self._check_rows()

    def _check_rows(self) -> None:
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        self._require(
            "replay_buffer_size",
            self.replay_buffer_size is None or (self.replay_buffer_size >= rows and self.refresh_steps > 1),
            f"at least the {rows} pairs of a step, with refresh_steps above 1",
        )
        self._require(
            "reference_logps_dir",
            self.reference_logps_dir is None or self.loss_type not in ("simpo", CONTRASTIVE),
            f"another loss_type than {self.loss_type}, which has no use for it",
        )
        self._require(
            "kd_temperature",
            self.kd_temperature == 1 or self.loss_type == CONTRASTIVE,
            f"1 with `loss_type: {self.loss_type}`: log-probabilities of responses are not softened",
        )
        self._require(
            "teacher_cache_kind",
            self.teacher_cache_kind in ("hidden", "token_logprobs"),
            "hidden or token_logprobs: the others do not hold the log-probability of every token",
        )
        self._require(
            "assistant_only_loss", not self.assistant_only_loss, "false: a pair differs in its last turn alone"
        )
