"""How models are evaluated; what cannot work is refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..answers.verify import check_kind
from ..randomness import Purpose, Role, Stream
from ..rollouts import SamplingSettings
from ..settings import Checked, require, setting
from ..value_types import check_mappings, check_settings
from .accuracy import answer_parser
from .measures import METRICS
from .text_scores import require_library

DEFAULT_SEEDS = (10, 20, 30, 40, 50)


@dataclass
class EvaluationSettings(Checked):
    """Settings of an evaluation. Each field is explained by its `help`; the defaults are those of the literature."""

    metrics: list[str] | None = setting(
        None, f"Any of {', '.join(METRICS)}; by default all that models and data allow."
    )
    max_samples: int | None = setting(None, "Only the first so many rows.", least=1)
    min_reference_words: int = setting(
        0, "Leave out rows whose reference has fewer words (11 for S-NI and UnNI).", least=0
    )
    max_length: int = setting(512, "Longest prompt plus completion, in tokens.", least=1)
    max_new_tokens: int = setting(256, "Longest sampled completion, in tokens.", least=1)
    seeds: list[int] = field(
        default_factory=lambda: list(DEFAULT_SEEDS), metadata={"help": "One sample per prompt for each of them."}
    )
    temperature: float = setting(
        1.0, "Sampling temperature; 0 is greedy.", least=0, words="0 (greedy) or a positive number"
    )
    top_p: float = setting(1.0, "Nucleus filter; 1 is off.", above=0, most=1)
    top_k: int = setting(0, "Top-k filter; 0 is off.", least=0)
    no_repeat_ngram_size: int = setting(0, "No n-gram of this size twice (6 in MiniLLM's runs); 0 is off.", least=0)
    stop_strings: list[str] | None = setting(None, "A completion also ends with these.")
    batch_size: int = setting(16, "Rows that are worked on together.", least=1)
    answer_formats: list[str] | None = setting(
        None, "hash, boxed, answer_is, choice, first_line, or regex:PATTERN; the first that fits."
    )
    answer_kind: str = setting("auto", "auto, number, math, exact or choice.")
    question_prompt: str | None = setting(
        None, "What asks a `question`; by default the label prompt of method rationale."
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(None, "Extra variables for the chat template (JSON).")
    teacher_system_prompt: str | None = setting(None, "System prompt of the teacher alone, as in training.")
    teacher_prompt: str | None = setting(
        None, "What the teacher alone is asked: a template or a column, as in training."
    )
    teacher_tokenizer: str = setting(
        "shared", "shared, or own: the teacher has another tokenizer; both are compared in bytes, as in training."
    )
    bootstrap_samples: int = setting(1000, "Resamples of the prompts for intervals.", least=1)
    confidence: float = setting(0.95, "Of the intervals.", above=0, below=1)
    calibration_bins: int = setting(10, "Bins of the calibration error.", least=1)
    shown_samples: int = setting(8, "Prompts whose completions are shown side by side.", least=0)
    token_samples: int = setting(4, "Prompts whose completions are compared token by token.", least=0)
    top_tokens: int = setting(5, "Likeliest tokens kept at each of their places.", least=1)
    speed_prompts: int = setting(8, "Prompts decoded together for tokens per second.", least=1)
    speed_tokens: int = setting(32, "Tokens decoded for each of them.", least=1)
    lm_eval_tasks: list[str] | None = setting(None, "Tasks of lm-eval to run as well; needs `pip install lm-eval`.")
    lm_eval_limit: int | None = setting(None, "Only the first so many rows of each task.", least=1)
    lm_eval_include_path: str | None = setting(None, "A folder with tasks of your own.")

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigurationError: naming the setting, what was got and what was expected.
        """
        check_settings(self)
        check_mappings(self)
        unknown = [name for name in self.metrics or [] if name not in METRICS]
        got = unknown[0] if unknown else self.metrics
        require(not unknown and got != [], "metrics", got, f"any of {', '.join(METRICS)}")
        self._require("seeds", bool(self.seeds), "at least one number")
        self._require("seeds", all(0 <= seed < 2**32 for seed in self.seeds), "numbers from 0 to 4294967295")
        self._require("seeds", len(set(self.seeds)) == len(self.seeds), "different numbers")
        self._require(
            "max_length",
            self.max_length > self.max_new_tokens,
            f"more than max_new_tokens ({self.max_new_tokens}), since it counts the prompt too",
        )
        known = self.teacher_tokenizer in ("shared", "own")
        require(known, "teacher_tokenizer", self.teacher_tokenizer, "shared or own")
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

    def stream(self, seed: int, role: Role) -> Stream:
        """Name the random numbers of text that is scored: a student's are never its teacher's."""
        return Stream(seed, role, Purpose.SCORED)

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
