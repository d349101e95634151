"""Settings of `distill-trainers rationales`, which all its stages share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import hub
from ..exceptions import ConfigurationError
from ..recipe.parse import parse_settings


@dataclass
class PipelineArguments:
    """Settings of all stages; each reads the ones it has a use for."""

    folder: str = field(default="", metadata={"help": "Where all stages keep their files. Required."})
    input: str | None = field(default=None, metadata={"help": "A JSONL file in place of the previous stage's."})
    questions: str | None = field(default=None, metadata={"help": "Data with `question`: a file, a folder, a Hub id."})
    questions_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    questions_split: str = field(default="train", metadata={"help": "Split of it."})
    column_mapping: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Rename columns, such as {input: question, label: answer} (JSON)."}
    )
    reference_format: str | None = field(
        default=None, metadata={"help": "Format in which the data's `answer` holds its answer; hash for GSM8K."}
    )
    max_questions: int | None = field(default=None, metadata={"help": "Only the first so many."})

    teacher: str | None = field(default=None, metadata={"help": "A folder or Hub id; with base_url, the served name."})
    base_url: str | None = field(default=None, metadata={"help": "OpenAI-compatible endpoint; `openai` is OpenAI's."})
    api_key_env: str = field(default="OPENAI_API_KEY", metadata={"help": "Environment variable with its key."})
    teacher_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "For from_pretrained of a local teacher (JSON)."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code of a local teacher's own."})
    use_cpu: bool = field(default=False, metadata={"help": "Run a local teacher on the CPU."})
    prompt_style: str = field(default="auto", metadata={"help": "text, chat or auto, for a local teacher."})
    exemplars: str = field(default="arithmetic", metadata={"help": "Built-in set (arithmetic, choice), or a file."})
    shots: int = field(default=4, metadata={"help": "Exemplars in a prompt."})

    samples: int = field(default=1, metadata={"help": "Chains per question."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus filter."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest chain, in tokens."})
    seed: int = field(default=0, metadata={"help": "Of a local teacher's sampling."})
    batch_size: int = field(default=16, metadata={"help": "Prompts a local teacher works on together."})

    concurrency: int = field(default=8, metadata={"help": "Requests in flight at once."})
    requests_per_minute: float | None = field(default=None, metadata={"help": "At most so many."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds for one attempt."})
    max_retries: int = field(default=5, metadata={"help": "Further attempts after errors that may pass."})
    first_wait: float = field(default=1.0, metadata={"help": "Seconds before the first of them, then doubled."})
    price_in: float = field(default=0.0, metadata={"help": "Price of a million prompt tokens."})
    price_out: float = field(default=0.0, metadata={"help": "Price of a million completion tokens."})
    max_cost: float | None = field(default=None, metadata={"help": "Ask nothing more once so much was spent."})

    answer_formats: list[str] | None = field(
        default=None, metadata={"help": "hash, boxed, answer_is, choice, or regex:PATTERN; the first that fits."}
    )
    next_question: str = field(default="Q:", metadata={"help": "Begins a question that a model goes on with."})
    answer_kind: str = field(default="auto", metadata={"help": "auto, number, math, exact or choice."})
    majority_share: float = field(default=0.5, metadata={"help": "Without references: more than this share agrees."})
    ask_for_pairs: bool = field(default=True, metadata={"help": "dual asks the teacher for missing halves of pairs."})

    save_as: str = field(default="jsonl", metadata={"help": "jsonl, or dataset: a `datasets` folder as well."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Upload the stage's rows as this dataset."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Make that dataset private."})
    hub_token: str | None = field(default=None, metadata={"help": "Of the Hub; by default that of `hf auth login`."})
    inspect: bool = field(default=False, metadata={"help": "dual: show pairs that are there, with their key steps."})
    inspect_rows: int = field(default=5, metadata={"help": "So many of them on the terminal; the page has all."})
    tokenizer: str | None = field(default=None, metadata={"help": "Mark this tokenizer's tokens instead of words."})

    def check(self) -> None:
        """Refuse what cannot work, by name."""
        from ..answers.formats import find_format
        from ..answers.verify import check_kind

        if not self.folder:
            raise ConfigurationError("No folder was named; set `folder` to where the stages keep their files.")
        for name in ("samples", "max_new_tokens", "batch_size", "concurrency", "shots", "inspect_rows"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"Got `{name}: {getattr(self, name)}`; expected 1 or more.")
        if self.samples > 1 and self.temperature == 0:
            raise ConfigurationError(
                f"Got `samples: {self.samples}` at `temperature: 0`, which gives the same chain each time. Raise one, "
                "or set samples to 1."
            )
        if self.save_as not in ("jsonl", "dataset"):
            raise ConfigurationError(f"Got `save_as: {self.save_as}`; expected jsonl or dataset.")
        if not 0 <= self.majority_share < 1:
            raise ConfigurationError(f"Got `majority_share: {self.majority_share}`; expected a share in [0, 1).")
        for name in [*(self.answer_formats or []), *([self.reference_format] if self.reference_format else [])]:
            find_format(name)
        check_kind(self.answer_kind)

    def path(self, name: str) -> Path:
        return Path(self.folder).expanduser() / name


def parse_arguments(argv: Sequence[str]) -> PipelineArguments:
    """Parse settings from `--config` and the command line.

    Raises:
        ConfigurationError: unknown keys, values of the wrong type, or settings that cannot work.
    """
    (args,) = parse_settings(argv, lambda *_: (PipelineArguments,), what="the file of settings", command="rationales")
    args.check()
    if args.push_to_hub and not args.inspect:
        hub.check_access(args.push_to_hub, repo_type="dataset", token=args.hub_token, private=args.hub_private_repo)
    return args
