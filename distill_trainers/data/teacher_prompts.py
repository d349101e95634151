"""What a teacher is asked in place of the student's prompt: by a system prompt, a template, a column, or a context."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import TYPE_CHECKING, Any

from distill_trainers.data.chat import Chat, RenderingError, training_template
from distill_trainers.data.conversations import bare, rendered_prompt, template_settings
from distill_trainers.data.formats import DatasetType, as_text, is_conversation, to_chatml
from distill_trainers.data.labels import TokenizedRow
from distill_trainers.data.messages import Message, is_trained
from distill_trainers.data.texts import num_ids, text_ids
from distill_trainers.data.views import OWN_COMPLETION, has_view, start_of_view
from distill_trainers.exceptions import ConfigurationError, DatasetError, NoUsableRowsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distill_trainers.data.other_tokenizer import OtherTokenizer

logger = logging.getLogger(__name__)

CONTEXT = "privileged_context"  # TRL's name of the column
ASKED = "prompt"  # in templates: what the student is asked
_WHOLE = 2.0**53  # up to it a float is the whole number that was meant
DEFAULT_TEMPLATE = f"{{{CONTEXT}}}\n\n{{{ASKED}}}"


@dataclass(frozen=True)
class TeacherPrompts:
    """Writes the teacher's prompts; each is rendered by the teacher's chat template where the row is a conversation.

    Args:
        system: comes before the row's own system message, and makes one with it.
        prompt: a template over columns, such as `{question}\\n\\nHint: {hint}`, or the name of a column.
        max_length: tokens of the teacher's prompt with the completion; None takes any number.
        drops_long: leave out rows that are longer, and count them, instead of refusing the first.
        writes_later: other prompts of the teacher's are written while it trains, which `max_length` bounds too.
        why_not: what keeps views from working, as the end of a sentence; empty: nothing.
        tokenizer: the teacher's, if it has a chat template of its own; None takes the student's.
        why_no_chat: what keeps conversations from being rendered, as the end of a sentence; empty: nothing.
        columns: other names of columns, as they were before `column_mapping`.
        other: the teacher has a tokenizer of its own, so that all rows are views: what writes its completions.
    """

    system: str | None = None
    prompt: str | None = None
    max_length: int | None = None
    drops_long: bool = False
    writes_later: bool = False
    why_not: str = ""
    tokenizer: PreTrainedTokenizerBase | None = None
    why_no_chat: str = ""
    columns: tuple[tuple[str, str], ...] = ()
    other: OtherTokenizer | None = None

    def reading(
        self, columns: Iterable[str], dataset_type: DatasetType, mapping: Mapping[str, str] | None, name: str
    ) -> TeacherPrompts | None:
        """Return what writes the prompts of a dataset with these columns; None: the teacher reads what students read.

        Raises:
            ConfigurationError: no such column, a template that is none, or rows or a method that cannot have views.
            DatasetError: a context that the template has no place for.
        """
        columns, aliases = set(columns), dict(mapping or {})
        prompt = self.prompt
        if prompt is None and CONTEXT in columns:
            prompt = DEFAULT_TEMPLATE
            logger.warning(
                "Dataset %r has a column %r: the teacher reads it before the question, the student never does.",
                name,
                CONTEXT,
            )
        if self.other is not None:
            self._refuse_ids(dataset_type, name)
        if prompt is None and self.system is None:
            if self.other is not None:
                return self
            self._refuse_idle_length(name)
            return None
        is_template = "{" in (prompt or "{")
        named = names_in(prompt or "") if is_template else {str(prompt)}
        missing = sorted(named - columns - aliases.keys() - ({ASKED} if is_template else set()))
        if missing:
            raise ConfigurationError(
                f"Got `teacher_prompt: {prompt!r:.80}`, but dataset {name!r} has no column {', '.join(missing)}; "
                f"expected a column's name, or a template over {{{ASKED}}} (what the student is asked) and the columns "
                f"{sorted(columns)}. Mend the name, or give the dataset that column."
            )
        if CONTEXT in columns and CONTEXT not in {aliases.get(column, column) for column in named}:
            raise DatasetError(
                f"Dataset {name!r} has a column {CONTEXT!r}, but `teacher_prompt: {prompt!r:.80}` has no place for it. "
                f"Put {{{CONTEXT}}} into the template, or remove the column."
            )
        self._refuse_layout(dataset_type, prompt, name)
        return replace(self, prompt=prompt, columns=tuple(aliases.items()))

    def _refuse_idle_length(self, name: str) -> None:
        if self.max_length is not None and not self.writes_later:
            raise ConfigurationError(
                f"Got `teacher_max_length: {self.max_length}`, but of dataset {name!r} the teacher reads what the "
                "student reads, whose length `max_length` bounds; expected a prompt of its own. Set "
                f"`teacher_system_prompt` or `teacher_prompt`, add the column {CONTEXT!r} (null where there is "
                "none), or leave it out."
            )

    def _refuse_ids(self, dataset_type: DatasetType, name: str) -> None:
        if dataset_type == "tokenized":
            raise ConfigurationError(
                f"Got dataset {name!r} of token ids for a teacher with a tokenizer of its own (`teacher_tokenizer`); "
                "expected text or messages, which each tokenizer writes in its own ids. Give the text."
            )

    def _refuse_layout(self, dataset_type: DatasetType, prompt: str | None, name: str) -> None:
        settings = {"teacher_system_prompt": self.system, "teacher_prompt": prompt}
        got = " and ".join(f"`{key}: {value!r:.60}`" for key, value in settings.items() if value is not None)
        if self.why_not:
            raise ConfigurationError(f"Got {got}, where {self.why_not}. Leave one of them out.")
        if dataset_type == "text":
            raise ConfigurationError(
                f"Got {got}, but dataset {name!r} is plain text, which has no prompt that could be another one for "
                "the teacher. Give prompt + completion or messages, or leave it out."
            )
        if dataset_type == "tokenized" and (self.system is not None or "{" in (prompt or "")):
            raise ConfigurationError(
                f"Got {got}, but dataset {name!r} holds token ids, which cannot be rendered anew. Name a column of the "
                "teacher's own ids as `teacher_prompt`, or give text."
            )

    def added_to(
        self,
        tokens: TokenizedRow,
        row: Mapping[str, Any],
        asked: str | Sequence[Message] | None,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> TokenizedRow:
        """Add `teacher_prompt_ids`, `view_start` and `lacks`, the columns without a value, to a tokenised row.

        A row in which a column of the template has no value has no context: its teacher reads the student's prompt,
        with the system prompt if there is one.

        Args:
            asked: the student's prompt as text or messages; None of a row of token ids.

        Raises:
            DatasetError: a value of the wrong kind, or a conversation that cannot be rendered.
        """
        start = start_of_view(tokens)
        shown = tokens["input_ids"][:start]
        if isinstance(asked, list | tuple):
            asked = _up_to_first_answer(asked, tokens)
        said = self._said(row, asked, tokenizer)
        ids: list[int] | None
        if asked is None:
            ids = said
        elif said is None and self.system is None and self.other is None:
            ids = None
        elif isinstance(asked, str) and not isinstance(said, list):
            ids = self._of_text(asked if said is None else said, asked, tokens, tokenizer)
        else:
            settings = template_settings(row, chat_template_kwargs)
            ids = self._of_messages(said, asked, tokens, tokenizer, settings)
        if ids == [] and (self.other is None or shown):
            raise DatasetError("The teacher's prompt is empty. Expected text before the completion: mend its column.")
        view = {"teacher_prompt_ids": shown if ids is None else ids, "view_start": start}
        return {**tokens, **view, "lacks": self._lacking(row)}

    def finished(self, whole: TokenizedRow, cut: TokenizedRow, reserve: int) -> tuple[dict[str, Any], str]:
        """Return the columns of the view of a row that was cut to length, and a reason to drop it, if any.

        Args:
            whole: as `added_to` returns it.
            cut: the same, as `truncate` returns it.
            reserve: tokens of a completion that is going to be written behind the prompt.

        Raises:
            DatasetError: the teacher's row is longer than `max_length`, and such rows are not to be dropped.
        """
        own: dict[str, Any] = {} if self.other is None else {OWN_COMPLETION: []}
        if not has_view(whole):  # an empty row
            return {"teacher_prompt_ids": [], "view_start": 0, "teacher_length": 0, "lacks": "", **own}, ""
        ids, start = cut["teacher_prompt_ids"], cut["view_start"]
        if self.other is None and whole["teacher_prompt_ids"] == whole["input_ids"][: whole["view_start"]]:
            ids = cut["input_ids"][:start]  # the student's prompt, as the student sees it
        behind = max(len(cut["input_ids"]), cut["prompt_length"] + reserve) - start
        if self.other is not None:
            own[OWN_COMPLETION] = self.other.row_completion(cut, ids)
            behind = max(len(own[OWN_COMPLETION]), reserve)
        view = {"teacher_prompt_ids": ids, "view_start": start, "teacher_length": len(ids) + behind, **own}
        view["lacks"] = whole["lacks"]
        if self.max_length is None or view["teacher_length"] <= self.max_length:
            return view, ""
        if self.drops_long:
            return view, f"teacher's row longer than teacher_max_length={self.max_length}"
        room = "which leaves no room for a completion" if len(ids) >= self.max_length else "with its completion"
        raise DatasetError(
            f"The teacher would read {view['teacher_length']} tokens ({len(ids)} of its own prompt, {room}); expected "
            f"at most teacher_max_length={self.max_length}. Nothing of it is cut: raise it, shorten the context, or "
            "set `teacher_too_long: drop` to leave such rows out."
        )

    # ---- What is said in place of the question ----------------------------------------------------------------------

    def _said(
        self, row: Mapping[str, Any], asked: str | Sequence[Message] | None, tokenizer: PreTrainedTokenizerBase
    ) -> Any:
        """Text, messages or ids that a column or template gives; None where the row has no context of its own."""
        if self.prompt is None or self._lacking(row):
            return None
        values = self._values(row)
        if "{" not in self.prompt:
            value = values[self.prompt]
            if asked is None:
                return _as_ids(value, self.prompt, num_ids(tokenizer))
            return to_chatml(value) if is_conversation(value) else as_text(value, column=self.prompt)
        question = asked if isinstance(asked, str) else question_of(asked or ())
        texts = {name: as_words(values.get(name), name) for name in names_in(self.prompt) - {ASKED}}
        return filled(self.prompt, {**texts, ASKED: question})

    def _values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {**row, **{old: row.get(new) for old, new in self.columns}}

    def _lacking(self, row: Mapping[str, Any]) -> str:
        """Name the columns of the template that have no value in a row, with commas between."""
        prompt, values = self.prompt or "{", self._values(row)
        if "{" not in prompt:
            return prompt if values.get(prompt) in (None, "", []) else ""
        names = sorted(names_in(self.prompt or "") - {ASKED})
        return ", ".join(name for name in names if not as_words(values.get(name), name))

    def tell_lacking(self, lacks: Sequence[str], name: str) -> None:
        """Log in how many rows of the dataset `name` which columns are empty: their teacher has no context.

        Raises:
            NoUsableRowsError: in all of the training rows, though a context is all that the teacher has of its own.
        """
        counts = Counter(column for columns in lacks if columns for column in columns.split(", "))
        if not counts:
            return
        told = ", ".join(f"{count} have nothing in {column!r}" for column, count in counts.items())
        if all(lacks) and name == "train" and self.system is None:
            raise NoUsableRowsError(
                f"Got {len(lacks)} rows in dataset {name!r}, of which {told}: in none of them does the teacher read "
                "more than the student; expected a context in some. Fill the column, or leave it and `teacher_prompt` "
                "out."
            )
        logger.warning(
            "Dataset %r, %d rows: %s, which `teacher_prompt` names, so that %d have a teacher that reads the same "
            "question as the student.",
            name,
            len(lacks),
            told,
            sum(map(bool, lacks)),
        )

    def _of_text(self, text: str, asked: str, tokens: TokenizedRow, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """A text before a completion that is text: the system prompt is its first paragraph."""
        own = self.tokenizer or tokenizer
        whole = text if self.system is None else f"{self.system}\n\n{text}"
        lost = tokens.get("straddled", 0)  # tokens at the prompt's end that the completion's first one has taken in
        if self.other is not None:
            known = text_ids(asked, tokenizer) if lost else []
            end = self.other.text_of(known[-lost:], known[:-lost]) if lost else ""
            return text_ids(whole.removesuffix(end), own)
        ids = text_ids(whole, own)
        return ids[: len(ids) - lost] if lost and text_ids(asked, own)[-lost:] == ids[-lost:] else ids

    def _of_messages(
        self,
        said: Any,
        asked: str | Sequence[Message],
        tokens: TokenizedRow,
        tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any],
    ) -> list[int]:
        if self.why_no_chat:
            what = "a prompt of the teacher's own" if self.other is None else "a teacher with a tokenizer of its own"
            raise ConfigurationError(f"Got a conversation with {what}, but {self.why_no_chat}")
        # A prompt alone may end in the assistant's own beginning.
        begun = start_of_view(tokens) == len(tokens["input_ids"])
        header, chat = "", Chat(self.tokenizer or tokenizer, settings=settings)
        if isinstance(asked, str):
            messages = list(said)
        else:
            chat, header = prompt_chat(asked, tokens, tokenizer, self.tokenizer, settings, begun=begun)
            messages = said if isinstance(said, list) else asking(asked, said)
        if self.system is not None:
            messages = _with_system(messages, self.system)
        try:
            return rendered_prompt(chat, messages, header=header, begun=begun)
        except RenderingError as error:
            raise DatasetError(f"The teacher's prompt cannot be rendered: {error}") from error


# ---- Templates ------------------------------------------------------------------------------------------------------


def names_in(template: str, setting: str = "teacher_prompt") -> set[str]:
    """Return the columns that a template names; `setting` is whose template it is, for messages.

    Raises:
        ConfigurationError: braces that do not close, or more than a column's name in them.
    """
    return {name for _, name in _parts(template, setting) if name is not None}


def filled(template: str, values: Mapping[str, str], setting: str = "teacher_prompt") -> str:
    """Put texts into a template; `{{` and `}}` are braces. Nothing of a text is read as a template."""
    return "".join(text + ("" if name is None else values[name]) for text, name in _parts(template, setting))


def renamed(template: str, names: Mapping[str, str]) -> str:
    """Return a template, or a column's name, under which columns are called as `names` says."""
    if "{" not in template:
        return names.get(template, template)
    texts = [(text.replace("{", "{{").replace("}", "}}"), name) for text, name in _parts(template)]
    return "".join(text + ("" if name is None else f"{{{names.get(name, name)}}}") for text, name in texts)


