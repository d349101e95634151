"""Which tokens of a conversation assistants wrote."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from distill_trainers.data.chat import Chat, RenderingError, turn_end
from distill_trainers.data.deadline import rendering_deadline
from distill_trainers.data.messages import Message, is_trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TurnsNotFoundError(RenderingError):
    """The template neither marks assistant turns nor renders them the same whatever follows."""


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
        mask = _mask_by_markers(chat, messages, ids, generation_prompt=generation_prompt)
        if mask is not None:
            return mask
    return _mask_by_prefixes(chat, messages, ids, generation_prompt=generation_prompt)


def _mask_by_markers(
    chat: Chat, messages: Sequence[Message], ids: Sequence[int], *, generation_prompt: bool
) -> list[int] | None:
    """None where the marked stretches cannot be told apart by turns, or are of other tokens."""
    turn: dict[str, Any] = {"add_generation_prompt": True} if generation_prompt else {}
    text, form = chat.rendered(messages, **turn)
    with rendering_deadline(chat.tokenizer.name_or_path):
        rendered: Any = chat.tokenizer.apply_chat_template(
            form,
            chat_template=chat.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
            **turn,
            **chat.settings,
        )
    if rendered["input_ids"][: len(ids)] != list(ids):
        return None
    marked = _with_whole_characters(rendered["assistant_masks"], rendered["offset_mapping"])
    mask = _close_turns(chat.tokenizer, ids, marked[: len(ids)])
    starts = [i for i, on in enumerate(mask) if on and not (i and mask[i - 1])]
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if len(starts) != len(turns):
        return mask if all(is_trained(messages[number]) for number in turns) else None
    headed = True
    for start, number in zip(starts, turns, strict=True):
        end = next((i for i in range(start, len(mask)) if not mask[i]), len(mask))
        spoken = start
        if number and (headed or messages[number - 1]["role"] == "tool"):
            # A header that the markers take in is the template's, not the assistant's.
            spoken = max(start, _common(chat.ids(chat.prompt_in(text, messages[:number])), ids))
            headed = headed and spoken > start
        spoken = spoken if is_trained(messages[number]) else end
        mask[start:spoken] = [0] * (spoken - start)
    return mask


def _mask_by_prefixes(
    chat: Chat, messages: Sequence[Message], ids: Sequence[int], *, generation_prompt: bool
) -> list[int]:
    text = chat.prompt(messages) if generation_prompt else chat.conversation(messages)
    mask = [0] * len(ids)
    for turn, message in enumerate(messages):
        # A first turn has no header that could be rendered without it, so it stays context.
        if not is_trained(message) or turn == 0:
            continue
        before = chat.prompt_in(text, messages[:turn])
        after = chat.conversation(messages[: turn + 1]).rstrip()
        if not (text.startswith(after) and after.startswith(before.rstrip())):
            raise TurnsNotFoundError(
                f"assistant_only_loss cannot locate assistant turn {turn}: the chat template renders earlier turns "
                "differently once others follow, and marks no assistant text.",
                "Set assistant_only_loss to false (the "
                "last answer of each row is trained), or give the tokenizer a template with {% generation %} markers.",
            )
        # Where a token straddles the border it is the first one that differs, and it counts as the assistant's.
        start = _common(chat.ids(before), ids)
        end = _common(chat.ids(after), ids)
        mask[start:end] = [1] * max(0, end - start)
    return mask


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    from trl.data_utils import common_prefix_length

    return common_prefix_length(list(some), list(others))


def _with_whole_characters(mask: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    # Of a last character that is several tokens, as an emoji's bytes are, transformers marks the first alone.
    whole = list(mask)
    for i in range(1, len(whole)):
        start, end = offsets[i]
        if whole[i - 1] and end > start and tuple(offsets[i - 1]) == (start, end):
            whole[i] = 1
    return whole


def _close_turns(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], mask: Sequence[int]) -> list[int]:
    # Markers often take in the white space that the template writes after a turn; generation never does.
    closed = [0] * len(ids)
    start = 0
    for trained, run in groupby(mask):
        stop = start + len(list(run))
        if trained:
            end = turn_end(tokenizer, ids[start:stop])
            length = stop - start if end is None else end
            closed[start : start + length] = [1] * length
        start = stop
    return closed
