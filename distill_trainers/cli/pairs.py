"""Make preference pairs: the teacher's response to each prompt as `chosen`, the student's as `rejected`.

distill-trainers pairs --config recipes/….yaml [--pairs_file pairs.jsonl] [--verify final_number]
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import hub
from ..exceptions import ConfigurationError, DatasetError
from ..locks import holding
from ..recipe.parse import Recipe, parse_recipe
from ..settings import require, setting
from ..storage import check_folder
from . import report_errors, say, shows_usage

logger = logging.getLogger(__name__)

_LONGEST_NAME = 200  # bytes; those of files beside it are longer
_REMEDY = "Responses written earlier are kept: free some space and start again."
VERIFICATIONS = ("none", "final_number")
_USAGE = """usage: distill-trainers pairs --config RECIPE [--pairs_file FILE] [--KEY_OF_THE_RECIPE VALUE]

Both models answer the prompts of the recipe's dataset, and the pairs go to FILE (by default pairs.jsonl in output_dir),
one JSON object a line: prompt, chosen, rejected, provenance. Answers are kept as they are made; stopped at any moment,
the same command goes on. Prompts that come twice are answered once, and pairs of equal responses are left out.

  --pairs_file FILE       where the pairs go
  --verify final_number   the teacher's final number (behind ####, else its last one) must be that of the right answer
  --answer_column NAME    the dataset's column with the right answer (answer)
  --attempts N            how often the teacher may try to be right (1)
  --keep_unfinished false leave out pairs with a response that max_new_tokens cut off
  --pairs_repo OWNER/NAME also upload the pairs as this dataset of the Hub (--hub_private_repo true: a private one)"""


@dataclass
class PairArguments:
    """What making pairs needs beside a recipe."""

    pairs_file: str | None = setting(None, "Where the pairs go (<output_dir>/pairs.jsonl).")
    verify: str = setting("none", f"Check chosen responses: one of {', '.join(VERIFICATIONS)}.")
    answer_column: str = setting("answer", "The dataset's column with the right answer.")
    attempts: int = setting(1, "How often the teacher may try to be right.", least=1)
    keep_unfinished: bool = setting(True, "Keep pairs with a response that max_new_tokens cut off.")
    pairs_repo: str | None = setting(None, "Also upload the pairs as this dataset of the Hub (owner/name).")


@dataclass
class Prompt:
    """One prompt of the dataset: as it is written there, in tokens, and the right answer if it is to be checked.

    Args:
        columns: what else its rendering depends on, for the file of pairs.
    """

    written: Any
    ids: list[int]
    answer: str = ""
    columns: dict[str, str] = field(default_factory=dict)


def main(argv: Sequence[str]) -> int:
    """Make pairs; the exit status is 0, or 2 for bad input."""
    if shows_usage(argv, _USAGE):
        return 0
    recipe = parse_recipe(argv, PairArguments, command="pairs")
    _check_file(recipe, recipe.extra)
    with contextlib.ExitStack() as stack:
        stack.enter_context(holding(_file(recipe, recipe.extra), "pairs_file", beside=True))
        if recipe.model.model_name_or_path is None:  # it is made in there
            stack.enter_context(holding(recipe.args.output_dir))
        numbers = make_pairs(recipe, recipe.extra)
    counts = ", ".join(f"{number} {what}" for what, number in numbers.items() if number)
    say(f"{counts}. They are in {_file(recipe, recipe.extra)}.")
    if recipe.extra.pairs_repo:
        say(f"Uploaded to {_push(recipe, recipe.extra)}.")
    return 0


def _push(recipe: Recipe, settings: PairArguments) -> str:
    from ..cards.dataset_card import Writers, push_rows
    from ..storage import read_rows

    teacher, args = recipe.run.teacher_model_name_or_path, recipe.args
    writers = Writers(teacher, recipe.run.dataset, recipe.model.model_name_or_path or teacher)
    options = {"token": args.hub_token, "private": args.hub_private_repo, "revision": args.hub_revision}
    return push_rows(read_rows(_file(recipe, settings)), str(settings.pairs_repo), writers, **options)  # type: ignore[arg-type]


def _file(recipe: Recipe, settings: PairArguments) -> Path:
    return Path(os.path.expanduser(settings.pairs_file or Path(recipe.args.output_dir) / "pairs.jsonl"))


def _check_file(recipe: Recipe, settings: PairArguments) -> None:
    """Refuse a file of pairs that cannot be written, or that would take the place of the data."""
    file = _file(recipe, settings)
    check_folder("pairs_file" if settings.pairs_file else "output_dir", file.parent)
    fits = len(os.fsencode(file.name)) <= _LONGEST_NAME and not file.is_dir()
    require(fits, "pairs_file", file, f"a file with a name of at most {_LONGEST_NAME} bytes")
    for name in ("dataset", "eval_dataset"):
        data = Path(os.path.expanduser(getattr(recipe.run, name) or ""))
        mine = bool(data.parts) and file.exists() and file.resolve().is_relative_to(data.resolve())
        require(not mine, "pairs_file", file, f"another file: that one is of `{name}`, and would be overwritten")


def make_pairs(recipe: Recipe, settings: PairArguments) -> dict[str, int]:
    """Write the pairs of a recipe's prompts; return how many, and how many prompts were left out and why.

    Raises:
        ConfigurationError, DatasetError: what must be fixed, before any model is loaded.
        CheckpointError, CacheError: responses or pairs could not be written; those before are kept.
    """
    from ..recipe.checks import check_recipe
    from ..storage import write_file
    from ..teachers.loading import kind_of
    from .train import make_initial_student

    _check(settings, recipe.args.temperature)
    if recipe.run.teachers:
        raise ConfigurationError(
            f"Got `teachers: {', '.join(recipe.run.teachers)}`; expected one whose responses are chosen, as "
            "`teacher_model_name_or_path`. Make the pairs of each by a recipe of its own."
        )
    kind = kind_of(recipe.run.teacher_model_name_or_path, recipe.args)
    if kind.place and not (kind.can_generate or kind.may_generate):
        raise ConfigurationError(
            f"The teacher {recipe.run.teacher_model_name_or_path} is {kind.place} and writes no responses; pairs need "
            "a teacher's folder or Hub id, or the address of vLLM's server."
        )
    if settings.pairs_repo:
        hub.check_access(
            settings.pairs_repo,
            repo_type="dataset",
            token=recipe.args.hub_token,
            private=recipe.args.hub_private_repo,
            revision=recipe.args.hub_revision,
        )
    checked = check_recipe(recipe)
    counts: Counter[str] = Counter()
    _refuse_views(checked, recipe.args)
    prompts = _prompts(checked, recipe, settings, counts)
    student = recipe.model.model_name_or_path
    if student is None:
        student = str(make_initial_student(recipe, checked.ready.prepared(checked.ready.given.train, "train")))
    target = _file(recipe, settings)
    teacher = str(recipe.run.teacher_model_name_or_path)
    chosen = _teacher_answers(teacher, prompts, recipe, settings, checked.ready.pair, target)
    rejected = _Writer(student, "student", recipe, checked.ready.pair.tokenizer, target).answer(
        {key: prompt for key, prompt in prompts.items() if key in chosen}, 0
    )
    counts["prompts without a right answer of the teacher"] = len(prompts) - len(chosen)
    source = {"teacher": teacher, "student": student, "seed": recipe.args.seed, "temperature": recipe.args.temperature}
    lines = []
    for key, prompt in prompts.items():
        if key not in chosen:
            continue
        pair, reason = _pair(prompt, chosen[key], rejected[key], settings, source)
        if reason:
            counts[reason] += 1
        else:
            lines.append(json.dumps(pair, ensure_ascii=False))
    if not lines:
        raise DatasetError(
            f"No pair is left of {len(prompts)} prompts: {dict(counts)}. Raise `attempts`, `temperature` or "
            "`max_new_tokens`, or leave `verify` out."
        )
    write_file(target, "\n".join(lines) + "\n", "the pairs", _REMEDY)
    return {"pairs": len(lines), **counts}


def _check(settings: PairArguments, temperature: float) -> None:
    require(settings.verify in VERIFICATIONS, "verify", settings.verify, f"one of {', '.join(VERIFICATIONS)}")
    verified = settings.attempts == 1 or (settings.attempts > 1 and settings.verify != "none")
    require(verified, "attempts", settings.attempts, "1, or more with `verify`, which says what a right answer is")
    if settings.attempts > 1 and temperature == 0:
        raise ConfigurationError(
            f"Got `attempts: {settings.attempts}` at `temperature: 0`, where every attempt gives the same answer. "
            "Raise the temperature, or set attempts to 1."
        )


def _prompts(checked: Any, recipe: Recipe, settings: PairArguments, counts: Counter[str]) -> dict[str, Prompt]:
    """Different prompts that leave room for a response, by key."""
    from ..data import apply_column_mapping, detect_dataset_type, tokenize_row
    from ..data.arrow import without_filling
    from ..rollouts.store import prompt_key

    args: Any = recipe.args
    rows = apply_column_mapping(checked.ready.given.train, args.column_mapping, name="train")
    prompts: dict[str, Prompt] = {}
    features = getattr(rows, "features", None)
    for number, given in enumerate(rows):
        row = without_filling(given, features)
        kind = detect_dataset_type(row)
        if kind in ("text", "tokenized"):
            raise DatasetError(
                f"Pairs need prompts, but the dataset is of the layout {kind}. Give prompt, prompt + completion or "
                "messages."
            )
        if kind == "prompt_completion" and isinstance(row["prompt"], str) and isinstance(row["completion"], str):
            kind = "prompt"  # a response follows the whole prompt, also where the given completion runs into its end
        try:
            tokens = tokenize_row(
                row,
                checked.ready.pair.tokenizer,
                dataset_type=kind,
                chat_template_kwargs=args.chat_template_kwargs,
                answer_last=True,
                features=features,
            )
        except DatasetError as error:
            raise DatasetError(f"Row {number} of dataset 'train': {error}") from error
        ids = tokens["input_ids"][: tokens["prompt_length"]]
        key = prompt_key(ids)
        if not ids or len(ids) + args.max_new_tokens > args.row_limit:
            counts["prompts that are empty or leave no room within max_length"] += 1
        elif key in prompts:
            counts["prompts that came twice"] += 1
        else:
            written = _written_prompt(row, kind)
            columns = {} if isinstance(written, str) else _columns(row)
            prompts[key] = Prompt(written, ids, _right_answer(row, number, settings), columns)
    if not prompts:
        raise DatasetError(f"No prompt of the dataset can be answered: {dict(counts)}. Raise `max_length`.")
    return prompts


def _refuse_views(checked: Any, args: Any) -> None:
    """Refuse a teacher with prompts of its own: pairs are written down with one prompt, which both models answer."""
    from ..data.formats import apply_column_mapping, detect_dataset_type, first_row

    if args.has_own_tokenizer:
        raise ConfigurationError(
            f"Got `teacher_tokenizer: {args.teacher_tokenizer}` for `pairs`, which writes both responses in one "
            "tokenizer; expected a teacher that shares the student's. Have each model answer by itself, and give the "
            "texts as `chosen` and `rejected`: DPKD trains on them with that setting."
        )
    row = first_row(apply_column_mapping(checked.ready.given.train, args.column_mapping, name="train"))
    why = "pairs are written for one prompt, which both models answer"
    own = replace(args.teacher_prompts(checked.ready.wants), why_not=why)
    own.reading(row, detect_dataset_type(row), args.column_mapping, "train")


def _written_prompt(row: Mapping[str, Any], kind: str) -> Any:
    from ..data.conversations import prompt_and_answer
    from ..data.formats import conversation_of

    if kind != "messages":
        return row["prompt"]
    return prompt_and_answer(conversation_of(row), answer_last=True)[0]


def _columns(row: Mapping[str, Any]) -> dict[str, str]:
    """What a chat template reads beside the messages; as JSON text, to which no table adds keys."""
    given = {name: row[name] for name in ("system", "tools", "chat_template_kwargs") if row.get(name)}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}


def _right_answer(row: Mapping[str, Any], number: int, settings: PairArguments) -> str:
    from ..answers.verify import final_number

    if settings.verify == "none":
        return ""
    if settings.answer_column not in row:
        raise DatasetError(
            f"`verify: {settings.verify}` needs the right answers, but the dataset has no column "
            f"{settings.answer_column!r}, only {sorted(row)}. Name it in `answer_column`."
        )
    answer = str(row[settings.answer_column])
    if final_number(answer) is None:
        raise DatasetError(f"Row {number}: the right answer {answer[:80]!r} holds no number to compare with.")
    return answer


def _is_right(response: str, answer: str) -> bool:
    from ..answers.verify import final_number, same_number

    stated, right = final_number(response), final_number(answer)
    return stated is not None and right is not None and same_number(stated, right)


def _teacher_answers(
    teacher: str, prompts: dict[str, Prompt], recipe: Recipe, settings: PairArguments, pair: Any, target: Path
) -> dict[str, Any]:
    """The teacher's first response to each prompt that stands the check."""
    from ..teachers.loading import kind_of, open_teacher

    args: Any = recipe.args
    server = open_teacher(pair, args).live() if kind_of(teacher, args).may_be_away else None
    writer = _Writer(teacher, "teacher", recipe, pair.tokenizer, target, server)
    answers: dict[str, Any] = {}
    for attempt in range(settings.attempts):
        unanswered = {key: prompt for key, prompt in prompts.items() if key not in answers}
        for key, response in writer.answer(unanswered, attempt).items():
            if settings.verify == "none" or _is_right(response["text"], prompts[key].answer):
                answers[key] = {**response, "attempt": attempt}
    return answers


