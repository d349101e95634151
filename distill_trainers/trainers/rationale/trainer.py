"""Rationale distillation: a teacher's chains of thought teach a student, which may answer without them.

Three objectives, each a sum of per-token cross-entropies with a token mean of its own:

    step_by_step  L = L_label + λ L_rationale                     Distilling Step-by-Step, arXiv 2305.02301, Eq. 4
    edit          L = (−Σ ω⁺ log q(y⁺) + Σ ω⁻ log q(y⁻)) / K      EDIT, arXiv 2405.19737, Eq. 6-7, over K key tokens
    dual_chain    L = a L_imitation + b L_answer + c L_innovation
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput

from ... import models
from ...data.rationales import RationaleCollator
from ...evaluation import Question, accuracy_metrics, accuracy_sums, answer_questions
from ...evaluation.accuracy import stated_answer, whole_text
from ...losses import resolve_divergence, token_divergence, token_logps, wrong_step_loss
from ...rollouts import local_engine
from ...signals import TeacherSignal, TokenLogits, TokenSignal
from ..base import Batch, DistillTrainer
from .config import RationaleConfig
from .student_chains import with_students_chains

logger = logging.getLogger(__name__)


class RationaleTrainer(DistillTrainer):
    """Trains on questions with rationales; a teacher is asked only for the optional divergence on the same tokens.

    Arguments are those of `DistillTrainer`. Rows have `question`, `answer` and `rationale`, for edit also
    `wrong_rationale`, and optionally `choices` and `task`.
    """

    args: RationaleConfig
    config_class = RationaleConfig
    method_name = "Rationale"
    paper = {
        "title": "Distilling Step-by-Step! Outperforming Larger Language Models with Less Training Data and Smaller "
        "Model Sizes",
        "id": "2305.02301",
        "authors": "Hsieh, Li, Yeh, Nakhost, Fujii, Ratner, Krishna, Lee, Pfister",
        "year": "2023",
    }

    def set_up_method(self) -> None:
        super().set_up_method()
        settings: Any = self.args.divergence_params or {}
        self.divergence = resolve_divergence(self.args.divergence, **settings)

    @property
    def loss_weights(self) -> dict[str, float]:
        return {name: weight for name, weight in self.args.uses.items() if weight}

    @property
    def loss_divisors(self) -> dict[str, str]:
        divisors = {name: f"token_{name}" for name in self.args.uses} | {"distillation": "token_given"}
        if self.args.objective == "edit":
            divisors |= {"right_steps": "token_key", "wrong_steps": "token_key", "imitation": "token_right"}
            divisors["wrong_logp"] = "token_wrong_key"
        elif self.args.objective == "dual_chain":
            divisors["imitation"] = "token_rationale"
        return divisors

    def distill_terms(
        self, student: TokenLogits, teacher: TokenSignal | None, tokens: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compute cross-entropies, each on the tokens of its own task and 0 elsewhere."""
        logps = token_logps(student, tokens["labels"])
        if self.args.objective == "step_by_step":
            terms = {name: -logps * tokens[f"token_{name}"] for name in ("label", "rationale")}
        elif self.args.objective == "edit":
            on_wrong = tokens["token_wrong_key"]
            wrong = wrong_step_loss(student, tokens["labels"], logps, self.args.wrong_term, self.args.wrong_floor)
            terms = {"right_steps": -logps * tokens["token_right_key"], "wrong_steps": wrong * on_wrong}
            terms |= {"imitation": -logps * tokens["token_right"], "wrong_logp": logps.detach() * on_wrong}
        else:
            parts = {"imitation": "rationale", "answer": "answer", "innovation": "innovation"}
            terms = {name: -logps * tokens[f"token_{entry}"] for name, entry in parts.items()}
        if self.args.distill_weight and teacher is not None:
            if self.aligned_loss is not None:
                divergence = self.aligned_loss.value(student, teacher, tokens, self.divergence)
            else:
                divergence = token_divergence(self.divergence, student, teacher, self.args.kd_temperature)
            terms["distillation"] = divergence * tokens["token_given"]
        # In evaluation a term without weight is a measure: edit's perplexity is that of right chains.
        unused = {name for name, weight in self.args.uses.items() if self.model.training and not weight}
        return {name: values for name, values in terms.items() if name not in unused}

    def teacher_signal(self, inputs: Batch, predicts: Tensor) -> TeacherSignal | None:
        """Ask only in evaluation a teacher that the loss does not need."""
        return super().teacher_signal(inputs, predicts) if self.args.needs or not self.model.training else None

    # ---- Rows and batches -------------------------------------------------------------------------------------------

    def build_collator(self, tokenizer: Any) -> Any:
        return RationaleCollator(
            tokenizer.pad_token_id,
            self.args.objective,
            with_others=self.args.with_others,
            with_prompts=self.requirements.samples_completions,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
            decoder_start=models.decoder_start(self.student_config),
        )

    def rollout(self, batches: list[Batch]) -> list[Batch]:
        """Add the student's own chains that reach the right answer in fewer tokens than the teacher's."""
        return with_students_chains(self, batches) if self.requirements.samples_completions else batches

    # ---- Evaluation -------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Answer the questions as well; the perplexity of edit is that of right chains."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        scores = dict(output.metrics or {})
        if self.args.objective == "edit":
            scores[f"{metric_key_prefix}_perplexity"] = math.exp(min(scores[f"{metric_key_prefix}_imitation"], 700))
        if self.args.eval_accuracy:
            accuracy = self.answer_accuracy(dataloader.dataset)
            scores = {f"{metric_key_prefix}_{name}": value for name, value in accuracy.items()} | scores
        self.last_eval_metrics.update(scores)
        return output._replace(metrics=scores)

    def answer_accuracy(self, dataset: Any) -> dict[str, float]:
        """Answer the questions of prepared rows greedily: the label task alone, or chains where those are trained."""
        args, accelerator = self.args, self.accelerator
        questions = [
            Question(row["input_ids"][: row["prompt_length"]], row["reference"], row["task"], row["choices"])
            for row in dataset
            if row["reference"]
        ][: args.eval_accuracy_samples]
        if not questions:
            logger.warning("No row of the evaluation set has an answer, so there is no accuracy.")
            return {}
        labels_only = args.objective == "step_by_step"
        rank, world = accelerator.process_index, accelerator.num_processes
        with models.generating(self.model_wrapped, accelerator) as model:
            answers = answer_questions(
                model,
                self.processing_class,
                questions,
                dataclasses.replace(self.sampling, temperature=0.0),
                parse=whole_text if labels_only else stated_answer(args.answer_formats or ()),
                kind=args.answer_kind,
                batch_size=args.rollout_batch_size or args.per_device_eval_batch_size,
                engine=local_engine(args.rollout_engine, self.processing_class),
                device=accelerator.device,
                rank=rank,
                world=world,
            )
        totals: Counter[str] = Counter()
        for sums in gather_object([accuracy_sums(questions[rank::world], answers)]):
            totals.update(sums)
        return accuracy_metrics(dict(totals))
