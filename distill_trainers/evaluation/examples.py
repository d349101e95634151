"""What models are evaluated on: prompts with references and answers, from rows of any layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..answers.formats import question_text
from ..data.conversations import prompt_and_answer
from ..data.formats import detect_dataset_type, is_conversation, to_chatml
from ..data.plain import plain_dataset, plain_row
from ..data.rationales import RationaleTemplates
from ..data.rows import tokenize_row, truncate
from ..data.teacher_prompts import TeacherPrompts
from ..data.views import teacher_prompt
from ..exceptions import DatasetError
from ..rollouts.store import prompt_key
from .accuracy import Parse, Question, answer_parser
from .settings import EvaluationSettings


@dataclass(frozen=True)
class Example:
    """A row as token ids, cut to length, and what is known about its right completion.

    Attributes:
        prompt_ids: empty for plain text.
        completion_ids: the reference text, with the token that ends it; empty where the row has none.
        references: texts that count as right completions; the first is that of `completion_ids`.
        answer: of a question; None where nobody knows.
        prompt_text: for people to read: a conversation without its template; empty where only ids are known.
        teacher_prompt_ids: what the teacher reads in place of the prompt; None: the same.
        owner: of several teachers, the place of the one that the row belongs to.
    """

    prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    answer: str | None = None
    choices: list[str] = field(default_factory=list)
    task: str = ""
    prompt_text: str = ""
    teacher_prompt_ids: list[int] | None = None
    owner: int = 0

    @property
    def key(self) -> str:
        """Identifies its prompt."""
        return prompt_key(self.prompt_ids)

    def prompt_of(self, *, teacher: bool) -> list[int]:
        """Return the prompt that a model reads: the teacher's own, if it is the teacher and has one."""
        return self.teacher_prompt_ids if teacher and self.teacher_prompt_ids is not None else self.prompt_ids

    def behind(self, completion: list[int], *, teacher: bool = False) -> tuple[list[int], ...]:
        """Return a text to be read: prompt, completion and, for a student beside its teacher, the teacher's prompt."""
        own = () if teacher or self.teacher_prompt_ids is None else (self.teacher_prompt_ids,)
        return self.prompt_of(teacher=teacher), completion, *own

    @property
    def question(self) -> Question:
        return Question(self.prompt_ids, self.answer or "", self.task, self.choices)


def read_examples(
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    settings: EvaluationSettings,
    *,
    name: str = "evaluation",
    teacher_tokenizer: Any = None,
) -> list[Example]:
    """Read rows of `dataset` as examples: at most `max_samples`, without those that lack prompt and text.

    Beside the layouts of training, rows may have `references` (a list of texts), `answer` and `choices`; and `question`
    with `answer` is asked by `question_prompt`.

    Args:
        tokenizer: renders what students are asked.
        teacher_tokenizer: renders the teacher's own prompts; None takes `tokenizer`.

    Raises:
        DatasetError: no layout fits, a row cannot be tokenised, or none is left.
    """
    parse = answer_parser(settings.answer_formats or ())
    read = _Reader(tokenizer, settings, parse, getattr(dataset, "features", None), teacher_tokenizer)
    examples: list[Example] = []
    seen = 0
    # A list may have rows of different columns, which no dataset has.
    rows = plain_dataset(dataset, name=name) if hasattr(dataset, "with_format") else map(plain_row, dataset)
    for index, row in enumerate(rows):
        seen += 1
        try:
            example = read(row, name)
        except DatasetError as error:
            raise DatasetError(f"Row {index} of dataset {name!r}: {error}") from error
        if example is not None:
            examples.append(example)
        if settings.max_samples is not None and len(examples) >= settings.max_samples:
            break
    if not examples:
        raise DatasetError(
            f"None of the {seen} rows of dataset {name!r} can be evaluated: they are empty, or their references have "
            f"fewer than min_reference_words={settings.min_reference_words} words. Check the columns (column_mapping)."
        )
    return examples


