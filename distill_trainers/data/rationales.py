"""Questions with rationales to token ids: the one or two sequences of each example, and their batches.

Three objectives read the same rows in different ways (`first` and `other` sequence of an example):

    step_by_step   label prompt -> answer                 rationale prompt -> rationale
    edit           chain prompt -> right chain            chain prompt -> wrong chain
    dual_chain     chain prompt -> rationale and answer   (none)

Shapes: B examples, R rows of a batch (B or 2 B), T tokens of the longest row, P of the longest prompt.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..answers.edit_distance import key_tokens
from ..answers.formats import question_text
from ..exceptions import DatasetError, NoUsableRowsError
from .arrow import class_names
from .chat import Chat
from .collator import DistillCollator, pad_rows
from .conversations import split_turns
from .formats import apply_column_mapping, detect_dataset_type, first_row
from .labels import IGNORED, TokenizedRow, any_trained, labels_of, row_of
from .plain import plain_dataset, without_late
from .rows import truncate
from .teacher_prompts import CONTEXT, TeacherPrompts
from .texts import encoder_and_decoder_ids, split_text, tell_straddled
from .tokenization import code_fingerprint, is_kept
from .views import (
    ALIGNED_ENTRIES,
    BATCH_ENTRIES,
    OWN_COMPLETION,
    has_view,
    joined_views,
    view_of,
    with_teacher_prompt,
)

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedTokenizerBase

    from .other_tokenizer import OtherTokenizer

logger = logging.getLogger(__name__)

OBJECTIVES = ("step_by_step", "edit", "dual_chain")

_DEFAULTS = {
    "text": {
        "label_prompt": "predict: {question}\n",
        "rationale_prompt": "explain: {question}\n",
        "chain_prompt": "{question}\n",
    },
    "chat": {
        "label_prompt": "{question}\n\nGive the final answer only.",
        "rationale_prompt": "{question}\n\nExplain step by step how the answer is found.",
        "chain_prompt": "{question}\n\nThink step by step, then give the answer.",
    },
}
_CHAIN = "{rationale}\nThe answer is {answer}."


@dataclass(frozen=True)
class RationaleTemplates:
    """What prompts and completions look like; the placeholders are `{question}`, `{rationale}` and `{answer}`.

    Args:
        style: `text` joins prompt and completion as they are; `chat` makes them turns of a conversation.
        label_prompt, rationale_prompt, chain_prompt: what asks for the answer, for its explanation, for both.
        chain_completion: rationale and answer as one text.
    """

    style: str
    label_prompt: str
    rationale_prompt: str
    chain_prompt: str
    chain_completion: str = _CHAIN

    @classmethod
    def of(cls, style: str, tokenizer: PreTrainedTokenizerBase, **templates: str | None) -> RationaleTemplates:
        """Take a style's defaults but for `templates`; `auto` is chat where the tokenizer has a template."""
        if style == "auto":
            style = "chat" if getattr(tokenizer, "chat_template", None) else "text"
        chosen = {**_DEFAULTS[style], **{name: text for name, text in templates.items() if text is not None}}
        return cls(style, **chosen)

    def chain(self, rationale: str, answer: str) -> tuple[str, str]:
        """Return the completion that holds both, cut in two where the rationale ends."""
        before, after = self.chain_completion.split("{rationale}", 1)
        return before + rationale, after.replace("{answer}", answer)


