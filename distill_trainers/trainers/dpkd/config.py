"""Settings of `DPKDTrainer`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...data import prepare_pairs
from ...data.formats import first_row
from ...data.pairs import is_pair
from ...exceptions import ConfigurationError
from ...losses.preference import PREFERENCE_LOSSES
from ...requirements import Requirements
from ..config import DistillConfig, require
from .guard import MODES

CONTRASTIVE = "contrastive_skew"
LOSS_TYPES = (*PREFERENCE_LOSSES, CONTRASTIVE)


@dataclass
class DPKDConfig(DistillConfig):
    """Settings of `DPKDTrainer`; see each field's help."""

    loss_type: str = field(default="sigmoid", metadata={"help": f"Loss of a pair: one of {', '.join(LOSS_TYPES)}."})
    beta: float = field(
        default=1.0,
        metadata={
            "help": "β: scale of the implicit rewards. On fixed pairs the optimum moves away from the teacher like the "
            "power 1/β."
        },
    )
    length_normalized: bool = field(
        default=True, metadata={"help": "Divide the log-ratio of each response by its number of tokens."}
    )
    lm_loss_weight: float | None = field(
        default=None,
        metadata={"help": "λ: weight of −log q of the chosen responses; if not set 1, and 0 for contrastive_skew."},
    )
    reference: str = field(
        default="teacher",
        metadata={"help": "Reference of the rewards: teacher (DPKD), or student, as it was before training (DPO)."},
    )
    logprob_mse_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the squared difference of both models' mean log-probabilities of each response."},
    )
    target_margin: float | None = field(
        default=None, metadata={"help": "γ of simpo, the margin from which a pair counts as learnt; 0.5 if not set."}
    )
    chosen: str = field(
        default="teacher",
        metadata={"help": "Of a dataset without pairs: take the teacher's responses, or the dataset's, as chosen."},
    )
    refresh_steps: int = field(
        default=1,
        metadata={"help": "Sample rejected responses every so many optimiser steps and train on them until then."},
    )
    replay_buffer_size: int | None = field(
        default=None,
        metadata={"help": "Pairs kept for the steps between; by default those of the last sampling step."},
    )
    skew_alpha: float = field(default=0.1, metadata={"help": "α₀ of contrastive_skew: the largest skew."})
    contrastive_schedules: bool = field(
        default=True,
        metadata={
            "help": "contrastive_skew: adapt α to each response, and raise the rejected side's weight from ½ to ¾."
        },
    )
    reference_logps_dir: str | None = field(
        default=None,
        metadata={
            "help": "With a dataset of pairs: keep the reference's log-probabilities here, so that a teacher given by "
            "name is loaded only for what is missing and for evaluation."
        },
    )
    bad_pairs: str = field(
        default="error",
        metadata={"help": "What happens to given pairs that cannot be trained on: error, or drop."},
    )
    guard: str = field(
        default="warn",
        metadata={"help": f"When the student runs away from both responses: one of {', '.join(MODES)}."},
    )
    guard_limit: float = field(
        default=1.0,
        metadata={"help": "Rise of the rejected NLL, in nats per token, that trips the guard if the chosen NLL is up."},
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

    def __post_init__(self) -> None:
        if self.target_margin is None and self.loss_type == "simpo":
            self.target_margin = 0.5
        if self.reference_logps_dir is not None:
            self.reference_logps_dir = os.path.expanduser(self.reference_logps_dir)
        super().__post_init__()

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

    def requirements(self, first_row: Mapping[str, Any] | None = None, *, streams: bool = False) -> Requirements:
        wants = super().requirements(first_row, streams=streams)
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
                f"Got `reference_logps_dir: {self.reference_logps_dir}` with a training dataset of prompts; "
                "expected one of pairs (chosen and rejected): the student's own responses are new at every step. Make "
                "pairs with `distill-trainers pairs`, or leave it out."
            )

    def prepare_rows(self, dataset: Any, tokenizer: Any, name: str, wants: Requirements) -> Any:
        if not self.has_pairs(first_row(dataset, name=name)):
            return super().prepare_rows(dataset, tokenizer, name, wants)
        return prepare_pairs(
            dataset,
            tokenizer,
            max_length=self.max_length,
            column_mapping=self.column_mapping,  # type: ignore[arg-type]  # parsed by now
            chat_template_kwargs=self.chat_template_kwargs,  # type: ignore[arg-type]  # parsed by now
            num_proc=self.dataset_num_proc,
            drop_bad=self.bad_pairs == "drop",
            name=name,
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
            value = getattr(self, name)
            require(value in allowed, name, value, f"one of {', '.join(allowed)}")
        require(self.beta > 0, "beta", self.beta, "a positive number")
        require(self.lm_weight >= 0, "lm_loss_weight", self.lm_loss_weight, "0 or a positive number")
        require(self.logprob_mse_weight >= 0, "logprob_mse_weight", self.logprob_mse_weight, "0 or a positive number")
        require(self.guard_limit > 0, "guard_limit", self.guard_limit, "a positive number of nats per token")
        require(self.refresh_steps >= 1, "refresh_steps", self.refresh_steps, "1 (every step) or more")
        require(0.01 <= self.skew_alpha < 1, "skew_alpha", self.skew_alpha, "a number from 0.01 to 1")
        require(
            self.target_margin is None or self.loss_type == "simpo",
            "target_margin",
            self.target_margin,
            "`loss_type: simpo` beside it, whose margin it is",
        )
        require(
            self.length_normalized or self.loss_type != "simpo",
            "length_normalized",
            False,
            "true with `loss_type: simpo`, whose rewards are per token",
        )
        require(
            self.reference == "teacher" or self.loss_type not in ("simpo", CONTRASTIVE),
            "reference",
            self.reference,
            f"teacher with `loss_type: {self.loss_type}`, which compares with nothing else",
        )
        self._check_rows()

    def _check_rows(self) -> None:
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        require(
            self.replay_buffer_size is None or (self.replay_buffer_size >= rows and self.refresh_steps > 1),
            "replay_buffer_size",
            self.replay_buffer_size,
            f"at least the {rows} pairs of a step, with refresh_steps above 1",
        )
        require(
            self.reference_logps_dir is None or self.loss_type not in ("simpo", CONTRASTIVE),
            "reference_logps_dir",
            self.reference_logps_dir,
            f"another loss_type than {self.loss_type}, which has no use for it",
        )
        require(
            self.kd_temperature == 1 or self.loss_type == CONTRASTIVE,
            "kd_temperature",
            self.kd_temperature,
            f"1 with `loss_type: {self.loss_type}`: log-probabilities of responses are not softened",
        )
        require(
            self.teacher_cache_kind == "hidden",
            "teacher_cache_kind",
            self.teacher_cache_kind,
            "hidden: the others do not hold the log-probability of every token",
        )
        require(
            not self.assistant_only_loss, "assistant_only_loss", True, "false: a pair differs in its last turn alone"
        )