class _Reader:
    def __init__(
        self, tokenizer: Any, settings: EvaluationSettings, parse: Parse, features: Any, teacher_tokenizer: Any
    ):
        self.tokenizer, self.settings, self.parse, self.features = tokenizer, settings, parse, features
        self.templates = RationaleTemplates.of("auto", tokenizer, label_prompt=settings.question_prompt)
        system, prompt = settings.teacher_system_prompt, settings.teacher_prompt
        self.teacher = TeacherPrompts(system, prompt, tokenizer=teacher_tokenizer)
        self.prompts: dict[Any, TeacherPrompts | None] = {}  # by the columns of rows

    def __call__(self, row: Mapping[str, Any], name: str) -> Example | None:
        choices = [str(choice) for choice in row.get("choices") or []]
        asked = self._as_prompt(row, choices) if self._is_question(row) else row
        row_type = detect_dataset_type(asked, name=name)
        kwargs: Any = self.settings.chat_template_kwargs or None
        prompts = self._prompts(row, row_type, name)
        tokens = tokenize_row(
            asked if prompts is None else {**row, **asked},
            self.tokenizer,
            dataset_type=row_type,
            chat_template_kwargs=kwargs,
            features=self.features,
            teacher_prompts=prompts,
        )
        ids, start = tokens["input_ids"], tokens["prompt_length"]
        if not ids:
            return None
        references = self._references(row, ids[start:])
        if references and max(len(text.split()) for text in references) < self.settings.min_reference_words:
            return None
        cut = truncate(
            tokens,
            self.settings.max_length,
            self.settings.max_new_tokens if start else 0,
            bos_token_id=self.tokenizer.bos_token_id,
        )
        start = cut["prompt_length"]
        own = None if prompts is None else teacher_prompt({**cut, **prompts.finished(tokens, cut, 0)[0]})
        return Example(
            cut["input_ids"][:start],
            cut["input_ids"][start:],
            references if start else [],
            self._answer(row, references),
            choices,
            str(row.get("task") or ""),
            _prompt_text(asked),
            own,
        )

    def _prompts(self, row: Mapping[str, Any], row_type: Any, name: str) -> TeacherPrompts | None:
        key = row_type, frozenset(row)
        if key not in self.prompts:
            self.prompts[key] = self.teacher.reading(row, row_type, None, name)
        return self.prompts[key]

    def _is_question(self, row: Mapping[str, Any]) -> bool:
        others = {"input_ids", "prompt", "messages", "conversations"}
        return "question" in row and not others & row.keys()

    def _as_prompt(self, row: Mapping[str, Any], choices: list[str]) -> dict[str, Any]:
        text = self.templates.label_prompt.replace("{question}", question_text(str(row["question"]), choices))
        chat = self.templates.style == "chat"
        prompt: Any = [{"role": "user", "content": text}] if chat else text
        answer = "" if row.get("answer") is None else str(row["answer"])
        completion: Any = [{"role": "assistant", "content": answer}] if chat and answer else answer
        return {"prompt": prompt, "completion": completion} if answer else {"prompt": prompt}

    def _references(self, row: Mapping[str, Any], completion_ids: Sequence[int]) -> list[str]:
        given = row.get("references")
        if given is not None and not (isinstance(given, list) and all(isinstance(text, str) for text in given)):
            raise DatasetError(f"Column 'references' holds {given!r:.80}, expected a list of texts.")
        if given:
            return list(given)
        return [self.tokenizer.decode(completion_ids, skip_special_tokens=True)] if completion_ids else []

    def _answer(self, row: Mapping[str, Any], references: list[str]) -> str | None:
        answer = row.get("answer")
        if isinstance(answer, str | int | float) and str(answer).strip():
            return self.parse(str(answer)) or str(answer)
        return self.parse(references[0]) if references else None


def _prompt_text(row: Mapping[str, Any]) -> str:
    """A single turn as it was written, several with their roles, in whichever column they are."""
    column = next((name for name in ("prompt", "messages", "conversations") if row.get(name)), None)
    value = None if column is None else row[column]
    if isinstance(value, str):
        return value
    if value is None or not is_conversation(value):
        return ""
    turns = to_chatml(value)
    if column != "prompt":
        turns = prompt_and_answer(turns)[0]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


@dataclass(frozen=True)
class ExampleSet:
    """Examples by what can be measured on them; each list keeps the order of the data.

    Attributes:
        reference: what the forced text is: `the data`, or `the teacher` where the data has none.
    """

    examples: list[Example]
    reference: str = "the data"

    @cached_property
    def subsets(self) -> dict[str, list[int]]:
        """Which examples a score is over, by the name that `Measure.over` has: places in `examples`."""
        every = list(enumerate(self.examples))
        return {
            # The first token of a text without a prompt has nothing that predicts it.
            "texts": [i for i, example in every if len(example.completion_ids) > (0 if example.prompt_ids else 1)],
            "prompts": [i for i, example in every if example.prompt_ids],
            "references": [i for i, example in every if example.prompt_ids and example.references],
            "questions": [i for i, example in every if example.prompt_ids and example.answer is not None],
        }

    def of_owner(self, owner: int) -> ExampleSet:
        """Return the rows of one of several teachers."""
        return replace(self, examples=[example for example in self.examples if example.owner == owner])

    def of(self, subset: str) -> list[Example]:
        return [self.examples[i] for i in self.subsets[subset]]

    @property
    def prompted(self) -> list[Example]:
        """Those that can be completed."""
        return self.of("prompts")

    @property
    def with_text(self) -> list[Example]:
        """Those with a reference text that can be forced."""
        return self.of("texts")

    @property
    def questions(self) -> list[Example]:
        return self.of("questions")

    def with_texts_of(self, completions: Sequence[list[int]]) -> ExampleSet:
        """Put a teacher's completions of `prompted` in place of the references that the data lacks."""
        written = iter(completions)
        changed = [replace(old, completion_ids=next(written)) if old.prompt_ids else old for old in self.examples]
        return ExampleSet(changed, "the teacher")