@dataclass(frozen=True)
class RationaleTokenizer:
    """Tokenises examples for one objective.

    Args:
        separate: prompt and completion go to an encoder and a decoder, so a prompt keeps its end-of-text token.
        chat_settings: variables for the chat template.
        teacher_prompts: write what the teacher reads in place of each sequence's prompt, which is their `{prompt}`.
    """

    tokenizer: PreTrainedTokenizerBase
    templates: RationaleTemplates
    objective: str
    max_length: int | None = None
    reserve: int = 0
    separate: bool = False
    chat_settings: Mapping[str, Any] | None = None
    teacher_prompts: TeacherPrompts | None = None

    def example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Tokenise one row as `first` and `other` sequence; `other` is None where the row has none.

        Raises:
            DatasetError: a value that is no text or number, or a conversation that the template cannot split.
        """
        question = question_text(_text(row, "question"), row.get("choices"))
        answer, rationale = _text(row, "answer"), _text(row, "rationale")
        wrong = _text(row, "wrong_rationale")
        if self.objective == "step_by_step":
            first = self._sequence(self.templates.label_prompt, question, answer)
            other = self._sequence(self.templates.rationale_prompt, question, rationale) if rationale else None
        else:
            first = self._chain(question, rationale, answer) if rationale else self._sequence(self._ask, question, "")
            other = None
            if self.objective == "edit":
                other = self._chain(question, wrong, _text(row, "wrong_answer")) if wrong and rationale else None
                self._mark_key_steps(first, other)
        return {"first": self._finished(first, row), "other": None if other is None else self._finished(other, row)}

    @property
    def _ask(self) -> str:
        return self.templates.chain_prompt

    def _chain(self, question: str, rationale: str, answer: str) -> TokenizedRow:
        """A whole chain; marked is what follows the rationale, its end of text included."""
        begin, end = self.templates.chain(rationale, answer)
        if not answer:  # of a wrong chain nobody has to know the answer
            end = ""
        sequence = self._sequence(self._ask, question, begin + end)
        ids = sequence["input_ids"]
        # Rendered alike: a template may put something before the text, which makes other tokens of its beginning.
        alone = self._sequence(self._ask, question, begin)["input_ids"] if end else ids
        ends = next((k for k, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), len(alone))
        sequence["marks"] = [0] * ends + [1] * (len(ids) - ends)
        return sequence

    def _mark_key_steps(self, right: TokenizedRow, wrong: TokenizedRow | None) -> None:
        right["marks"] = [0] * len(right["input_ids"])
        if wrong is None:
            return
        starts = right["prompt_length"], wrong["prompt_length"]
        marks = key_tokens(right["input_ids"][starts[0] :], wrong["input_ids"][starts[1] :])
        for sequence, start, key in zip((right, wrong), starts, marks, strict=True):
            sequence["marks"] = [0] * start + key
        wrong["labels"] = labels_of(wrong["input_ids"], wrong["marks"])  # nothing else of a wrong chain is looked at

    def _sequence(self, template: str, question: str, completion: str) -> TokenizedRow:
        prompt, tokenizer, lost = template.replace("{question}", question), self.tokenizer, 0
        if self.templates.style == "chat":
            chat = Chat(tokenizer, settings=dict(self.chat_settings or {}))
            question_turn = [{"role": "user", "content": prompt}]
            if completion:
                answer_turn = [{"role": "assistant", "content": completion}]
                prompt_ids, completion_ids = split_turns(chat, question_turn, answer_turn)
            else:
                prompt_ids, completion_ids = chat.ids(chat.prompt(question_turn)), []
        elif self.separate:
            prompt_ids, completion_ids = encoder_and_decoder_ids(prompt, completion, tokenizer)
        else:
            prompt_ids, completion_ids, lost = split_text(prompt, completion, tokenizer)
        row = row_of(prompt_ids, completion_ids)
        return {**row, "marks": [0] * len(row["input_ids"]), "straddled": lost, "asked": prompt}

    def _finished(self, sequence: TokenizedRow, row: Mapping[str, Any]) -> TokenizedRow:
        """Cut to `max_length` as all rows are, with a view of the teacher's where it has one."""
        asked: Any = sequence.pop("asked")
        if self.teacher_prompts is None:
            return self._cut(sequence)
        if self.templates.style == "chat":
            asked = [{"role": "user", "content": asked}]
        whole = self.teacher_prompts.added_to(sequence, row, asked, self.tokenizer, self.chat_settings)
        cut = self._cut(whole)
        view, too_long = self.teacher_prompts.finished(whole, cut, self.reserve)
        return {**cut, **view, "too_long": too_long}

    def _cut(self, sequence: TokenizedRow) -> TokenizedRow:
        """Cut to `max_length`; marks go with their tokens."""
        ids = sequence["input_ids"]
        places = {**sequence, "input_ids": list(range(len(ids)))}
        bos = 0 if ids[:1] == [self.tokenizer.bos_token_id] else None
        left = truncate(places, self.max_length, self.reserve, bos_token_id=bos)
        cut = {name: [sequence[name][i] for i in left["input_ids"]] for name in ("input_ids", "labels", "marks")}
        return {**cut, **view_of(left), "prompt_length": left["prompt_length"], "straddled": sequence["straddled"]}


