"""Do teacher and student read the same text as the same tokens, and does the student know where to stop?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ..data.arrow import without_filling
from ..data.chat import Chat, close_turn
from ..data.formats import as_messages, conversation_of, detect_dataset_type, is_conversation
from ..data.rows import tokenize_row
from ..exceptions import DatasetError, VocabularyError
from ..servers.openai import PROBE
from ..teachers.loading import has_files
from ..teachers.vocabulary import shared_vocabulary
from .alignment import check_alignment
from .case import Case
from .findings import Finding, Severity, error, note, warning

_ROWS = 50  # of the data that are tokenised twice
_CONVERSATION = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "That is 6."},
)


def check_tokens(case: Case) -> Iterator[Finding]:
    """Compare vocabularies, text, chat templates and special tokens of a pair."""
    if case.tokenizer is None:
        return
    if case.args.has_own_tokenizer:
        yield from _stops(case)
        yield from check_alignment(case)
        return
    yield from _special_tokens(case)
    vocabulary = list(_vocabulary(case))
    yield from vocabulary
    if any(finding.severity is Severity.ERROR for finding in vocabulary):
        return  # everything else would differ, too
    if case.teacher_tokenizer is None:
        if has_files(case.teacher, case.args):
            yield note(
                "tokens",
                f"No tokenizer could be read for the teacher {case.teacher!r}, so it was not compared with the "
                "student's.",
                "Save the teacher's tokenizer beside it.",
            )
        return
    different = list(_text(case))
    yield from different
    yield from _templates(case, already=bool(different))


def _vocabulary(case: Case) -> Iterator[Finding]:
    assert case.tokenizer is not None
    if case.student_config is None or case.teacher_config is None:
        return
    rows = [config.get_text_config().vocab_size for config in (case.student_config, case.teacher_config)]
    try:
        shared = shared_vocabulary(case.tokenizer, case.teacher_tokenizer, *rows)
    except VocabularyError as error:
        yield Finding.of_error("tokens", error)
        return
    if shared is not None:
        yield note(
            "tokens",
            f"The student's head has {rows[0]} rows and the teacher's {rows[1]}, of which the first {shared} are "
            "tokens of both: the vocabulary is padded.",
            "Nothing has to be done: rows beyond them leave both softmaxes.",
        )


# ---- Text -----------------------------------------------------------------------------------------------------------


def _text(case: Case) -> Iterator[Finding]:
    """The first row (or else a probe of numbers, spaces and scripts) that the two split differently."""
    student, teacher = case.tokenizer, case.teacher_tokenizer
    assert student is not None and teacher is not None
    student_ids, teacher_ids = student.encode(PROBE), teacher.encode(PROBE)
    what = "a probe of numbers, white space and scripts"
    if student_ids == teacher_ids:
        for number, row in enumerate(case.sample[:_ROWS]):
            if _is_chat(row):
                continue  # templates are compared by themselves
            pair = [_row_ids(row, tokenizer, case) for tokenizer in (student, teacher)]
            if None not in pair and pair[0] != pair[1]:
                (student_ids, teacher_ids), what = pair, f"row {number} of the training data"
                break
        else:
            return
    yield warning(
        "tokens",
        f"Student and teacher share their vocabulary but read {what} as different tokens: "
        f"{first_difference(student_ids, teacher_ids, student)}.",
        "The teacher is given the student's tokens and judges text in a form it rarely saw: use the teacher's "
        "tokenizer files for both (copy them beside the student), or a teacher of the student's family.",
    )


def _row_ids(row: dict[str, Any], tokenizer: Any, case: Case) -> list[int] | None:
    """A row without the EOS that ends it: where those differ, that is a finding of its own."""
    try:
        kind = detect_dataset_type(row)
        settings: Any = case.args.chat_template_kwargs
        ids = list(tokenize_row(row, tokenizer, dataset_type=kind, chat_template_kwargs=settings)["input_ids"])
    except (DatasetError, KeyError):
        return None  # the recipe's own check tells
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def first_difference(ours: Sequence[int], theirs: Sequence[int], tokenizer: Any, other: Any = None) -> str:
    """Tell where two sequences of ids part: position, the text before it, the next tokens of both."""
    at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    at = min(len(ours), len(theirs)) if at is None else at
    before = tokenizer.decode(list(ours[max(0, at - 8) : at]))

    def shown(ids: Sequence[int], who: Any) -> str:
        return ", ".join(f"{i} {who.convert_ids_to_tokens(int(i))!r}" for i in ids[at : at + 4]) or "nothing more"

    after = f" after {before!r}" if at else ""
    return f"from token {at} on{after}, the student has [{shown(ours, tokenizer)}], the teacher [" + (
        f"{shown(theirs, other or tokenizer)}]"
    )


# ---- Chat templates -------------------------------------------------------------------------------------------------


def _is_chat(row: dict[str, Any]) -> bool:
    return any(is_conversation(row.get(name)) for name in ("messages", "conversations", "prompt", "completion"))


def _conversations(case: Case) -> list[list[dict[str, Any]]]:
    conversations = []
    for row in case.sample[:_ROWS]:
        if not _is_chat(row):
            continue
        row = without_filling(row)
        with contextlib.suppress(DatasetError):  # the recipe's own check tells
            if is_conversation(row.get("prompt")) or is_conversation(row.get("completion")):
                messages = as_messages(row["prompt"], role="user")
                messages = messages + as_messages(row.get("completion") or [], role="assistant")
            else:
                messages = conversation_of(row)
            conversations.append(messages)
    return conversations


def _templates(case: Case, already: bool) -> Iterator[Finding]:
    """Whether both render a conversation alike: the data's own, or an invented one where the data is none."""
    student, teacher = case.tokenizer, case.teacher_tokenizer
    assert student is not None and teacher is not None
    rows = _conversations(case)
    if not rows:
        return  # templates are not used
    if teacher.chat_template is None and student.chat_template is not None:
        yield warning(
            "tokens",
            f"The data are conversations, but the teacher {case.teacher!r} has no chat template: it is a base model, "
            "which never saw the student's turns and their end.",
            "Take the instruction-tuned teacher of that family, or give prompt and completion as strings.",
        )
        return
    if student.chat_template is None or already:
        return
    settings: Any = case.args.chat_template_kwargs or {}
    for number, messages in enumerate(rows):
        ours, theirs = (_rendered(tokenizer, messages, settings) for tokenizer in (student, teacher))
        if ours is None or theirs is None or ours == theirs:
            continue
        at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        at = min(len(ours), len(theirs)) if at is None else at
        ids = [Chat(tokenizer).ids(text) for tokenizer, text in ((student, ours), (teacher, theirs))]
        yield warning(
            "tokens",
            f"The chat templates differ: conversation {number} of the data is {ours[max(0, at - 20) : at + 40]!r} to "
            f"the student and {theirs[max(0, at - 20) : at + 40]!r} to the teacher; "
            f"{first_difference(ids[0], ids[1], student, teacher)}.",
            "The student's template is used for both, so the teacher judges turns in a form it was not trained on: "
            "copy the teacher's template to the student (`tokenizer.chat_template = teacher_tokenizer.chat_template`), "
            "or set `chat_template_kwargs` with which both agree.",
        )
        return


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], settings: dict[str, Any]) -> str | None:
    try:
        return Chat(tokenizer, settings=settings).conversation(messages)
    except DatasetError:
        return None  # the recipe's own check tells, for the student; a teacher's template is not needed


