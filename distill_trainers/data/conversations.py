"""One conversation to token ids with labels, by a template that says all of it, or a refusal that names what helps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from distill_trainers.data.chat import (
    Chat,
    LostTextError,
    PromptDiffersError,
    RenderingError,
    split_conversation,
    training_template,
    turn_end_id,
)
from distill_trainers.data.formats import DatasetType, as_messages, conversation_of
from distill_trainers.data.labels import TokenizedRow, labels_of, row_of
from distill_trainers.data.messages import THINKING, Message, as_json, is_trained
from distill_trainers.data.turns import TurnsNotFoundError, assistant_mask
from distill_trainers.exceptions import DatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Turns = tuple[list[Message], list[Message]]  # prompt and completion


def tokenize_conversation(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset_type: DatasetType,
    assistant_only_loss: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    answer_last: bool = False,
) -> TokenizedRow:
    """Tokenise a row of messages (see `tokenize_row`).

    Args:
        answer_last: one that ends with another role than the assistant's is a prompt, though it holds answers.

    Raises:
        DatasetError: a message or a setting of the wrong kind, or a template that loses or moves text.
    """
    chat = Chat(tokenizer, settings=template_settings(row, chat_template_kwargs))
    prompt, completion = turns_of(row, dataset_type, answer_last=answer_last)
    if not prompt:
        # No template renders a header of nothing, so there is no prompt and nothing that could be told from it.
        return row_of([], [])
    history = assistant_only_loss and dataset_type == "messages"
    return _first_that_works(chat, (prompt, completion), lambda chat, turns: _tokenized(chat, *turns, history=history))


def turns_of(row: Mapping[str, Any], dataset_type: DatasetType, *, answer_last: bool = False) -> Turns:
    """Read the prompt and the completion of a row of messages."""
    if dataset_type == "messages":
        prompt, completion = prompt_and_answer(conversation_of(row), answer_last=answer_last)
    else:
        prompt = as_messages(row["prompt"], role="user")
        completion = as_messages(row["completion"], role="assistant") if dataset_type == "prompt_completion" else []
    system = row.get("system")  # LLaMA-Factory's ShareGPT keeps it in a column of its own
    if isinstance(system, str) and system.strip() and not (prompt and prompt[0]["role"] in ("system", "developer")):
        prompt = [{"role": "system", "content": system}, *prompt]
    return prompt, completion


def rendered_prompt(
    chat: Chat, prompt: Sequence[Message], *, header: str = "", begun: bool = False, remedies: bool = True
) -> list[int]:
    """Tokenise a prompt as generation sees it.

    Args:
        header: opens the assistant's turn where the template does not.
        begun: an assistant's message at the end is gone on with.
        remedies: try other templates where this one fails, and say what would help.

    Raises:
        DatasetError: no template serves.
    """

    def tokenize(chat: Chat, turns: Turns) -> list[int]:
        return chat.ids(_prompt_text(chat, turns[0], header, begun))

    turns: Turns = (list(prompt), [])
    return _first_that_works(chat, turns, tokenize) if remedies else tokenize(chat, turns)


def rendered_around(
    chat: Chat, prompt: Sequence[Message], mark: str, *, header: str = "", begun: bool = False
) -> tuple[str, str]:
    """Return what is rendered before and behind `mark`, a text in one of the messages; else as `rendered_prompt`.

    Raises:
        DatasetError: no template serves, or the mark is not there once.
    """

    def split(chat: Chat, turns: Turns) -> tuple[str, str]:
        text = _prompt_text(chat, turns[0], header, begun)
        if text.count(mark) != 1:
            raise RenderingError(
                f"The chat template writes the question {text.count(mark)} times.",
                "Set tokenizer.chat_template to one that writes it once.",
            )
        head, _, tail = text.partition(mark)
        return head, tail

    around: tuple[str, str] = _first_that_works(chat, (list(prompt), []), split)
    return around


def _prompt_text(chat: Chat, prompt: Sequence[Message], header: str, begun: bool) -> str:
    goes_on = begun and prompt[-1]["role"] == "assistant"
    return chat.begun_turn(prompt) if goes_on else chat.prompt(prompt) + header


def split_turns(chat: Chat, prompt: Sequence[Message], completion: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Tokenise prompt and completion as `split_conversation` does, by TRL's training template where only that serves.

    Raises:
        DatasetError: no template serves.
    """
    return _first_that_works(
        chat, (list(prompt), list(completion)), lambda chat, turns: split_conversation(chat, *turns)
    )


