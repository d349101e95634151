"""Settings of rationale distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...answers.formats import find_format
from ...answers.verify import ANSWER_KINDS, check_kind
from ...data.rationales import OBJECTIVES, RationaleTemplates, RationaleTokenizer, prepare_rationales
from ...losses import DIVERGENCES, resolve_divergence
from ...losses.key_steps import WRONG_TERMS
from ...requirements import Requirements
from ...settings import documented, require, setting
from ..config import DistillConfig

_STYLES = ("auto", "text", "chat")


@documented
@dataclass
class RationaleConfig(DistillConfig):
    """Settings of `RationaleTrainer`."""

    learning_rate: float = setting(5e-5, "That of transformers; adapters take about ten times as much.")
    objective: str = setting("step_by_step", f"One of {', '.join(OBJECTIVES)}.")
    rationale_weight: float = setting(1.0, "λ of step_by_step: L = L_label + λ L_rationale.", least=0)
    alpha: float | None = setting(
        None, "Instead of λ: L = α L_label + (1 − α) L_rationale, 0 < α ≤ 1.", above=0, most=1
    )
    right_weight: float = setting(1.0, "ω⁺ of edit: weight of key steps of right chains.", least=0)
    wrong_weight: float = setting(0.025, "ω⁻ of edit: weight of key steps of wrong chains.", least=0)
    wrong_term: str = setting(
        "likelihood", f"Loss of wrong steps: {' (log q, to the floor) or '.join(WRONG_TERMS)} (−log(1 − q))."
    )
    wrong_floor: float = setting(-10.0, "Log-probability below which a wrong step is not pushed (likelihood).", below=0)
    imitation_weight: float | None = setting(
        None, "Weight of whole right chains: 1 in dual_chain and 0 in edit if not set.", least=0
    )
    answer_weight: float = setting(1.0, "Weight of the answer that ends a chain (dual_chain).", least=0)
    innovation_weight: float = setting(
        0.5, "Weight of the student's own right and shorter chains (dual_chain); 0 is off.", least=0
    )
    innovation_samples: int = setting(4, "Chains sampled per question and step (dual_chain).", least=1)
    distill_weight: float = setting(
        0.0, "Weight of a divergence from the teacher on the same tokens; 0 needs no teacher.", least=0
    )
    divergence: str = setting("forward_kl", f"Of distillation: {', '.join(DIVERGENCES)}.")
    divergence_params: dict[str, Any] | str | None = setting(
        None, "Parameters of the divergence, such as {beta: 0.1} (JSON)."
    )
    prompt_style: str = setting("auto", "text, chat, or auto: chat where the tokenizer has a template.")
    label_prompt: str | None = setting(None, "Asks for the answer; holds {question}.")
    rationale_prompt: str | None = setting(None, "Asks for the rationale; holds {question}.")
    chain_prompt: str | None = setting(None, "Asks for both; holds {question}.")
    chain_completion: str | None = setting(None, "Rationale and answer as one text; holds {rationale}, then {answer}.")
    answer_formats: list[str] | None = setting(
        None, "How answers of chains are found; by default hash, boxed, answer_is."
    )
    answer_kind: str = setting("auto", f"How answers are compared: {', '.join(ANSWER_KINDS)}.")
    eval_accuracy: bool = setting(True, "Answer the evaluation questions, and score that.")
    eval_accuracy_samples: int | None = setting(None, "Answer only so many of them.", least=1)

    may_be_infinite = DistillConfig.may_be_infinite | {"wrong_floor"}
    _VALID_DICT_FIELDS = DistillConfig._VALID_DICT_FIELDS + ["divergence_params"]

    @property
    def uses(self) -> dict[str, float]:
        """Terms of the objective, with their weights."""
        if self.objective == "step_by_step":
            label, rationale = (1.0, self.rationale_weight) if self.alpha is None else (self.alpha, 1 - self.alpha)
            weights = {"label": label, "rationale": rationale}
        elif self.objective == "edit":
            weights = {"right_steps": self.right_weight, "wrong_steps": self.wrong_weight}
            weights["imitation"] = self.imitation_weight or 0.0
        else:
            imitation = 1.0 if self.imitation_weight is None else self.imitation_weight
            weights = {"imitation": imitation, "answer": self.answer_weight, "innovation": self.innovation_weight}
        return {**weights, "distillation": self.distill_weight}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"distribution"} if self.distill_weight else ())

    @property
    def accepts_encoder_decoders(self) -> bool:  # type: ignore[override]  # it depends on the settings
        return self.objective == "step_by_step"

    @property
    def why_no_hidden_states(self) -> str:
        return "" if self.distill_weight else "`distill_weight: 0` asks no teacher in training (set it above 0 to ask)"

    why_no_packing = "the two tasks of a row lie in two sequences"
    why_one_teacher = why_no_packing

    @property
    def why_shared_tokenizer(self) -> str:
        if self.objective == "edit":
            return "single tokens of wrong chains are trained (`objective: edit`)"
        by_id = self.divergence == "logit_mse" and self.compares_distributions
        return "logits are compared id by id (`divergence: logit_mse`)" if by_id else ""

    @property
    def loss_terms(self) -> frozenset[str]:
        always = {"right_steps", "wrong_steps", "imitation"} if self.objective == "edit" else set()
        return frozenset(always | {name for name, weight in self.uses.items() if weight})

    @property
    def other_scores(self) -> frozenset[str]:
        accuracy = {"accuracy", "answered", "tokens_per_answer"} if self.eval_accuracy else set()
        return frozenset(accuracy | ({"wrong_logp"} if self.objective == "edit" else set()))

    @property
    def samples_completions(self) -> bool:
        return self.objective == "dual_chain" and self.innovation_weight > 0

    @property
    def needs_completions(self) -> bool:
        return True

    @property
    def sequences_of_row(self) -> int:
        """Two, or in `dual_chain` as many as are sampled: all of them may be kept."""
        sampled = self.innovation_samples if self.samples_completions else 0
        return 1 + self.with_others + sampled

    @property
    def with_others(self) -> bool:
        """Whether an example is two sequences: label and rationale, or right and wrong chain."""
        uses = self.uses
        return bool(uses.get("rationale") or uses.get("right_steps") or uses.get("wrong_steps"))

    def prepare_rows(self, dataset: Any, tokenizer: Any, name: str, wants: Requirements) -> Any:
        if "other_input_ids" in (getattr(dataset, "column_names", None) or []):
            return dataset
        templates = RationaleTemplates.of(
            self.prompt_style,
            tokenizer,
            label_prompt=self.label_prompt,
            rationale_prompt=self.rationale_prompt,
            chain_prompt=self.chain_prompt,
            chain_completion=self.chain_completion,
        )
        work = RationaleTokenizer(
            tokenizer,
            templates,
            self.objective,
            self.row_limit,
            reserve=self.max_new_tokens if wants.samples_completions else 0,
            separate=wants.encoder_decoder,
            chat_settings=self.chat_template_kwargs,  # type: ignore[arg-type]  # parsed by now
            teacher_prompts=None if wants.encoder_decoder else self.teacher_prompts(wants),
        )
        # Evaluation scores the first sequence of every row; in training an example may have the other one alone.
        either = self.with_others and name == "train"
        pairs_only = self.objective == "edit" and not self.imitation_weight
        return prepare_rationales(
            dataset,
            work,
            column_mapping=self.column_mapping,  # type: ignore[arg-type]  # parsed by now
            needs="other" if pairs_only else "any" if either else "first",
            with_others=self.with_others,
            num_proc=self.dataset_num_proc,
            name=name,
        )

    def _check(self) -> None:
        super()._check()
        self._require("objective", self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")
        self._require("prompt_style", self.prompt_style in _STYLES, f"one of {', '.join(_STYLES)}")
        self._require(
            "alpha",
            self.alpha is None or self.rationale_weight == 1,
            "either `alpha` or `rationale_weight`, which say the same in two ways (λ = (1 − α)/α, and L times α)",
        )
        self._require("objective", any(self.uses.values()), "some weight above 0")
        self._require("wrong_term", self.wrong_term in WRONG_TERMS, f"one of {', '.join(WRONG_TERMS)}")
        self._require(
            "teacher_cache",
            self.teacher_cache is None or self.distill_weight > 0,
            "none, or `distill_weight` above 0: no other term asks the teacher",
        )
        for name in ("label_prompt", "rationale_prompt", "chain_prompt"):
            prompt = getattr(self, name)
            require(prompt is None or "{question}" in prompt, name, prompt, "a text that holds {question}")
        chain = self.chain_completion
        self._require(
            "chain_completion",
            chain is None or 0 <= chain.find("{rationale}") < chain.find("{answer}"),
            "a text that holds {rationale} and, behind it, {answer}",
        )
        check_kind(self.answer_kind)
        for name in self.answer_formats or []:
            find_format(name)

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_divergence(self.divergence, **(self.divergence_params or {}))  # type: ignore[arg-type]  # parsed by now
