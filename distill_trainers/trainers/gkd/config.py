"""Settings of GKD."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from transformers import TrainingArguments

from ...answers.verify import ANSWER_KINDS, check_kind
from ...data.feedback import DEFAULT_FEEDBACK, FeedbackRows, FeedbackTemplate
from ...evaluation.accuracy import answer_parser
from ...exceptions import ConfigurationError
from ...losses.divergences import DIVERGENCES, resolve_divergence
from ...requirements import Requirements
from ...settings import documented, setting
from ..config import DistillConfig
from ..rewarded.settings import RewardSettings
from .feedback import WHEN_RIGHT


@documented
@dataclass
class GKDConfig(RewardSettings, DistillConfig):
    """Settings of `GKDTrainer`."""

    learning_rate: float = setting(2e-5, "That of TRL's GKD and SFT; adapters take about ten times as much.")
    lmbda: float = setting(
        0.5, "λ: probability that an optimiser step trains on student rollouts; 0 never samples.", least=0, most=1
    )
    divergence: str = setting("jsd", f"Per-token divergence: one of {', '.join(DIVERGENCES)}.")
    beta: float | None = setting(None, "β of jsd: weight of the teacher in the mixture; 0.5 if not set.")
    alpha: float | None = setting(None, "α of the skew divergences; 0.1 if not set.")
    kl_weight: float | None = setting(
        None, "λ of lk: weight of KL(p‖q) beside 1 − λ of the total variation; 0.5 if not set."
    )
    mu: float | None = setting(None, "μ of adaptive_kl: mass of the teacher's head; 0.5 if not set.")
    t: float | None = setting(
        None, "t of taid: fixed share of the teacher in the target; by default it rises from 0.4 to 1."
    )
    replay_buffer_size: int = setting(
        0,
        "Keep this many student completions and train on them again (DistiLLM; 1000 there): with probability λ·(1 − "
        "t/T) a step samples, with λ it trains on the student's text. 0 samples every time.",
        least=0,
    )
    adaptive_rollouts: bool = setting(
        False, "Raise λ from lmbda by 0.1 at each evaluation whose loss did not fall (DistiLLM starts at 0)."
    )
    seq_kd: bool = setting(
        False, "Replace the dataset's completions by the teacher's own, generated once and kept on disk."
    )
    lm_loss_weight: float = setting(
        0.0, "Weight of −log q(y) of given completions, added to the divergence (never on student rollouts).", least=0
    )
    tau_squared: bool = setting(False, "Multiply the divergence by kd_temperature², which keeps gradients' size.")

    feedback: str | None = setting(
        None,
        "What the teacher is asked about a completion of the student's that is wrong: a template over {prompt}, "
        "{attempt}, {answer} and {right} (a right sample of the same prompt in the step), or `default`.",
    )
    feedback_answer_column: str = setting("answer", "With feedback: the column of right answers.")
    feedback_kind: str = setting("auto", f"With feedback: how answers are compared: {', '.join(ANSWER_KINDS)}.")
    feedback_formats: list[str] | None = setting(
        None,
        "With feedback: how completions state their answer: hash, boxed, answer_is, choice, first_line, or `regex:` "
        "and a pattern; by default the first three, else the last number, the choice or the first line.",
    )
    feedback_right: str = setting(
        "drop",
        "With feedback: rows that the teacher is told nothing of, the right ones, are left out (drop) or trained on "
        "their plain prompt (keep).",
    )

    def divergence_params(self) -> dict[str, float]:
        """Return the parameters of the divergence that were set."""
        names = ("beta", "alpha", "kl_weight", "mu", "t")
        settings = {name: getattr(self, name) for name in names}
        return {name: value for name, value in settings.items() if value is not None}

    stands_for = frozenset({"GKDConfig", "GOLDConfig", "DistillationConfig"})
    weighs_samples = True

    @property
    def accepts_sparse_teachers(self) -> bool:  # type: ignore[override]
        """Whatever reads log-probabilities of the very tokens that were sampled wants them all."""
        return not self.future_kl and self.token_weighting == "none"

    @classmethod
    def taken_from(cls, args: TrainingArguments, changed: dict[str, Any]) -> dict[str, Any]:
        """What goes without saying there: SFT never samples; `DistillationTrainer` always does.

        The latter's temperature is that of the loss, too.
        """
        names = {theirs.__name__ for theirs in type(args).__mro__}
        uld = changed.pop("use_uld_loss", False)
        name = changed.pop("teacher_tokenizer_name_or_path", None)
        if uld or name is not None:  # GOLD
            terms: dict[str, Any] = {"cross_tokenizer": {"uld": 1.0}} if uld else {}
            return {"teacher_tokenizer": name or "own", **terms}
        if "SFTConfig" in names and not names & cls.stands_for:  # TRL's GKD and GOLD derive theirs from it
            return {"lmbda": 0.0}
        if "DistillationConfig" in names:
            return {"lmbda": 1.0, "kd_temperature": args.temperature}  # type: ignore[attr-defined]
        return {}

    @property
    def feedback_template(self) -> str | None:
        """`feedback`, or the text that `default` stands for."""
        return DEFAULT_FEEDBACK if self.feedback == "default" else self.feedback

    def feedback_rows(self, wants: Requirements) -> FeedbackRows | None:
        template = self.feedback_template
        if template is None:
            return None
        return FeedbackRows(
            FeedbackTemplate(template),
            self.feedback_answer_column,
            self.teacher_max_length,
            wants.teacher_tokenizer,
            wants.why_no_chat,
        )

    @property
    def why_one_teacher(self) -> str:
        if self.feedback is not None:
            return "feedback (`feedback`) is for the attempts of one teacher's rows"
        replays = "a replay buffer (`replay_buffer_size`) does not keep whose rows it has"
        return replays if self.replay_buffer_size else super().why_one_teacher

    @property
    def why_fixed_rows(self) -> str:
        replays = "rows of a replay buffer (`replay_buffer_size`), of any length, take the places of a batch's own"
        return replays if self.replay_buffer_size else ""

    @property
    def why_shared_tokenizer(self) -> str:
        if self.reward_names:
            return "rewards (`reward_funcs`) are weighed against the divergence of each sampled token"
        if self.feedback is not None:
            return "feedback (`feedback`) is written for the teacher while it trains"
        if self.divergence == "logit_mse" and self.compares_distributions:
            return "logits are compared id by id (`divergence: logit_mse`)"
        weighted = f"weights of sampled tokens (`sampler_correction: {self.sampler_correction}`) are of one token each"
        return weighted if self.sampler_correction != "none" else ""

    @property
    def loss_terms(self) -> frozenset[str]:
        return frozenset(set(self.aligned_terms or {"divergence"}) | ({"lm_loss"} if self.lm_loss_weight else set()))

    @property
    def follows_teacher_alone(self) -> bool:
        return not self.reward_names and (not self.lm_loss_weight or self.lmbda == 1)

    @property
    def other_scores(self) -> frozenset[str]:
        return self.reward_scores

    @property
    def samples_completions(self) -> bool:
        """Any step may train on the student's own text."""
        return self.lmbda > 0 or self.adaptive_rollouts

    @property
    def needs_completions(self) -> bool:
        return self.lmbda < 1 and not self.seq_kd

    @property
    def replaces_completions(self) -> bool:
        return self.seq_kd

    def check_datasets(self, train: Any, evaluation: Any, text: Any, wants: Requirements) -> None:
        self.check_reward_rows(train, wants)
        if self.adaptive_rollouts and isinstance(evaluation, dict):
            raise ConfigurationError(
                f"Got `adaptive_rollouts` with {len(evaluation)} eval datasets; expected one, whose loss raises λ."
            )

    def _check(self) -> None:
        super()._check()
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        self._require(
            "replay_buffer_size",
            self.replay_buffer_size == 0 or (self.replay_buffer_size >= rows and self.samples_completions),
            f"0 (off), or at least the {rows} rows of a step, with lmbda above 0 or adaptive_rollouts",
        )
        self._require(
            "adaptive_rollouts",
            not self.adaptive_rollouts or (self.eval_strategy != "no" and self.lmbda < 1),
            "an eval_strategy other than 'no', since evaluations raise λ, and lmbda below 1, so that it can rise",
        )
        self._require(
            "max_new_tokens",
            self.max_new_tokens < self.row_limit or not (self.samples_completions or self.seq_kd),
            f"less than max_length ({self.max_length}), which counts prompt and completion",
        )
        self._require(
            "seq_kd",
            not (self.seq_kd and self.lmbda == 1),
            "lmbda below 1: with lmbda = 1 every step trains on student rollouts and the teacher's text is never used",
        )
        self._check_feedback()
        self.check_rewards()
        resolve_divergence(self.divergence, **self.divergence_params())

    def check_rewarded(self) -> None:
        for name in ("feedback", "replay_buffer_size"):
            alone = "none with `reward_funcs`, which compare completions of the step that samples them"
            self._require(name, not getattr(self, name), alone)
        exact = "reverse_kl with `future_kl`, whose gradient is that of KL(q‖p) of whole completions"
        self._require("divergence", not self.future_kl or self.divergence == "reverse_kl", exact)
        one = "1 with `future_kl`, which holds log-probabilities of both models against each other"
        for name in ("temperature", "kd_temperature"):
            self._require(name, not self.future_kl or getattr(self, name) == 1, one)

    def _check_feedback(self) -> None:
        if self.feedback_template is None:
            for one in fields(self):
                if one.name.startswith("feedback_") and getattr(self, one.name) != one.default:
                    self._require(one.name, False, "`feedback` beside it, a template or `default`")
            return
        FeedbackTemplate(self.feedback_template)
        self._require("feedback_right", self.feedback_right in WHEN_RIGHT, f"one of {', '.join(WHEN_RIGHT)}")
        check_kind(self.feedback_kind)
        answer_parser(self.feedback_formats or ())
        self._require(
            "feedback",
            self.samples_completions,
            "lmbda above 0 with it: feedback is on what the student has sampled, and `lmbda: 0` never samples",
        )
        self._require(
            "feedback",
            not self.replay_buffer_size,
            "none with `replay_buffer_size`: feedback is on what the student writes now, with samples of the same step",
        )
        for name in ("teacher_prompt", "teacher_system_prompt"):
            alone = "none with `feedback`, which writes the teacher's prompt itself; put this text into the template"
            self._require(name, getattr(self, name) is None, alone)
        self._require(
            "teacher_too_long",
            self.teacher_max_length is None or self.teacher_too_long == "drop",
            "drop with `feedback` and `teacher_max_length`: how long a row gets is known once it was sampled, so that "
            "it can be left out and counted, but not refused before the run",
        )