def prepare_rationales(
    dataset: Any,
    work: RationaleTokenizer,
    *,
    column_mapping: Mapping[str, str] | None = None,
    needs: str = "first",
    with_others: bool = True,
    num_proc: int | None = None,
    name: str = "train",
) -> Any:
    """Tokenise a dataset of the layout `rationale`; rows that cannot train are dropped and counted.

    Args:
        needs: what a row must have trained tokens in: `first`, `other`, or `any`; `none` keeps every row that has a
            question.
        with_others: whether the other sequences are of any use; else examples are made without them.

    Raises:
        DatasetError: another layout, a row that cannot be tokenised, or none left.
    """
    from datasets import Dataset

    dataset = apply_column_mapping(plain_dataset(dataset, name=name), column_mapping, name=name)
    row = first_row(dataset, name=name)
    if detect_dataset_type({"rationale": "", **row} if name != "train" else row, name=name) != "rationale":
        raise DatasetError(
            f"Dataset {name!r} has the columns {sorted(row)}; expected question, answer and rationale (and, if you "
            "like, choices, wrong_rationale, wrong_answer, task). Rename columns with column_mapping."
        )
    if work.teacher_prompts is not None:
        dataset = without_late(CONTEXT, dataset, row, name)
        work = replace(work, teacher_prompts=work.teacher_prompts.reading(row, "rationale", column_mapping, name))
    prompts = work.teacher_prompts
    features = _features(views=prompts is not None, own_tokenizer=prompts is not None and prompts.other is not None)
    run = partial(_prepare_example, work=work, needs=needs, with_others=with_others, name=name, code=code_fingerprint())
    run = partial(run, columns=dataset.features)
    map_rows: Any = partial(dataset.map, run, with_indices=True, remove_columns=list(row), features=features)
    told = [name for name in ("dropped", "straddled", "lacks") if name in features]
    if not isinstance(dataset, Dataset):
        return map_rows().filter(is_kept).remove_columns(told)
    prepared = map_rows(num_proc=num_proc, desc=f"Tokenizing {name}")
    reasons = Counter(reason for reason in prepared["dropped"] if reason)
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    if reasons.total() == len(prepared):
        raise NoUsableRowsError(f"None of the {len(prepared)} rows of dataset {name!r} can be trained on: {counts}.")
    if reasons:
        logger.warning("Dataset %r, %d rows: %d dropped (%s).", name, len(prepared), reasons.total(), counts)
    tell_straddled(prepared["straddled"][:], name)
    usable = [i for i, reason in enumerate(prepared["dropped"]) if not reason]
    if work.teacher_prompts is not None:
        work.teacher_prompts.tell_lacking([prepared["lacks"][i] for i in usable], name)
    return prepared.select(usable).remove_columns(told)


def _prepare_example(
    row: Mapping[str, Any],
    index: int,
    *,
    work: RationaleTokenizer,
    needs: str,
    with_others: bool,
    name: str,
    code: str,
    columns: Mapping[str, Any] | None,
) -> dict[str, Any]:
    row = class_names(row, columns)
    try:
        example = work.example(row)
    except DatasetError as error:
        raise DatasetError(f"Row {index} of dataset {name!r}: {error}") from error
    nothing: dict[str, Any] = {"input_ids": [], "labels": [], "marks": [], "prompt_length": 0, "straddled": 0}
    first, other = example["first"], (example["other"] if with_others else None) or nothing
    straddled = first.pop("straddled") + other.pop("straddled")
    views: dict[str, Any] = {}
    too_long = first.pop("too_long", "") or other.pop("too_long", "")
    if has_view(first):
        own: dict[str, Any] = {OWN_COMPLETION: []} if OWN_COMPLETION in first else {}
        other = other if has_view(other) else {**other, "teacher_prompt_ids": [], "view_start": 0, **own}
        length = max(first.pop("teacher_length"), other.pop("teacher_length", 0))
        views = {"teacher_length": length, "lacks": first.pop("lacks")}
        other.pop("lacks", None)
    return {
        **first,
        **{f"other_{name}": value for name, value in other.items()},
        **views,
        "length": len(first["input_ids"]) + len(other["input_ids"]),
        "reference": _text(row, "answer"),
        "choices": list(row.get("choices") or []),
        "task": _text(row, "task"),
        "dropped": _reason_to_drop(first, other, needs, work.objective) or too_long,
        "straddled": straddled,
    }


