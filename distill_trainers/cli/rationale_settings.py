"""Settings of `distill-trainers rationales`, which all its stages share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import hub
from ..exceptions import ConfigurationError
from ..recipe.parse import parse_settings
from ..settings import Checked, setting
from ..storage import check_folder
from ..value_types import check_mappings, check_settings


@dataclass
class PipelineArguments(Checked):
    """Settings of all stages; each reads the ones it has a use for."""

    folder: str = setting("", "Where all stages keep their files. Required.")
    input: str | None = setting(None, "A JSONL file in place of the previous stage's.")
    questions: str | None = setting(None, "Data with `question`: a file, a folder, a Hub id.")
    questions_config: str | None = setting(None, "Configuration of a Hub dataset.")
    questions_split: str = setting("train", "Split of it.")
    column_mapping: dict[str, Any] | str | None = setting(
        None, "Rename columns, such as {input: question, label: answer} (JSON)."
    )
    reference_format: str | None = setting(
        None, "Format in which the data's `answer` holds its answer; hash for GSM8K."
    )
    max_questions: int | None = setting(None, "Only the first so many.", least=1)

    teacher: str | None = setting(None, "A folder or Hub id; with base_url, the served name.")
    base_url: str | None = setting(None, "OpenAI-compatible endpoint; `openai` is OpenAI's.")
    api_key_env: str | None = setting(
        None, "Environment variable with its key; by default none, and OPENAI_API_KEY for OpenAI."
    )
    teacher_init_kwargs: dict[str, Any] | str | None = setting(None, "For from_pretrained of a local teacher (JSON).")
    trust_remote_code: bool = setting(False, "Allow code of a local teacher's own.")
    use_cpu: bool = setting(False, "Run a local teacher on the CPU.")
    prompt_style: str = setting("auto", "text, chat or auto, for a local teacher.")
    exemplars: str = setting("arithmetic", "Built-in set (arithmetic, choice), or a file.")
    shots: int = setting(4, "Exemplars in a prompt.", least=1)

    samples: int = setting(1, "Chains per question.", least=1)
    temperature: float = setting(
        0.7, "Sampling temperature; 0 is greedy.", least=0, words="0 (greedy) or a positive number"
    )
    top_p: float = setting(1.0, "Nucleus filter.", above=0, most=1)
    max_new_tokens: int = setting(512, "Longest chain, in tokens.", least=1)
    seed: int = setting(0, "Of a local teacher's sampling.", least=0, most=2**32 - 1)
    batch_size: int = setting(16, "Prompts a local teacher works on together.", least=1)

    concurrency: int = setting(8, "Requests in flight at once.", least=1, most=1024)
    requests_per_minute: float | None = setting(None, "At most so many.", least=0.001)
    timeout: float = setting(120.0, "Seconds for one attempt.", above=0, most=10**9)
    max_retries: int = setting(5, "Further attempts after errors that may pass.", least=0, most=1000)
    first_wait: float = setting(1.0, "Seconds before the first of them, then doubled.", least=0, most=10**6)
    price_in: float = setting(0.0, "Price of a million prompt tokens.", least=0)
    price_out: float = setting(0.0, "Price of a million completion tokens.", least=0)
    max_cost: float | None = setting(None, "Ask nothing more once so much was spent.", least=0)

    answer_formats: list[str] | None = setting(
        None, "hash, boxed, answer_is, choice, or regex:PATTERN; the first that fits."
    )
    next_question: str = setting("Q:", "Begins a question that a model goes on with.")
    answer_kind: str = setting("auto", "auto, number, math, exact or choice.")
    majority_share: float = setting(0.5, "Without references: more than this share agrees.", least=0, below=1)
    ask_for_pairs: bool = setting(True, "dual asks the teacher for missing halves of pairs.")

    save_as: str = setting("jsonl", "jsonl, or dataset: a `datasets` folder as well.")
    push_to_hub: str | None = setting(None, "Upload the stage's rows as this dataset.")
    hub_private_repo: bool | None = setting(None, "Make that dataset private.")
    hub_token: str | None = setting(None, "Of the Hub; by default that of `hf auth login`.")
    inspect: bool = setting(False, "dual: show pairs that are there, with their key steps.")
    inspect_rows: int = setting(5, "So many of them on the terminal; the page has all.", least=1)
    tokenizer: str | None = setting(None, "Mark this tokenizer's tokens instead of words.")

    def check(self) -> None:
        """Refuse what cannot work, by name."""
        from ..answers.formats import find_format
        from ..answers.verify import check_kind

        check_settings(self)
        check_mappings(self)
        if not self.folder:
            raise ConfigurationError("No folder was named; set `folder` to where the stages keep their files.")
        if self.samples > 1 and self.temperature == 0:
            raise ConfigurationError(
                f"Got `samples: {self.samples}` at `temperature: 0`, which gives the same chain each time. Raise one, "
                "or set samples to 1."
            )
        self._require("save_as", self.save_as in ("jsonl", "dataset"), "jsonl or dataset")
        for name in [*(self.answer_formats or []), *([self.reference_format] if self.reference_format else [])]:
            find_format(name)
        check_kind(self.answer_kind)

    def path(self, name: str) -> Path:
        return Path(os.path.expanduser(self.folder)) / name


def parse_arguments(argv: Sequence[str]) -> PipelineArguments:
    """Parse settings from `--config` and the command line.

    Raises:
        ConfigurationError: unknown keys, values of the wrong type, or settings that cannot work.
    """
    (args,) = parse_settings(argv, lambda *_: (PipelineArguments,), what="the file of settings", command="rationales")
    args.check()
    check_folder("folder", args.folder, writable=not args.inspect)
    if args.push_to_hub and not args.inspect:
        hub.check_access(args.push_to_hub, repo_type="dataset", token=args.hub_token, private=args.hub_private_repo)
    return args