# ---- Special tokens -------------------------------------------------------------------------------------------------


def _special_tokens(case: Case) -> Iterator[Finding]:
    student, teacher = case.tokenizer, case.teacher_tokenizer
    assert student is not None
    yield from _stops(case)
    if teacher is not None and student.eos_token_id != teacher.eos_token_id:
        yield warning(
            "tokens",
            f"The end of text is {_named(student, student.eos_token_id)} to the student and "
            f"{_named(teacher, teacher.eos_token_id)} to the teacher.",
            "A completion ends in the student's, which the teacher never expects there: set `tokenizer.eos_token` of "
            "the student to the teacher's and save it.",
        )
    if student.bos_token_id is not None and teacher is not None and teacher.bos_token_id != student.bos_token_id:
        yield warning(
            "tokens",
            f"Text begins with {_named(student, student.bos_token_id)} to the student and with "
            f"{_named(teacher, teacher.bos_token_id)} to the teacher.",
            "Set `tokenizer.bos_token` of the student to the teacher's and save it.",
        )


def _stops(case: Case) -> Iterator[Finding]:
    """Completions must end where sampling stops, and nothing else may stop it."""
    tokenizer = case.tokenizer
    assert tokenizer is not None
    rows = case.student_config.get_text_config().vocab_size if case.student_config is not None else None
    if tokenizer.eos_token_id is None:
        yield error(
            "tokens", "The student's tokenizer has no EOS token, so completions never end.", "Set and save one."
        )
        return
    stops = [tokenizer.eos_token_id, *case.stops]
    for stop in dict.fromkeys(case.stops):
        if rows is not None and stop >= rows:
            what = f"id {stop}, for which the student has no row ({rows} rows)"
        elif not _is_special(tokenizer, stop):
            what = f"{_named(tokenizer, stop)}, which is no special token of its tokenizer"
        else:
            continue
        yield warning(
            "tokens",
            f"By its generation config the student's completions end at {what}.",
            "Set `eos_token_id` in the student's generation_config.json to the tokens that end a turn.",
        )
    conversations = _conversations(case)
    if not conversations or tokenizer.chat_template is None:
        return
    text = _rendered(tokenizer, list(_CONVERSATION), case.args.chat_template_kwargs or {})  # type: ignore[arg-type]
    if text is None:
        return
    end = close_turn(tokenizer, Chat(tokenizer).ids(text))[-1]
    if end not in stops:
        yield warning(
            "tokens",
            f"The chat template ends an answer with {_named(tokenizer, end)}, but sampling stops at "
            f"{', '.join(_named(tokenizer, i) for i in dict.fromkeys(stops))} only: rollouts run on to max_new_tokens.",
            "Add it to `eos_token_id` in the student's generation_config.json, or make it the tokenizer's `eos_token`.",
        )


def _is_special(tokenizer: Any, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return token in tokenizer.all_special_ids or (added is not None and added.special)


def _named(tokenizer: Any, token: int | None) -> str:
    return "nothing" if token is None else f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})"