def _reason_to_drop(first: TokenizedRow, other: TokenizedRow, needs: str, objective: str) -> str:
    if not first["prompt_length"]:
        return "empty question"
    trains = {"first": any_trained(first["labels"][1:]), "other": any_trained(other["labels"][1:])}
    trains |= {"any": any(trains.values()), "none": True}
    if trains[needs]:
        return ""
    if needs == "other" and objective == "edit":
        return "without a wrong rationale that differs"
    return "without answer" if objective == "step_by_step" else "without rationale"


def _features(*, views: bool = False, own_tokenizer: bool = False) -> Features:
    from datasets import Features, List, Value

    ids, flags, number, text = List(Value("int32")), List(Value("int8")), Value("int32"), Value("string")
    sequence = {"input_ids": ids, "labels": ids, "marks": flags, "prompt_length": number}
    if views:
        sequence |= {"teacher_prompt_ids": ids, "view_start": number}
        sequence |= {OWN_COMPLETION: ids} if own_tokenizer else {}
    others = {f"other_{name}": kind for name, kind in sequence.items()}
    rest = {
        "length": number,
        "reference": text,
        "choices": List(text),
        "task": text,
        "dropped": text,
        "straddled": number,
    }
    more = {"teacher_length": number, "lacks": text} if views else {}
    return Features({**sequence, **others, **rest, **more})


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value).strip()
    raise DatasetError(f"Column {column!r} holds {type(value).__name__} ({value!r:.80}), expected text or a number.")


# ---- Batches --------------------------------------------------------------------------------------------------------


