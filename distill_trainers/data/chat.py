"""Conversations to token ids: the prompt as generation sees it, the completion, and which tokens assistants wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from distill_trainers.data.formats import Message
from distill_trainers.exceptions import DatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TurnsNotFoundError(DatasetError):
    """The template neither marks assistant turns nor renders them the same whatever follows."""


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

    def prompt(self, messages: Sequence[Message]) -> str:
        """Render the text after which the assistant starts a turn, its header included."""
        return self._render(messages, add_generation_prompt=True)

    def begun_turn(self, messages: Sequence[Message]) -> str:
        """Render the text after which the assistant goes on with the last message, which is its own."""
        return self._render(messages, continue_final_message=True)

    def conversation(self, messages: Sequence[Message]) -> str:
        """Render the text of finished turns."""
        return self._render(messages)

    def ids(self, text: str) -> list[int]:
        """Tokenise rendered text, to which no special token is added: the template wrote them."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, messages: Sequence[Message], **turn: Any) -> str:
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None and self.template is None:
            raise DatasetError(
                f"The rows are conversations, but the tokenizer {self.tokenizer.name_or_path!r} has no chat template. "
                "Use that of an instruction-tuned model, set tokenizer.chat_template, or give prompt and completion as "
                "strings."
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, chat_template=self.template, **turn, **self.settings
            )
            return str(text)
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise DatasetError(
                f"The chat template refuses a conversation with the roles {roles}: {error}. Bring the rows into the "
                "order the template expects, or use another template."
            ) from error


def split_conversation(
    chat: Chat, prompt: Sequence[Message], completion: Sequence[Message]
) -> tuple[list[int], list[int]]:
    """Tokenise the prompt (generation prompt included) and what the template renders after it.

    The prompt's ids are exactly those from which generation starts, so training and rollouts share them.

    Raises:
        DatasetError: the rendered conversation does not begin with the rendered prompt.
    """
    prompt_text = chat.prompt(prompt)
    whole_text = chat.conversation([*prompt, *completion])
    prompt_ids, whole_ids = chat.ids(prompt_text), chat.ids(whole_text)
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, close_turn(chat.tokenizer, whole_ids[len(prompt_ids) :])
    if whole_text.startswith(prompt_text):
        # A token straddles the border (a completion that begins with a newline, after the header's newline).
        return prompt_ids, close_turn(chat.tokenizer, chat.ids(whole_text[len(prompt_text) :]))
    raise DatasetError(
        "The chat template renders the prompt differently once the answer follows, so the completion cannot be told "
        f"from the prompt. The prompt ends in {prompt_text[-60:]!r}; the conversation has "
        f"{whole_text[max(0, len(prompt_text) - 60) : len(prompt_text) + 40]!r} there. Choose chat_template_kwargs "
        "with which both agree (e.g. enable_thinking: false), keep the thinking part in the answers, or change "
        "tokenizer.chat_template (trl.chat_template_utils.get_training_chat_template knows versions for training)."
    )


def close_turn(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """End a rendered completion where generation would end it.

    White space that the template writes after the end-of-turn token goes. A foreign EOS is not added to an end-of-turn
    token; a template that writes no special token at the end gets the tokenizer's EOS, or the student never stops.
    """
    end = _turn_end(tokenizer, ids)
    if end is not None:
        return ids[:end]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def assistant_mask(
    chat: Chat, messages: Sequence[Message], ids: Sequence[int], *, generation_prompt: bool
) -> list[int]:
    """Mark with 1 every token of `ids` that an assistant turn of `messages` wrote, its end of turn included.

    Args:
        chat: with a template that marks assistant turns, or one that renders earlier turns the same whatever follows.
        messages: the conversation that `ids` renders.
        ids: its token ids; they may lack the template's white space at the end.
        generation_prompt: whether `ids` ends in the header of the turn to come.

    Raises:
        TurnsNotFoundError: the turns cannot be located.
    """
    from trl.chat_template_utils import has_generation_markers

    if has_generation_markers(chat.template or chat.tokenizer.chat_template):
        rendered: Any = chat.tokenizer.apply_chat_template(
            list(messages),
            chat_template=chat.template,
            add_generation_prompt=generation_prompt,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **chat.settings,
        )
        if rendered["input_ids"][: len(ids)] == list(ids):
            return _close_turns(chat.tokenizer, ids, rendered["assistant_masks"][: len(ids)])
    return _mask_by_prefixes(chat, messages, ids, generation_prompt=generation_prompt)


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return TRL's template with {% generation %} markers for the tokenizer's; None where it has or needs none."""
    template = tokenizer.chat_template
    return _training_template(tokenizer, str(template)) if template else None


@lru_cache(maxsize=8)
def _training_template(tokenizer: PreTrainedTokenizerBase, _template: str) -> str | None:
    # The second argument is part of the key only: a tokenizer whose template was replaced is another case.
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None


def _mask_by_prefixes(
    chat: Chat, messages: Sequence[Message], ids: Sequence[int], *, generation_prompt: bool
) -> list[int]:
    from trl.data_utils import common_prefix_length

    text = chat.prompt(messages) if generation_prompt else chat.conversation(messages)
    mask = [0] * len(ids)
    for turn, message in enumerate(messages):
        # A first turn has no header that could be rendered without it, so it stays context.
        if message["role"] != "assistant" or turn == 0:
            continue
        before = chat.prompt(messages[:turn])
        after = chat.conversation(messages[: turn + 1]).rstrip()
        if not (text.startswith(after) and after.startswith(before.rstrip())):
            raise TurnsNotFoundError(
                f"assistant_only_loss cannot locate assistant turn {turn}: the chat template renders earlier turns "
                "differently once others follow, and marks no assistant text. Set assistant_only_loss to false (the "
                "last answer of each row is trained), or give the tokenizer a template with {% generation %} markers."
            )
        # Where a token straddles the border it is the first one that differs, and it counts as the assistant's.
        start = common_prefix_length(chat.ids(before), list(ids))
        end = common_prefix_length(chat.ids(after), list(ids))
        mask[start:end] = [1] * max(0, end - start)
    return mask


def _close_turns(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], mask: Sequence[int]) -> list[int]:
    # Markers often take in the white space that the template writes after a turn; generation never does.
    closed = [0] * len(ids)
    start = 0
    for trained, run in groupby(mask):
        stop = start + len(list(run))
        if trained:
            end = _turn_end(tokenizer, ids[start:stop])
            length = stop - start if end is None else end
            closed[start : start + length] = [1] * length
        start = stop
    return closed


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token with which the tokenizer's chat template ends an assistant's turn; None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = Chat(tokenizer).conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except (DatasetError, TypeError):  # a template that wants more than messages
        return None
    ids = Chat(tokenizer).ids(text)
    end = _turn_end(tokenizer, ids)
    return None if end is None else int(ids[end - 1])


def _turn_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int | None:
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