def template_settings(row: Mapping[str, Any], settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings for the chat template: the row's `chat_template_kwargs` over `settings`, and its `tools`.

    Raises:
        DatasetError: one of the two is broken text or of the wrong kind.
    """
    own = as_json(row.get("chat_template_kwargs") or {}, "Column 'chat_template_kwargs'", "a JSON object")
    if not isinstance(own, Mapping):
        raise DatasetError(
            f"Column 'chat_template_kwargs' holds {type(own).__name__} ({own!r:.80}), expected a mapping of settings, "
            "or its JSON text. Mend the row."
        )
    merged = {**(settings or {}), **{key: value for key, value in own.items() if value is not None}}
    tools = as_json(row.get("tools") or None, "Column 'tools'", "a list of function schemas, or its JSON text")
    if isinstance(tools, list):
        tools = [as_json(tool, f"Tool {i}", "a function schema") for i, tool in enumerate(tools)]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise DatasetError(
            f"Column 'tools' holds {type(tools).__name__} ({tools!r:.80}), expected a list of function schemas "
            "{type: function, function: {name, description, parameters}}, or its JSON text. Mend the row."
        )
    return {**merged, "tools": tools} if tools else merged


def prompt_and_answer(messages: list[Message], *, answer_last: bool = False) -> Turns:
    """Split a conversation into what comes before its last answer that may be trained, and that answer, if any.

    Args:
        answer_last: one that ends with another role than the assistant's is a prompt, though it holds answers.
    """
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answers = [i for i in spoken if is_trained(messages[i])] or spoken
    if not answers or (answer_last and spoken[-1] < len(messages) - 1):
        return messages, []
    return messages[: answers[-1]], messages[answers[-1] : answers[-1] + 1]


def _tokenized(chat: Chat, prompt: list[Message], completion: list[Message], *, history: bool) -> TokenizedRow:
    if all(_is_silent(message) for message in completion):
        begun = not completion and prompt[-1]["role"] == "assistant"
        return row_of(chat.ids(chat.begun_turn(prompt) if begun else chat.prompt(prompt)), [])
    prompt_ids, completion_ids = split_conversation(chat, prompt, completion)
    row = row_of(prompt_ids, completion_ids)
    if not all(map(is_trained, completion)):
        # What a tool or a user says inside the completion is context: the student must not learn to write it.
        mask = [0] * len(row["input_ids"])
        if any(map(is_trained, completion)):
            mask = assistant_mask(chat, [*prompt, *completion], row["input_ids"], generation_prompt=False)
        row["labels"] = labels_of(row["input_ids"], [0] * len(prompt_ids) + mask[len(prompt_ids) :])
    if history and any(map(is_trained, prompt)):
        chat.prompt(prompt, thinking=[i for i, message in enumerate(prompt) if is_trained(message)])
        trained = assistant_mask(chat, prompt, prompt_ids, generation_prompt=True)
        row["labels"] = labels_of(prompt_ids, trained) + row["labels"][len(trained) :]
    return row


def _is_silent(message: Message) -> bool:
    content = message["content"]
    text = content.strip() if isinstance(content, str) else content
    return not text and not message.get("tool_calls") and not any(message.get(name) for name in THINKING)


def bare(chat: Chat, messages: list[Message]) -> list[Message]:
    """Take BOS off the beginning and ends of turns off the end of messages that say more: the template writes them."""
    tokenizer = chat.tokenizer
    end_id = turn_end_id(tokenizer)
    ends = tuple({tokenizer.eos_token, end_id is not None and str(tokenizer.decode([end_id]))} - {None, False, ""})
    bare = []
    for message in messages:
        text = message["content"]
        if isinstance(text, str) and ends:
            if tokenizer.bos_token and tokenizer.bos_token not in ends:
                text = text.removeprefix(tokenizer.bos_token)
            while text.rstrip().endswith(ends):
                text = text.rstrip()
                text = text[: -max(len(end) for end in ends if text.endswith(end))]
        bare.append({**message, "content": text} if text else message)
    return bare


# ---- What helps where a template does not serve ---------------------------------------------------------------------


def _first_that_works(chat: Chat, turns: Turns, tokenize: Callable[[Chat, Turns], Any]) -> Any:
    turns = (bare(chat, turns[0]), bare(chat, turns[1]))
    try:
        return tokenize(chat, turns)
    except RenderingError as error:
        problem = error
    template = None if chat.template else training_template(chat.tokenizer)
    known = chat if template is None else replace(chat, template=template)
    for other in dict.fromkeys((known.template, chat.template)):
        for thought in (turns, _thinking_in_text(turns)) if "<think>" in known.source else (turns,):
            attempt = replace(chat, template=other)
            if (attempt, thought) == (chat, turns) or thought is None:
                continue
            try:
                done = tokenize(attempt, thought)
            except RenderingError:
                continue
            if other is not None:
                _tell_template(chat.tokenizer.name_or_path)
            return done
    if isinstance(problem, TurnsNotFoundError):
        raise problem
    remedies = list(_remedies(known, turns, problem))
    helps = [text for text, chat_then, turns_then in remedies if _cures(problem, tokenize, chat_then, turns_then)]
    if not helps:
        raise problem
    remedy = f"What helps: {'; or '.join(helps)}. Or set tokenizer.chat_template to another."
    raise RenderingError(problem.what, remedy) from problem


def _cures(problem: RenderingError, tokenize: Callable[[Chat, Turns], Any], chat: Chat, turns: Turns) -> bool:
    try:
        tokenize(chat, turns)
    except PromptDiffersError:
        return isinstance(problem, LostTextError)  # another fault of the row, which is told next
    except DatasetError:
        return False
    return True


@cache
def _tell_template(name: str) -> None:
    logger.warning(
        "The chat template of %r drops or moves what assistants say in some rows: those are rendered by TRL's training "
        "template for it, which keeps it.",
        name,
    )


def _thinking_in_text(turns: Turns) -> Turns | None:
    """What assistants thought as part of what they say, as reasoning models write it; None where there is none."""

    def moved(message: Message) -> Message:
        thought = next((message[name] for name in THINKING if message.get(name)), None)
        content = message["content"] or ""
        if thought is None and isinstance(content, str) and content.startswith("<think>") and "</think>" in content:
            thought, content = content.removeprefix("<think>").split("</think>", 1)
        if message["role"] != "assistant" or thought is None:
            return message
        text = f"<think>\n{thought.strip()}\n</think>\n\n{content.lstrip()}"
        return {**{key: value for key, value in message.items() if key not in THINKING}, "content": text}

    changed: Turns = ([moved(m) for m in turns[0]], [moved(m) for m in turns[1]])
    return None if changed == turns else changed


def _remedies(chat: Chat, turns: Turns, problem: RenderingError) -> Iterator[tuple[str, Chat, Turns]]:
    """Changes of the row or its settings, each with what the row would then be."""
    prompt, completion = turns
    if isinstance(problem, PromptDiffersError):
        for name in ("enable_thinking", "thinking"):
            settings = {**chat.settings, name: False}
            yield f"set chat_template_kwargs to {{{name}: false}}", replace(chat, settings=settings), turns
        opened = problem.opened.strip()
        if opened:
            starts = f"{opened}\n\n</think>\n\n" if opened == "<think>" else opened
            begun = [{**m, "content": f"{starts}{m['content'] or ''}"} for m in completion[:1]] + completion[1:]
            without = f" ({starts!r} where there is none)" if opened == "<think>" else ""
            text = f"begin the answers with their thinking, as {problem.opened!r} opens it{without}"
            yield text, chat, (prompt, begun)
    if isinstance(problem, LostTextError) and problem.lost.number >= 0:
        for text, messages in _changes([*prompt, *completion], problem.lost.number, problem.lost.what):
            split = len(messages) - len(completion)
            yield text, chat, (messages[:split], messages[split:])


def _changes(messages: list[Message], number: int, what: str) -> Iterator[tuple[str, list[Message]]]:
    """The conversation with the message `number` in a form that the template may render."""
    message, before, after = messages[number], messages[:number], messages[number + 1 :]
    if what == "thinking":
        moved = _thinking_in_text((messages, []))
        if moved is not None:
            yield "put the thinking into content, as <think>…</think>", moved[0]
        bare = {key: value for key, value in message.items() if key not in THINKING}
        yield f"remove the thinking of message {number}", [*before, bare, *after]
    if message["role"] == "developer":
        yield "name the role 'system'", [*before, {**message, "role": "system"}, *after]
    if message["role"] not in ("developer", "system", "user", "assistant", "tool"):
        yield "name the role 'tool'", [*before, {**message, "role": "tool"}, *after]
    if message["role"] in ("developer", "system"):
        heir = next((i for i, m in enumerate(after) if m["role"] == "user"), None)
        if heir is not None:
            joined = {**after[heir], "content": f"{message['content']}\n\n{after[heir]['content']}"}
            yield "put its text into the user's next message", [*before, *after[:heir], joined, *after[heir + 1 :]]
        if before and before[0]["role"] == "system":
            joined = {**before[0], "content": f"{before[0]['content']}\n\n{message['content']}"}
            yield "put its text into the first system message", [joined, *before[1:], *after]
    elif message["role"] != "assistant":
        yield "name the role 'user'", [*before, {**message, "role": "user"}, *after]
