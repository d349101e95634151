"""What is measured: each score by name, with its unit, its direction and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A score.

    Attributes:
        name: its key in results and, behind `eval_`, in the logs of a run.
        metric: the setting that asks for it, one of `METRICS`.
        higher_is_better: None where neither direction is better by itself.
        paper: arXiv number of its definition, or that of the ACL anthology, where it has one.
        over: which examples it is a score over: those with reference `texts`, `prompts`, `references`, `questions`.
    """

    name: str
    title: str
    metric: str
    unit: str
    higher_is_better: bool | None
    paper: str = ""

    @property
    def over(self) -> str:
        if self.name.startswith("student_text_"):
            return "prompts"
        return _OVER[self.metric]


_OVER = {
    "perplexity": "texts",
    "agreement": "texts",
    "calibration": "texts",
    "rouge_l": "references",
    "accuracy": "questions",
    "consistency": "questions",
    "diversity": "prompts",
    "exposure_bias": "prompts",
}

_TABLE = (
    Measure("perplexity", "Perplexity on the reference text", "perplexity", "", False),
    Measure("bits_per_byte", "Bits per byte of the reference text", "perplexity", "bits/byte", False),
    Measure("kl", "Forward KL to the teacher", "agreement", "nats/token", False, "1503.02531"),
    Measure("reverse_kl", "Reverse KL to the teacher", "agreement", "nats/token", False, "2306.08543"),
    Measure("jsd", "Jensen-Shannon divergence from the teacher", "agreement", "nats/token", False, "2306.13649"),
    Measure("top1_agreement", "Top-1 agreement with the teacher", "agreement", "share", True),
    Measure("acceptance", "Acceptance in speculative sampling", "agreement", "share", True, "2211.17192"),
    Measure("next_byte_agreement", "Likeliest next byte as the teacher's", "agreement", "share", True),
    Measure("student_text_kl", "Forward KL on the model's own text", "agreement", "nats/token", False),
    Measure("student_text_reverse_kl", "Reverse KL on the model's own text", "agreement", "nats/token", False),
    Measure("student_text_jsd", "Jensen-Shannon divergence on the model's own text", "agreement", "nats/token", False),
    Measure("student_text_top1_agreement", "Top-1 agreement on the model's own text", "agreement", "share", True),
    Measure("student_text_acceptance", "Acceptance on the model's own text", "agreement", "share", True),
    Measure("rouge_l", "Rouge-L", "rouge_l", "F x 100", True, "W04-1013"),
    Measure("accuracy", "Accuracy, greedy answers", "accuracy", "share", True),
    Measure("answered", "Questions with an answer", "accuracy", "share", True),
    Measure("tokens_per_answer", "Tokens per answer", "accuracy", "tokens", None),
    Measure("distinct_4", "Distinct 4-grams", "diversity", "share", True, "1510.03055"),
    Measure("self_bleu", "Self-BLEU of the samples of a prompt", "diversity", "BLEU", False, "1802.01886"),
    Measure("completion_tokens", "Tokens per sampled completion", "diversity", "tokens", None),
    Measure("ended", "Completions that end by themselves", "diversity", "share", True),
    Measure("consistency", "Share of the samples' most frequent answer", "consistency", "share", True, "2203.11171"),
    Measure("majority_accuracy", "Accuracy of the most frequent answer", "consistency", "share", True, "2203.11171"),
    Measure("exposure_error", "Excess error from exposure bias", "exposure_bias", "%", False, "2204.01171"),
    Measure("ece", "Expected calibration error of next tokens", "calibration", "share", False, "1706.04599"),
)
MEASURES: dict[str, Measure] = {measure.name: measure for measure in _TABLE}

# What `metrics` may name; speed and memory are no scores over prompts (`cost.py`).
METRICS = tuple(dict.fromkeys(measure.metric for measure in _TABLE)) + ("speed",)
# Those that compare with a teacher, and those that read sampled text.
NEED_A_TEACHER = frozenset({"agreement", "exposure_bias"})
NEED_SAMPLES = frozenset({"agreement", "rouge_l", "diversity", "consistency", "exposure_bias"})
# Terms of agreement, each both on reference text and, behind `student_text_`, on the model's own.
AGREEMENT = ("kl", "reverse_kl", "jsd", "top1_agreement", "acceptance")

_SMALLER_IS_BETTER = ("loss", "nll", "perplexity", "bits_per_byte", "kl", "divergence")


def higher_is_better(metric: str) -> bool:
    """Tell the better direction of a logged metric: a measure's own, else by the end of its name."""
    name = metric.removeprefix("eval_").removeprefix("teacher_")
    if name.startswith("gap_closed_"):
        return True
    ends = [measure for measure in MEASURES if name == measure or name.endswith(f"_{measure}")]  # of one set of several
    if ends:
        return MEASURES[max(ends, key=len)].higher_is_better is not False
    return not metric.endswith(_SMALLER_IS_BETTER)
