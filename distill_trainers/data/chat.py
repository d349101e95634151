"""Conversations to text and token ids: the prompt as generation sees it, and the completion; checked to say all."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import wraps
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from distill_trainers.data.deadline import EndlessTemplateError, rendering_deadline
from distill_trainers.data.messages import Message, forms
from distill_trainers.data.rendering import Piece, is_garbled, lost_piece, stand_ins
from distill_trainers.exceptions import DatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RenderingError(DatasetError):
    """A template does not say what the messages say, or not where it is looked for; another template may.

    Args:
        what: was got, as a sentence.
        remedy: what to do, as a sentence.
    """

    def __init__(self, what: str, remedy: str):
        super().__init__(f"{what} {remedy}")
        self.what, self.remedy = what, remedy


class PromptDiffersError(RenderingError):
    """The template renders the prompt differently once the answer follows; `opened` is what it alone ends in."""

    opened = ""


@dataclass(frozen=True)
class Chat:
    """A tokenizer with the template and template settings of one row.

    Args:
        tokenizer: needs a chat template.
        template: used in place of the tokenizer's own, or None.
        settings: keyword arguments for the template (`tools`, `enable_thinking`, …).
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def prompt(self, messages: Sequence[Message], *, thinking: Collection[int] = ()) -> str:
        """Render the text after which the assistant starts a turn, its header included."""
        return self.rendered(messages, thinking=thinking, add_generation_prompt=True)[0]

    def prompt_in(self, text: str, messages: Sequence[Message]) -> str:
        """Render the prompt of the answer that follows `messages` in the text of a longer conversation."""
        prompt = self.prompt(messages)
        # Some templates open no turn for the answer to a tool's result, but write a header once it is there.
        header = self.header if messages[-1]["role"] == "tool" else ""
        return prompt + header if text.startswith(prompt + header) else prompt

    def begun_turn(self, messages: Sequence[Message]) -> str:
        """Render the text after which the assistant goes on with the last message, which is its own."""
        return self.rendered(messages, thinking=(len(messages) - 1,), continue_final_message=True)[0]

    def conversation(self, messages: Sequence[Message], *, thinking: Collection[int] = ()) -> str:
        """Render the text of finished turns."""
        return self.rendered(messages, thinking=thinking)[0]

    @property
    def header(self) -> str:
        """What the template writes to open an assistant's turn."""
        question = [{"role": "user", "content": "a"}]
        opened, text = self.prompt(question), self.conversation(question)
        return opened.removeprefix(text) if opened.startswith(text) else ""

    def ids(self, text: str) -> list[int]:
        """Tokenise rendered text, to which no special token is added: the template wrote them."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def rendered(
        self, messages: Sequence[Message], *, thinking: Collection[int] = (), **turn: Any
    ) -> tuple[str, list[Message]]:
        """Render messages, in the first form of which the template loses nothing, and return that form, too.

        Args:
            messages: as `to_chatml` returns them.
            thinking: numbers of messages whose thinking must be rendered, because it is trained.
            turn: how the template ends: nothing, `add_generation_prompt` or `continue_final_message`.

        Raises:
            DatasetError: no template.
            RenderingError: the template refuses the conversation or drops some of it.
        """
        problems: list[RenderingError] = []
        stands = stand_ins(messages)
        for form, of_stands in zip(forms(messages), forms(stands), strict=True):
            try:
                text = self._apply(form, **turn)
            except RenderingError as error:
                problems.append(error)
                continue
            if is_garbled(form, text):
                continue
            lost = lost_piece(messages, text, thinking=thinking, tools=self.settings.get("tools"))
            lost = lost or self._lost_stand_in(stands, of_stands, thinking, **turn)
            if lost is None:
                return text, form
            problems.append(self._loss(lost, messages))
        # That of the form of which most was rendered.
        raise max(problems, key=lambda problem: problem.lost.number if isinstance(problem, LostTextError) else -1)

    @property
    def source(self) -> str:
        """The template in use.

        Raises:
            DatasetError: there is none.
        """
        template = self.template or self.tokenizer.chat_template
        if template is None:
            raise DatasetError(
                f"The rows are conversations, but the tokenizer {self.tokenizer.name_or_path!r} has no chat template. "
                "Use that of an instruction-tuned model, set tokenizer.chat_template, or give prompt and completion as "
                "strings."
            )
        return str(template)

    def _apply(self, messages: list[Message], **turn: Any) -> str:
        try:
            with rendering_deadline(self.tokenizer.name_or_path):
                text = str(
                    self.tokenizer.apply_chat_template(
                        messages, tokenize=False, chat_template=self.template, **turn, **self.settings
                    )
                )
        except EndlessTemplateError:
            raise
        except _failures() as error:
            roles = [message["role"] for message in messages]
            raise RenderingError(
                f"The chat template refuses a conversation with the roles {roles}: {error}.",
                "Bring the rows into the order the template expects, or use another template.",
            ) from error
        bos = self.tokenizer.bos_token
        while bos and text.startswith(bos * 2):  # the template's, and one that a message began with
            text = text[len(bos) :]
        return text

    def _lost_stand_in(
        self, stands: list[Message], form: list[Message], thinking: Collection[int], **turn: Any
    ) -> Piece | None:
        shape = json.dumps([form, sorted(thinking), turn, self.settings], default=str)
        key = (self.source, shape)
        if key not in _SHAPES:
            if len(_SHAPES) > 1000:
                _SHAPES.clear()
            try:
                _SHAPES[key] = lost_piece(stands, self._apply(form, **turn), thinking=thinking)
            except RenderingError:  # a template that wants certain texts
                _SHAPES[key] = None
        return _SHAPES[key]

    def _loss(self, lost: Piece, messages: Sequence[Message]) -> RenderingError:
        name = self.tokenizer.name_or_path
        where = f"The chat template of {name!r}" if name else "The chat template"
        if lost.what == "tool":
            return LostTextError(
                f"{where} does not render the function {lost.text!r} of `tools`.",
                "Set tokenizer.chat_template to one that knows tools, or remove the column `tools`.",
                lost,
            )
        content = messages[lost.number].get("content")
        shown = content if lost.what == "text" else lost.text
        return LostTextError(
            f"{where} loses the {lost.what} of message {lost.number} (role {lost.role!r}): {str(shown)[:80]!r} is not "
            "at its place in what it renders.",
            "Set tokenizer.chat_template to one that renders it, or remove the message.",
            lost,
        )


class LostTextError(RenderingError):
    """A template does not render something that a message says."""

    def __init__(self, what: str, remedy: str, lost: Piece):
        super().__init__(what, remedy)
        self.lost = lost


def _failures() -> tuple[type[Exception], ...]:
    """How templates fail: they are programs, which may meet what they do not expect."""
    from jinja2 import TemplateError

    return (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    )


# What each template loses of each shape of conversation that was met.
_SHAPES: dict[tuple[str, str], Piece | None] = {}


def split_conversation(
    chat: Chat, prompt: Sequence[Message], completion: Sequence[Message]
) -> tuple[list[int], list[int]]:
    """Tokenise the prompt (generation prompt included) and what the template renders after it.

    The prompt's ids are exactly those from which generation starts, so training and rollouts share them.

    Raises:
        DatasetError: the rendered conversation does not begin with the rendered prompt.
    """
    thinking = range(len(prompt), len(prompt) + len(completion))
    whole_text = chat.conversation([*prompt, *completion], thinking=thinking)
    prompt_text = chat.prompt_in(whole_text, prompt)
    prompt_ids, whole_ids = chat.ids(prompt_text), chat.ids(whole_text)
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, close_turn(chat.tokenizer, whole_ids[len(prompt_ids) :])
    if whole_text.startswith(prompt_text):
        # A token straddles the border (a completion that begins with a newline, after the header's newline).
        return prompt_ids, close_turn(chat.tokenizer, chat.ids(whole_text[len(prompt_text) :]))
    error = PromptDiffersError(
        "The chat template renders the prompt differently once the answer follows, so the completion cannot be told "
        f"from the prompt. The prompt ends in {prompt_text[-60:]!r}; the conversation has "
        f"{whole_text[max(0, len(prompt_text) - 60) : len(prompt_text) + 40]!r} there.",
        "Set tokenizer.chat_template to one that renders both alike.",
    )
    error.opened = prompt_text[len(commonprefix([prompt_text, whole_text])) :]
    raise error


def close_turn(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """End a rendered completion where generation would end it.

    White space that the template writes after the end-of-turn token goes. A foreign EOS is not added to an end-of-turn
    token; a template that writes no special token at the end gets the tokenizer's EOS, or the student never stops.
    """
    end = turn_end(tokenizer, ids)
    if end is not None:
        # An answer that brought its own end of turn ends there.
        before = turn_end(tokenizer, ids[: end - 1])
        return close_turn(tokenizer, ids[:before]) if before and ids[before - 1] == ids[end - 1] else ids[:end]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function of a tokenizer, and of what may change in it, once; for as long as the tokenizer lives."""
    known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[Any, ...], Any]] = weakref.WeakKeyDictionary()

    @wraps(function)
    def call(tokenizer: PreTrainedTokenizerBase, *key: Any) -> Any:
        answers = known.setdefault(tokenizer, {})
        if key not in answers:
            answers[key] = function(tokenizer, *key)
        return answers[key]

    return call


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return TRL's template with {% generation %} markers for the tokenizer's; None where it has or needs none."""
    template = tokenizer.chat_template
    return _training_template(tokenizer, str(template)) if template else None


@_remembered
def _training_template(tokenizer: PreTrainedTokenizerBase, _template: str) -> str | None:
    # The second argument is part of the key only: a tokenizer whose template was replaced is another case.
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    try:
        if has_generation_markers(tokenizer.chat_template):
            return None
        with rendering_deadline(tokenizer.name_or_path):  # it tries the tokenizer's own
            return get_training_chat_template(tokenizer)
    except EndlessTemplateError:
        raise
    except _failures():
        return None


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token with which the tokenizer's chat template ends an assistant's turn; None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return _turn_end_id(tokenizer, str(template), len(tokenizer)) if template else None


@_remembered
def _turn_end_id(tokenizer: PreTrainedTokenizerBase, _template: str, _tokens: int) -> int | None:
    try:
        text = Chat(tokenizer).conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except DatasetError:  # a template that wants more than messages
        return None
    ids = Chat(tokenizer).ids(text)
    end = turn_end(tokenizer, ids)
    return None if end is None else int(ids[end - 1])


def turn_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int | None:
    """The position behind the end-of-turn token that only white space follows, or None where there is no such token."""
    end = len(ids)
    while end and not _is_special(tokenizer, ids[end - 1]) and not str(tokenizer.decode([ids[end - 1]])).strip():
        end -= 1
    return end if end and _is_special(tokenizer, ids[end - 1]) else None


def _is_special(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    if token_id in tokenizer.all_special_ids:
        return True
    # End-of-turn tokens such as Gemma's are special without being any of the tokenizer's named ones.
    added = tokenizer.added_tokens_decoder.get(token_id)
    return added is not None and added.special