class _Writer:
    """A model that answers prompts; it is loaded only if some answers are not kept yet.

    Args:
        role: teacher or student.
        target: the file of pairs, beside which answers are kept.
        server: the teacher, if it is behind one.
    """

    def __init__(self, name: str, role: str, recipe: Recipe, tokenizer: Any, target: Path, server: Any = None):
        self.server = server
        self.name, self.role, self.args, self.tokenizer = name, role, recipe.args, tokenizer
        self.root = target.with_name(f"{target.name}.parts")
        self._model: Any = None

    def answer(self, prompts: dict[str, Prompt], attempt: int) -> dict[str, dict[str, Any]]:
        """Text of each response, whether it is finished, and its number of tokens."""
        from ..models import eos_ids
        from ..randomness import Purpose, Role, Stream
        from ..rollouts import Alone, CompletionStore, complete_prompts
        from ..storage import RecordStore
        from ..teachers.cache.identity import describe_source, hashed
        from ..trainers.lifecycle.completions import completion_settings, sampling_settings

        args: Any = self.args
        stream = Stream(args.seed, Role(self.role), Purpose.PAIR).at(attempt=attempt)
        identity = {
            "model": f"{self.name} {self.server.fingerprint()}" if self.server else hashed(describe_source(self.name)),
            **stream.as_dict(),
            **{name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "min_p", "max_new_tokens")},
            "repetition_penalty": args.repetition_penalty,
            "stop_strings": args.stop_strings,
        }
        store = CompletionStore(self.root, json.loads(json.dumps(identity, default=str)))
        ends = RecordStore(store.folder / "ends", what="what ends a response")
        known: Any = ends.load().get("ids")
        written = store.load()
        if not (prompts.keys() <= written.keys() and known):
            model = None if self.server else self._load()
            known = {"key": "ids", "ids": eos_ids(model, self.tokenizer)}
            ends.append([known])
            sampling = sampling_settings(args, model, self.tokenizer, len(self.tokenizer))
            settings = completion_settings(args, sampling, self.tokenizer, stream)
            written = complete_prompts(
                {key: prompt.ids for key, prompt in prompts.items()},
                self.server.generating() if self.server else contextlib.nullcontext(model),
                Alone(args.device),
                settings,
                store,
                title=f"{self.role.capitalize()} responses",
            )
        return {key: self._response(written[key], known["ids"]) for key in prompts}

    def _response(self, ids: list[int], ends: list[int]) -> dict[str, Any]:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        finished = bool(ids) and (ids[-1] in ends or any(text.endswith(stop) for stop in self.args.stop_strings or []))
        return {"text": text, "finished": finished, "tokens": len(ids)}

    def _load(self) -> Any:
        from ..models import check_answers, load_causal_lm

        if self._model is None:
            gc.collect()  # the model before this one
            is_teacher = self.role == "teacher"
            init_kwargs: Any = self.args.teacher_model_init_kwargs if is_teacher else self.args.model_init_kwargs
            kwargs = {"trust_remote_code": self.args.trust_remote_code, **(init_kwargs or {})}
            self._model = load_causal_lm(self.name, role=self.role, **kwargs).to(self.args.device).eval()
            check_answers(self._model, f"The {self.role} {self.name!r}")
        return self._model


def _pair(
    prompt: Prompt, chosen: dict[str, Any], rejected: dict[str, Any], settings: PairArguments, source: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """One line of the file, or why there is none."""
    if chosen["text"].strip() == rejected["text"].strip():
        return {}, "pairs of equal responses"
    if not chosen["text"].strip() or not rejected["text"].strip():
        return {}, "pairs with an empty response"
    if not settings.keep_unfinished and not (chosen["finished"] and rejected["finished"]):
        return {}, "pairs with an unfinished response"
    provenance = dict(source)
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        provenance |= {f"{side}_tokens": response["tokens"], f"{side}_finished": response["finished"]}
    if settings.verify != "none":
        provenance["verified"] = settings.verify
        provenance["rejected_is_right"] = _is_right(rejected["text"], prompt.answer)
    is_text = isinstance(prompt.written, str)
    sides = {
        side: response["text"] if is_text else [{"role": "assistant", "content": response["text"]}]
        for side, response in (("chosen", chosen), ("rejected", rejected))
    }
    return {"prompt": prompt.written, **sides, **prompt.columns, "provenance": provenance}, ""


if __name__ == "__main__":
    sys.exit(report_errors(main, sys.argv[1:]))
