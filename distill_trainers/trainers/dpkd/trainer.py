"""Direct Preference Knowledge Distillation for Large Language Models (Li, Gu, Dong, Wang, Cheng, Wei, 2024).

arXiv 2406.19774:  L = −E log σ( (β/|y_w|)·log[q(y_w)/p(y_w)] − (β/|y_l|)·log[q(y_l)/p(y_l)] ) + λ·L_LM, where y_w
is the teacher's response to a prompt and y_l the student's. The reference of the implicit rewards is the teacher p.

With y_l sampled from the student as it is, q = p is a stationary point. With y_l fixed samples of some s the optimum is
q ∝ p·(p/s)^{1/β} (without length normalisation), which is why the defaults sample anew, anchor and keep β large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...data import PairCollator
from ...exceptions import ConfigurationError
from ...losses.preference import (
    PREFERENCE_LOSSES,
    adaptive_skew,
    contrastive_skew,
    contrastive_weight,
    implicit_rewards,
    logprob_mse,
)
from ...losses.reduction import mean_per_row, sum_per_row
from ...signals import TeacherSignal, TokenLogits
from ...teachers.local import reference_fingerprint, weights_fingerprint
from ..base import Batch, DistillTrainer
from ..lifecycle.metrics import StepMeans
from .config import CONTRASTIVE, DPKDConfig
from .guard import CollapseGuard
from .references import ReferenceKeeper, reference_of, source_fingerprint
from .responses import FirstResponses, StudentResponses, with_student_responses

_ON_PAIRS: tuple[str, ...] = (
    "preference",
    "logprob_mse",
    "reward_chosen",
    "reward_rejected",
    "reward_margin",
    "reward_accuracy",
)
_ON_PAIRS += ("chosen_length", "rejected_length", "gap_chosen", "gap_rejected", "sequence_kl")
_ON_CHOSEN = ("lm_loss", "nll_chosen", "skew_chosen", "nll", "teacher_nll", "kl", "top1_agreement", "acceptance")
_ON_REJECTED = ("nll_rejected", "skew_rejected")
_DIVISORS = {
    **dict.fromkeys(_ON_PAIRS, "token_pair"),
    **dict.fromkeys(_ON_CHOSEN, "token_chosen"),
    **dict.fromkeys(_ON_REJECTED, "token_rejected"),
}


class DPKDTrainer(DistillTrainer):
    """Learns from pairs: the teacher's response over the student's own, or the chosen over the rejected of a dataset.

    A dataset with `chosen` and `rejected` is trained on as it is. Any other gives prompts: the teacher answers each
    once (or, with `chosen: dataset`, its completions are the chosen side), the student every `refresh_steps` anew.
    """

    args: DPKDConfig
    config_class = DPKDConfig
    method_name = "DPKD"
    has_row_terms = True
    paper = {
        "title": "Direct Preference Knowledge Distillation for Large Language Models",
        "id": "2406.19774",
        "authors": "Li, Gu, Dong, Wang, Cheng, Wei",
        "year": "2024",
    }

    def make_student(self, source: Any, trains: bool = True) -> Any:
        self.source_weights = source_fingerprint(source)
        return super().make_student(source, trains)

    def set_up_method(self) -> None:
        super().set_up_method()
        args = self.args
        self.metrics = StepMeans(args.device, ("gap_chosen", "gap_rejected"))
        self.skew_gaps = {"gap_chosen": 0.0, "gap_rejected": 0.0}  # m of DistiLLM-2, of the step before
        self.written_by = weights_fingerprint(self.model)  # the student whose responses evaluation takes
        self.began_as = reference_fingerprint(self.model) if args.reference == "student" else None
        self.references = reference_of(
            self, self.student_source, self.teacher_source, self.source_weights, self.quantization
        )
        for kind in (CollapseGuard, FirstResponses, ReferenceKeeper):  # of the student before
            self.remove_callback(kind)
        self.guard = CollapseGuard(args.guard, args.guard_limit)
        self.responses: StudentResponses | None = None
        self.add_callback(self.guard)
        self.add_callback(FirstResponses(self))
        if self.references is not None:
            self.add_callback(ReferenceKeeper(self.references))
        if self.requirements.samples_completions:
            window = args.per_device_train_batch_size * args.gradient_accumulation_steps
            capacity = args.replay_buffer_size or window * self.accelerator.num_processes
            self.responses = StudentResponses(self, args.refresh_steps, capacity)

    # ---- Data -------------------------------------------------------------------------------------------------------

    def build_collator(self, tokenizer: Any) -> PairCollator:
        with_prompts = self.requirements.samples_completions
        return PairCollator(tokenizer.pad_token_id, self.args.pad_to_multiple_of, with_prompts=with_prompts)

    def get_train_dataloader(self) -> Any:
        self.complete_train()
        if self.references is not None:
            self.references.fill(self.train_dataset)
        return super().get_train_dataloader()

    def complete_eval(self, dataset: Any) -> Any:
        if "rejected_ids" in dataset.column_names:
            return dataset
        return with_student_responses(self, dataset, self.written_by)

    # ---- One step ---------------------------------------------------------------------------------------------------

    def rollout(self, batches: list[Batch]) -> list[Batch]:
        return batches if self.responses is None else self.responses.pairs(batches)

    def score(self, batches: list[Batch]) -> list[Batch]:
        return [self._with_reference(batch) for batch in batches]

    def _with_reference(self, batch: Batch) -> Batch:
        if self.references is None or self.args.loss_type == "simpo":
            return batch
        return {**batch, "token_reference": self.references.of(batch)}

    def prediction_step(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        inputs = self._with_reference(self._prepare_inputs(inputs))
        return super().prediction_step(model, inputs, *args, **kwargs)

    def teacher_signal(self, inputs: Batch, predicts: Tensor) -> TeacherSignal | None:
        return super().teacher_signal(inputs, predicts) if self._asks_teacher(inputs) else None

    def _asks_teacher(self, inputs: Batch) -> bool:
        if not self.model.training or self.args.loss_type == CONTRASTIVE:
            return True
        if "token_reference" in inputs:
            return self.args.reference == "student" and self.args.logprob_mse_weight > 0
        return self.args.loss_type != "simpo" or self.args.logprob_mse_weight > 0

    @property
    def loss_weights(self) -> dict[str, float]:
        args = self.args
        weights: dict[str, float] = {"preference": 1.0}
        if args.loss_type == CONTRASTIVE:
            share = self.contrastive_share()
            weights = {"skew_chosen": (1 - share) / 2, "skew_rejected": share / 2}
        if args.lm_weight:
            weights["lm_loss"] = args.lm_weight
        if args.logprob_mse_weight:
            weights["logprob_mse"] = args.logprob_mse_weight
        return weights

    @property
    def loss_divisors(self) -> dict[str, str]:
        return _DIVISORS

    def contrastive_share(self) -> float:
        """Return b of DistiLLM-2, the rejected side's weight; in evaluation its last value: steps compare."""
        if not self.args.contrastive_schedules:
            return 0.5
        steps = self.state.max_steps
        return contrastive_weight(self.state.global_step / steps if self.model.training and steps > 0 else 1.0)

    def row_terms(
        self, logps: Tensor, teacher_logps: Tensor | None, tokens: Mapping[str, Tensor], num_rows: int
    ) -> dict[str, Tensor]:
        args, row, pairs = self.args, tokens["row"], num_rows // 2
        per_row = lambda values: sum_per_row(values, row, num_rows)  # noqa: E731
        at_pair = lambda values: values[row % pairs] * tokens["token_pair"].to(values.dtype)  # noqa: E731
        chosen, rejected = tokens["token_chosen"].to(logps.dtype), tokens["token_rejected"].to(logps.dtype)
        lengths, sums = per_row(torch.ones_like(logps)), per_row(logps)
        reference = None if args.loss_type == "simpo" else tokens.get("token_reference", teacher_logps)
        rewards = implicit_rewards(
            sums,
            None if reference is None else per_row(reference.to(logps.dtype)),
            lengths,
            beta=args.beta,
            length_normalized=args.length_normalized,
        )
        margin = rewards[:pairs] - rewards[pairs:]
        terms = {
            "nll_chosen": -logps.detach() * chosen,
            "nll_rejected": -logps.detach() * rejected,
            "reward_chosen": at_pair(rewards[:pairs].detach()),
            "reward_rejected": at_pair(rewards[pairs:].detach()),
            "reward_margin": at_pair(margin.detach()),
            "reward_accuracy": at_pair((margin.detach() > 0).to(margin.dtype)),
            "chosen_length": at_pair(lengths[:pairs]),
            "rejected_length": at_pair(lengths[pairs:]),
        }
        if args.lm_weight:
            terms["lm_loss"] = -logps * chosen
        if args.loss_type != CONTRASTIVE:
            preference = PREFERENCE_LOSSES[args.loss_type](args.beta, args.target_margin or 0.0)
            terms["preference"] = at_pair(preference(margin))
        elif args.contrastive_schedules and self.model.training:
            assert teacher_logps is not None
            student, teacher = mean_per_row(sums.detach(), lengths), mean_per_row(per_row(teacher_logps), lengths)
            terms |= self._skews(student, teacher, row, at_pair)
        if args.logprob_mse_weight:
            known = tokens["token_reference"] if teacher_logps is None else teacher_logps
            errors = logprob_mse(sums, per_row(known.to(logps.dtype)), lengths)
            terms["logprob_mse"] = at_pair((errors[:pairs] + errors[pairs:]) / 2)
        return terms

    def _skews(self, student: Tensor, teacher: Tensor, row: Tensor, at_pair: Any) -> dict[str, Tensor]:
        """α of each token's row, and the gaps whose mean the next step takes for m; from mean log-probabilities."""
        pairs = len(student) // 2
        gaps = teacher.exp() - student.exp()
        sides = {"gap_chosen": gaps[:pairs], "gap_rejected": -gaps[pairs:]}
        alphas = [adaptive_skew(gap, self.skew_gaps[name], self.args.skew_alpha) for name, gap in sides.items()]
        return {"token_alpha": torch.cat(alphas)[row], **{name: at_pair(gap) for name, gap in sides.items()}}

    def distill_terms(
        self, student: TokenLogits, teacher: TokenLogits | None, tokens: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if self.args.loss_type != CONTRASTIVE:
            return {}
        assert teacher is not None
        alpha = tokens.get("token_alpha", self.args.skew_alpha)
        return contrastive_skew(student, teacher, tokens["token_chosen"], alpha, self.args.kd_temperature)

    def agreement_terms(
        self, student: TokenLogits, teacher: TokenLogits, tokens: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Do as every method, on the chosen responses alone; add KL(p‖q) of responses, summed over tokens."""
        chosen = tokens["token_chosen"]
        measures = super().agreement_terms(student, teacher, tokens)
        terms = {name: values * chosen.to(values.dtype) for name, values in measures.items()}
        kl = {"sequence_kl": terms["kl"]} if "kl" in terms else {}  # none of a teacher with other ids
        return {**terms, **kl, "tokens": chosen}

    def after_step(self, loss: float) -> None:
        if self.args.loss_type == CONTRASTIVE and self.args.contrastive_schedules:
            assert isinstance(self.metrics, StepMeans)
            self.skew_gaps |= self.metrics.read_step(self.accelerator)

    # ---- Checkpoints ------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"guard": self.guard.state_dict(), "gaps": self.skew_gaps}
        state |= {"written_by": self.written_by, "reference": self.began_as}
        if self.responses is not None and self.args.refresh_steps > 1:
            state["replay"] = self.responses.kept.state_dict()
        return state

    def load_method_state(self, state: dict[str, Any]) -> None:
        if "guard" not in state:
            return
        if None not in (state.get("reference"), self.began_as) and state["reference"] != self.began_as:
            raise ConfigurationError(
                "Got another student than the run to be resumed began with, which is its reference (`reference: "
                "student`); expected the same one as `model`. A checkpoint of the run is not it: its weights are "
                "loaded from `resume_from_checkpoint` all the same."
            )
        self.guard.load_state_dict(state["guard"])
        self.skew_gaps, self.written_by = dict(state["gaps"]), state["written_by"]
        if self.responses is not None and "replay" in state:
            self.responses.kept.load_state_dict(state["replay"])