def rows_of_rationales(example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sequences of a tokenised example as rows: the first, and the other if there is one."""
    names = ["input_ids", "labels", "prompt_length", *view_of(example)]
    rows = [{name: example[f"{side}{name}"] for name in names} for side in ("", "other_")]
    return rows if rows[1]["input_ids"] else rows[:1]


@dataclass(frozen=True)
class RationaleCollator:
    """Examples to one batch: the first sequences of all, and below them their others; row r is of example r % B.

    Beside `input_ids`, `attention_mask` and `labels` `[R, T]` a batch has `examples` `[R]`, and float entries `[R, T]`
    that say which term a token belongs to: `token_label`, `token_rationale`; `token_right`, `token_right_key`,
    `token_wrong_key`, `token_key`; `token_rationale`, `token_answer`, `token_innovation`; and `token_given`, the tokens
    that a teacher may be asked about. Here R = B, or 2 B with others.

    Args:
        objective: one of `OBJECTIVES`.
        with_others: whether the other sequences are of any use; an example without one then gets an untrained row.
        with_prompts: add `prompt_ids`, `prompt_mask` `[B, P]`, and `references`, for rollouts.
        decoder_start: first token of an encoder-decoder's decoder, which makes `encoder_ids` and `encoder_mask` of
            the prompts; None for a causal LM.
        other: as of `DistillCollator`.
    """

    pad_token_id: int
    objective: str
    with_others: bool = True
    with_prompts: bool = False
    pad_to_multiple_of: int | None = None
    decoder_start: int | None = None
    other: OtherTokenizer | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = [*_SEQUENCE, *view_of(rows[0])]
        firsts = [{name: row[name] for name in names} for row in rows]
        others = [{name: row[f"other_{name}"] for name in names} for row in rows] if self.with_others else []
        nothing = self._nothing()
        if has_view(rows[0]):
            nothing |= {"teacher_prompt_ids": [self.pad_token_id], "view_start": 1}
            nothing |= {OWN_COMPLETION: []} if OWN_COMPLETION in rows[0] else {}
        sequences = firsts + [other if other["input_ids"] else nothing for other in others]
        split = self.decoder_start is not None
        batch: dict[str, Any] = self._plain()([self._decoder_side(row) for row in sequences] if split else sequences)
        if split:
            prompts = [row["input_ids"][: row["prompt_length"]] for row in sequences]
            batch["encoder_ids"] = pad_rows(prompts, self.pad_token_id, self.pad_to_multiple_of)
            batch["encoder_mask"] = pad_rows([[1] * len(p) for p in prompts], 0, self.pad_to_multiple_of)
        batch["examples"] = torch.arange(len(sequences)) % len(rows)
        batch |= self._entries(batch, sequences, len(rows))
        if self.with_prompts:
            prompt_batch = DistillCollator(self.pad_token_id, self.pad_to_multiple_of, with_prompts=True)(firsts)
            batch |= {name: prompt_batch[name] for name in ("prompt_ids", "prompt_mask")}
            batch["references"] = [(row["reference"], list(row["choices"])) for row in rows]
        return batch

    def _plain(self) -> DistillCollator:
        return DistillCollator(self.pad_token_id, self.pad_to_multiple_of, other=self.other)

    def _nothing(self) -> TokenizedRow:
        return {"input_ids": [self.pad_token_id], "labels": [IGNORED], "marks": [0], "prompt_length": 1}

    def _decoder_side(self, sequence: TokenizedRow) -> TokenizedRow:
        """The completion after the decoder's start: as labels are unshifted, position t predicts t + 1."""
        start = sequence["prompt_length"]
        cut = {name: sequence[name][start:] for name in ("input_ids", "labels")}
        return {
            "input_ids": [self.decoder_start, *cut["input_ids"]],
            "labels": [IGNORED, *cut["labels"]],
            "prompt_length": 1,
        }

    def _entries(self, batch: Mapping[str, Tensor], sequences: list[TokenizedRow], examples: int) -> dict[str, Tensor]:
        split = self.decoder_start is not None
        marks = [[0, *row["marks"][row["prompt_length"] :]] if split else row["marks"] for row in sequences]
        trained = (batch["labels"] != IGNORED).float()
        marked = pad_rows(marks, 0, self.pad_to_multiple_of).float() * trained
        is_first = (torch.arange(len(sequences)) < examples).float()[:, None]
        if self.objective == "step_by_step":
            entries = {"label": trained * is_first, "rationale": trained * (1 - is_first), "given": trained}
        elif self.objective == "edit":
            right, wrong = marked * is_first, marked * (1 - is_first)
            entries = {"right": trained * is_first, "given": trained * is_first, "key": marked}
            entries |= {"right_key": right, "wrong_key": wrong}
        else:
            entries = {"rationale": trained - marked, "answer": marked, "given": trained}
            entries["innovation"] = torch.zeros_like(trained)
        return {f"token_{name}": value for name, value in entries.items()}


_SEQUENCE = ("input_ids", "labels", "marks", "prompt_length")


def with_innovations(
    batch: Mapping[str, Any], rows: Sequence[tuple[Any, ...]], pad_token_id: int, multiple: int | None = None
) -> dict[str, Any]:
    """Add rows to a batch of `dual_chain`: prompt and completion, whose `token_innovation` is 1.

    Args:
        rows: ids of prompt and completion, the length of the prompt, and the teacher's own prompt if there is one.
    """
    gone = {"prompt_ids", "prompt_mask", "references", *ALIGNED_ENTRIES}  # the last are of the rows before alone
    old = {name: value for name, value in batch.items() if name not in gone}
    if not rows:
        return old
    sequences = [with_teacher_prompt(row_of(ids[:n], ids[n:]), *(view or [None])) for ids, n, *view in rows]
    added = DistillCollator(pad_token_id, multiple)(sequences)
    trained = (added["labels"] != IGNORED).float()
    none = torch.zeros_like(trained)
    added |= {name: none for name in old if name.startswith("token_")}
    added |= {"token_innovation": trained, "token_given": trained}
    width = max(old["labels"].shape[1], added["labels"].shape[1])
    fill = {"input_ids": pad_token_id, "labels": IGNORED}
    joined = {
        name: torch.cat([_widened(part[name], width, fill.get(name, 0)) for part in (_to(old, added), added)])
        for name in added.keys() - set(BATCH_ENTRIES)
    } | joined_views(_to(old, added), added)
    device = old["labels"].device
    return {**old, **{name: value.to(device) for name, value in joined.items()}, "examples": old["examples"]}


def _to(batch: Mapping[str, Any], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name].cpu() for name in like}


def _widened(rows: Tensor, width: int, value: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=value)
