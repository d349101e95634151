"""How models are evaluated; what cannot work is refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..answers.verify import check_kind
from ..exceptions import ConfigurationError
from ..rollouts import SamplingSettings
from .accuracy import answer_parser
from .measures import METRICS
from .rouge import require_library

DEFAULT_SEEDS = (10, 20, 30, 40, 50)


@dataclass
class EvaluationSettings:
    """Settings of an evaluation. Each field is explained by its `help`; the defaults are those of the literature."""

    metrics: list[str] | None = field(
        default=None, metadata={"help": f"Any of {', '.join(METRICS)}; by default all that models and data allow."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Only the first so many rows."})
    min_reference_words: int = field(
        default=0, metadata={"help": "Leave out rows whose reference has fewer words (11 for S-NI and UnNI)."}
    )
    max_length: int = field(default=512, metadata={"help": "Longest prompt plus completion, in tokens."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest sampled completion, in tokens."})
    seeds: list[int] = field(
        default_factory=lambda: list(DEFAULT_SEEDS), metadata={"help": "One sample per prompt for each of them."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus filter; 1 is off."})
    top_k: int = field(default=0, metadata={"help": "Top-k filter; 0 is off."})
    no_repeat_ngram_size: int = field(
        default=0, metadata={"help": "No n-gram of this size twice (6 in MiniLLM's runs); 0 is off."}
    )
    stop_strings: list[str] | None = field(default=None, metadata={"help": "A completion also ends with these."})
    batch_size: int = field(default=16, metadata={"help": "Rows that are worked on together."})
    answer_formats: list[str] | None = field(
        default=None,
        metadata={"help": "hash, boxed, answer_is, choice, first_line, or regex:PATTERN; the first that fits."},
    )
    answer_kind: str = field(default="auto", metadata={"help": "auto, number, math, exact or choice."})
    question_prompt: str | None = field(
        default=None, metadata={"help": "What asks a `question`; by default the label prompt of method rationale."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Extra variables for the chat template (JSON)."}
    )
    bootstrap_samples: int = field(default=1000, metadata={"help": "Resamples of the prompts for intervals."})
    confidence: float = field(default=0.95, metadata={"help": "Of the intervals."})
    calibration_bins: int = field(default=10, metadata={"help": "Bins of the calibration error."})
    shown_samples: int = field(default=8, metadata={"help": "Prompts whose completions are shown side by side."})
    token_samples: int = field(default=4, metadata={"help": "Prompts whose completions are compared token by token."})
    top_tokens: int = field(default=5, metadata={"help": "Likeliest tokens kept at each of their places."})
    speed_prompts: int = field(default=8, metadata={"help": "Prompts decoded together for tokens per second."})
    speed_tokens: int = field(default=32, metadata={"help": "Tokens decoded for each of them."})
    lm_eval_tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks of lm-eval to run as well; needs `pip install lm-eval`."}
    )
    lm_eval_limit: int | None = field(default=None, metadata={"help": "Only the first so many rows of each task."})
    lm_eval_include_path: str | None = field(default=None, metadata={"help": "A folder with tasks of your own."})

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigurationError: naming the setting, what was got and what was expected.
        """
        unknown = [name for name in self.metrics or [] if name not in METRICS]
        if unknown or self.metrics == []:
            got = unknown[0] if unknown else "[]"
            raise ConfigurationError(f"Got `metrics: {got}`; expected any of {', '.join(METRICS)}.")
        counts = ("max_new_tokens", "batch_size", "bootstrap_samples", "calibration_bins", "top_tokens")
        for name in (*counts, "speed_prompts", "speed_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("min_reference_words", "shown_samples", "token_samples", "top_k", "no_repeat_ngram_size"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.max_samples is None or self.max_samples >= 1, "max_samples", self.max_samples, "1 or more")
        _require(bool(self.seeds), "seeds", self.seeds, "at least one number")
        _require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "different numbers")
        _require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or a positive number")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        _require(0 < self.confidence < 1, "confidence", self.confidence, "a number between 0 and 1, such as 0.95")
        _require(
            self.max_length > self.max_new_tokens,
            "max_length",
            self.max_length,
            f"more than max_new_tokens ({self.max_new_tokens}), since it counts the prompt too",
        )
        answer_parser(self.answer_formats or ())
        check_kind(self.answer_kind)
        if self.metrics and "rouge_l" in self.metrics:
            require_library("rouge_score", "rouge-score", "rouge_l")
        if self.metrics and "diversity" in self.metrics:
            require_library("sacrebleu", "sacrebleu", "diversity")

    @property
    def sampled_seeds(self) -> list[int]:
        """Seeds that give different samples: greedy text is always the same."""
        return self.seeds if self.temperature > 0 else self.seeds[:1]

    def sampling(
        self, eos_token_ids: list[int], pad_token_id: int, vocab_size: int | None, *, greedy: bool = False
    ) -> SamplingSettings:
        """Say how a model with these end-of-text tokens is sampled."""
        return SamplingSettings(
            max_new_tokens=self.max_new_tokens,
            temperature=0.0 if greedy else self.temperature,
            top_p=1.0 if greedy else self.top_p,
            top_k=0 if greedy else self.top_k,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            suppress_from=vocab_size,
            stop_strings=list(self.stop_strings or []),
            no_repeat_ngram_size=self.no_repeat_ngram_size,
        )


def _require(condition: bool, name: str, got: Any, expected: str) -> None:
    if not condition:
        raise ConfigurationError(f"Got `{name}: {got}`; expected {expected}.")
