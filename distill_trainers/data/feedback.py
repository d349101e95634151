"""What a teacher is told of a student's own attempt: a template, and what a row must bring to fill it later.

An attempt is known only once it was sampled. So a row brings the texts that surround the teacher's question
(`head`, `tail`, as the chat template writes them), and what is known of it before. The trainer joins these texts and
tokenises them as one, so that the teacher's prompt is, id for id, what rendering the whole would have given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distill_trainers.data.chat import RenderingError
from distill_trainers.data.conversations import rendered_around, template_settings
from distill_trainers.data.formats import DatasetType
from distill_trainers.data.labels import TokenizedRow
from distill_trainers.data.messages import Message
from distill_trainers.data.teacher_prompts import (
    ASKED,
    CONTEXT,
    as_words,
    asking,
    filled,
    names_in,
    prompt_chat,
    question_of,
)
from distill_trainers.data.texts import text_ids
from distill_trainers.exceptions import ConfigurationError, DatasetError

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedTokenizerBase

FEEDBACK = "feedback"  # of rows, and of batches as a list of B
ATTEMPT, ANSWER, RIGHT = "attempt", "answer", "right"
NEWS = (ATTEMPT, ANSWER, RIGHT)  # what the student does not read
CHOICES = "choices"  # a column of multiple-choice questions
DEFAULT_FEEDBACK = (
    "{prompt}\n\nA right solution:\n{right}\n\nAn earlier attempt, which is wrong:\n{attempt}\n\n"
    "The right answer:\n{answer}\n\nNow answer the question rightly."
)
# Stands for the question while a chat template is rendered; no row says it, and no template changes it.
_MARK = "@@the-question-of-the-teacher:61c8@@"
_TEXTS = ("head", "tail", "question", "answer")
COLUMNS = (FEEDBACK, "teacher_length")  # of rows


@dataclass(frozen=True)
class FeedbackTemplate:
    """A text over `{prompt}`, `{attempt}`, `{answer}` and `{right}`, in paragraphs.

    A paragraph is what stands between two empty lines. One that names something which there is not (a right sample, an
    attempt that is empty) is left out.

    Raises:
        ConfigurationError: braces that do not close, another name, no `{prompt}`, or nothing that is feedback.
    """

    text: str

    def __post_init__(self) -> None:
        names = names_in(self.text, FEEDBACK)
        unknown = sorted(names - {ASKED, *NEWS})
        lacks = "" if ASKED in names else f"{{{ASKED}}}"
        lacks = lacks or ("" if names & set(NEWS) else "feedback")
        if unknown or lacks:
            wrong = f"names {{{unknown[0]}}}" if unknown else f"has no place for {lacks}"
            raise ConfigurationError(
                f"Got `feedback: {self.text!r:.80}`, which {wrong}; expected a template with {{{ASKED}}} (what the "
                f"student is asked) and at least one of {{{ATTEMPT}}}, {{{ANSWER}}} and {{{RIGHT}}}, or `default`."
            )

    @property
    def names(self) -> set[str]:
        return names_in(self.text, FEEDBACK)

    def filled(self, values: Mapping[str, str]) -> str | None:
        """Put texts in, all of `{prompt}` and the names in `NEWS`; None where no feedback is left."""
        parts = [part for part in self.text.split("\n\n") if all(values[name] for name in names_in(part, FEEDBACK))]
        if not any(names_in(part, FEEDBACK) & set(NEWS) for part in parts):
            return None
        return "\n\n".join(filled(part, values, FEEDBACK) for part in parts)


@dataclass(frozen=True)
class FeedbackRows:
    """Adds to rows what their teacher's prompt is made of once the student has answered.

    Args:
        template: of the teacher's question.
        answer_column: holds the right answer.
        max_length: tokens of the teacher's row, longer ones are left out when they come; None takes any number.
        tokenizer: the teacher's, if it has a chat template of its own; None takes the student's.
        why_no_chat: what keeps conversations from being rendered, as the end of a sentence; empty: nothing.
        aliases: columns as they are called now, by what they were called before `column_mapping`.
    """

    template: FeedbackTemplate
    answer_column: str
    max_length: int | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    why_no_chat: str = ""
    aliases: tuple[tuple[str, str], ...] = ()

    def reading(
        self, columns: Iterable[str], dataset_type: DatasetType, mapping: Mapping[str, str] | None, name: str
    ) -> FeedbackRows:
        """Return the same, for a dataset with these columns.

        Raises:
            ConfigurationError: no column of answers, rows without text, or a context of the row's as well.
        """
        columns, aliases = set(columns), dict(mapping or {})
        if aliases.get(self.answer_column, self.answer_column) not in columns:
            raise ConfigurationError(
                f"Got `feedback` with `feedback_answer_column: {self.answer_column}`, but dataset {name!r} has the "
                f"columns {sorted(columns)}; expected that one, with the right answer of each row. Name yours."
            )
        if dataset_type in ("tokenized", "text"):
            what = (
                "token ids, which cannot be" if dataset_type == "tokenized" else "plain text, which has no prompt to be"
            )
            raise ConfigurationError(
                f"Got `feedback`, but dataset {name!r} holds {what} rendered anew for the teacher. Give prompts as "
                "text or messages, or leave it out."
            )
        if CONTEXT in columns:
            raise ConfigurationError(
                f"Got `feedback`, but dataset {name!r} has a column {CONTEXT!r}, too, which the teacher would read in "
                "place of it. Remove the column, or leave `feedback` out."
            )
        return replace(self, aliases=tuple(aliases.items()))

    def added_to(
        self,
        tokens: TokenizedRow,
        row: Mapping[str, Any],
        asked: str | Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any] | None,
        reserve: int = 0,
    ) -> dict[str, Any]:
        """Return the columns `feedback` (see `feedback_features`) and `teacher_length` of a tokenised row.

        Args:
            asked: the student's prompt as text or messages.
            reserve: tokens that the student may write.

        Raises:
            DatasetError: no answer, a value of the wrong kind, or a conversation that cannot be rendered.
        """
        column = dict(self.aliases).get(self.answer_column, self.answer_column)
        answer = as_words(row.get(column), column)
        if not answer:
            raise DatasetError(
                f"There is no answer in the column {column!r}, by which `feedback` tells right from wrong. Give the "
                "row one, or take it out."
            )
        own = self.tokenizer or tokenizer
        if isinstance(asked, str):
            head, tail, question = "", "", _without_straddled(asked, tokens.get("straddled", 0), tokenizer)
        else:
            head, tail = self._around(asked, tokens, tokenizer, template_settings(row, chat_template_kwargs))
            question = question_of(asked)
        known = {"head": head, "tail": tail, "question": question, "answer": answer, CHOICES: _choices(row)}
        fullest = self.template.filled({ASKED: question, ANSWER: answer, ATTEMPT: "-", RIGHT: "-"})
        samples = 1 + len(self.template.names & {ATTEMPT, RIGHT})  # the completion is read once more
        length = len(feedback_ids(known, fullest or "", own)) + samples * reserve
        return {FEEDBACK: known, "teacher_length": min(length, self.max_length or length)}

    def _around(
        self,
        asked: Sequence[Message],
        tokens: TokenizedRow,
        tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any],
    ) -> tuple[str, str]:
        if self.why_no_chat:
            raise ConfigurationError(f"Got `feedback` with a conversation, but {self.why_no_chat}")
        prompt_ids = tokens["input_ids"][: tokens["prompt_length"]]
        begun = len(prompt_ids) == len(tokens["input_ids"])
        prompt: TokenizedRow = {"input_ids": prompt_ids, "labels": [], "prompt_length": len(prompt_ids)}
        chat, header = prompt_chat(asked, prompt, tokenizer, self.tokenizer, settings, begun=begun)
        try:
            return rendered_around(chat, asking(asked, _MARK), _MARK, header=header, begun=begun)
        except RenderingError as error:
            raise DatasetError(f"The teacher's prompt with feedback cannot be rendered: {error}") from error


def feedback_ids(known: Mapping[str, Any], said: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenise the teacher's prompt in which `said` stands where the student's question does.

    Args:
        known: the row's `feedback`. Without text around it, the prompt is plain text.
    """
    if not known["head"] and not known["tail"]:
        return text_ids(said, tokenizer)
    return tokenizer(known["head"] + said + known["tail"], add_special_tokens=False)["input_ids"]


def feedback_features() -> Features:
    """Return the columns of feedback in a dataset."""
    from datasets import Features, List, Value

    texts = {name: Value("string") for name in _TEXTS}
    kinds = ({**texts, CHOICES: List(Value("string"))}, Value("int32"))
    return Features(dict(zip(COLUMNS, kinds, strict=True)))


def _choices(row: Mapping[str, Any]) -> list[str]:
    choices = row.get(CHOICES) or []
    if not isinstance(choices, list) or not set(map(type, choices)) <= {str}:
        raise DatasetError(
            f"Column {CHOICES!r} holds {choices!r:.80}; expected a list of texts in the order of their letters, by "
            "which `feedback` compares answers. Mend it, or rename the column."
        )
    return choices


def _without_straddled(asked: str, lost: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a prompt as rollouts begin from it: without its last tokens that the completion's first has taken in."""
    end = str(tokenizer.decode(text_ids(asked, tokenizer)[-lost:])) if lost else ""
    return asked.removesuffix(end)