def _parts(template: str, setting: str = "teacher_prompt") -> list[tuple[str, str | None]]:
    problem = ""
    parts = []
    try:
        for text, name, form, conversion in Formatter().parse(template):
            if name is not None and (not name.strip() or form or conversion):
                problem = f"{{{name}}} names no column"
            parts.append((text, name))
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ConfigurationError(
            f"Got `{setting}: {template!r:.80}`, which is no template ({problem}); expected the names of columns in "
            "braces, such as '{prompt}\\n\\nHint: {hint}'; `{{` stands for a brace."
        )
    return parts


def as_words(value: Any, column: str) -> str:
    """A column's value within a text; a column of a CSV file holds floats once a number is missing, which is NaN."""
    if is_conversation(value):
        return "\n\n".join(str(message["content"] or "") for message in to_chatml(value)).strip()
    if isinstance(value, float):
        whole = value.is_integer() and abs(value) < _WHOLE
        return "" if math.isnan(value) else str(int(value) if whole else value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = as_text(value, column=column)
    return text if text.strip() else ""


def _as_ids(value: Any, column: str, vocab_size: int) -> list[int]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise DatasetError(
            f"Column {column!r} holds {type(value).__name__} ({value!r:.80}); expected a list of token ids, as the "
            "rows hold them. Tokenise it, or give text for prompts and completions."
        )
    strange = [token for token in value if not 0 <= token < vocab_size]
    if strange:
        raise DatasetError(
            f"Column {column!r} holds the token id {strange[0]}; expected ids from 0 to {vocab_size - 1}, those of the "
            "student's tokenizer. Tokenise it with that one."
        )
    return value


# ---- Messages -------------------------------------------------------------------------------------------------------


def _up_to_first_answer(asked: Sequence[Message], tokens: TokenizedRow) -> list[Message]:
    """The messages before the first answer that is trained."""
    if start_of_view(tokens) == tokens["prompt_length"]:
        return list(asked)
    return list(asked)[: next(i for i, message in enumerate(asked) if i and is_trained(message))]


def question_of(messages: Sequence[Message]) -> str:
    """The text of the last message of a user."""
    said = [message["content"] for message in messages if message["role"] == "user"]
    return said[-1] if said and isinstance(said[-1], str) else ""


def asking(messages: Sequence[Message], text: str | None) -> list[Message]:
    """The same messages with another text of the last user's."""
    if text is None:
        return list(messages)
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        roles = [message["role"] for message in messages]
        raise DatasetError(
            f"The prompt has the roles {roles}: there is no user's message that another text for the teacher could "
            "stand for. Give the whole prompt as a column of messages, or take the row out."
        )
    return [*messages[: users[-1]], {**messages[users[-1]], "content": text}, *messages[users[-1] + 1 :]]


def _with_system(messages: Sequence[Message], text: str) -> list[Message]:
    first = messages[0] if messages else None
    if first is None or first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{text}\n\n{first['content'] or ''}".rstrip()}, *messages[1:]]


def prompt_chat(
    asked: Sequence[Message],
    tokens: TokenizedRow,
    tokenizer: PreTrainedTokenizerBase,
    own: PreTrainedTokenizerBase | None,
    settings: dict[str, Any],
    *,
    begun: bool,
) -> tuple[Chat, str]:
    """Return what renders the teacher's prompt of a row of messages, and the header to write behind it.

    Args:
        asked: the student's prompt.
        own: the teacher's tokenizer, if it has a chat template of its own.
        begun: the prompt may end in the assistant's own beginning.
    """
    before = tokens["input_ids"][: start_of_view(tokens)]
    student, header = _chat_of(Chat(tokenizer, settings=settings), asked, before, begun, tokens)
    chat = Chat(own, settings=settings) if own is not None and own is not tokenizer else student
    return chat, header and chat.header


def _chat_of(
    chat: Chat, asked: Sequence[Message], ids: Sequence[int], begun: bool, tokens: TokenizedRow
) -> tuple[Chat, str]:
    """The template by which a prompt became these ids, and the header that it lacks behind a tool's result."""
    messages = bare(chat, list(asked))
    for template in dict.fromkeys((chat.template, training_template(chat.tokenizer))):
        other = replace(chat, template=template)
        for header in ("", other.header) if messages and messages[-1]["role"] == "tool" else ("",):
            try:
                if rendered_prompt(other, messages, header=header, begun=begun, remedies=False) == list(ids):
                    return other, header
            except RenderingError:
                continue
    if start_of_view(tokens) < tokens["prompt_length"]:
        raise DatasetError(
            "The chat template renders the first prompt differently once the conversation goes on, so the teacher's "
            "own prompt cannot take its place before the later turns. Set assistant_only_loss to false, or "
            "tokenizer.chat_template to one that renders both alike."
        )
    return chat, ""
