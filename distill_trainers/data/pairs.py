"""Preference pairs: a prompt with a chosen and a rejected response, as rows and as batches.

A tokenised pair is a tokenised row (prompt and chosen response) with `rejected_ids` and `rejected_labels` beside it,
which follow the same prompt. In a batch of B pairs the rows are those of all chosen responses, then those of all
rejected ones, `[2B, T]`: one forward serves both, and a micro-batch never parts a pair.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from distill_trainers.data.arrow import class_names, without_filling
from distill_trainers.data.collator import DistillCollator
from distill_trainers.data.formats import apply_column_mapping, first_row, is_conversation, to_chatml
from distill_trainers.data.labels import IGNORED, any_trained
from distill_trainers.data.plain import plain_dataset, without_late
from distill_trainers.data.rows import tokenize_row
from distill_trainers.data.teacher_prompts import CONTEXT, TeacherPrompts
from distill_trainers.data.texts import tell_straddled
from distill_trainers.data.views import ALIGNED_ENTRIES, OWN_COMPLETION, has_view, joined_views, view_features, view_of
from distill_trainers.exceptions import DatasetError, NoUsableRowsError
from distill_trainers.losses.reduction import first_trained

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LAYOUT = "chosen + rejected, with the prompt in a column of its own (prompt, or messages) or at the start of both"

# What chat templates write around turns, and tokenizers around texts. One that a tokenizer does not know as a token of
# its own would be trained on as so many letters.
MARKERS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
)

_IDENTICAL = "chosen and rejected are identical"
_ALIKE_WHEN_CUT = "chosen and rejected are identical once cut to max_length"
_NO_CHOSEN = "empty chosen"
_NO_REJECTED = "empty rejected"
_NO_PROMPT = "empty prompt"
_LONG_PROMPT = "prompt as long as max_length or longer"
_LONG_VIEW = "teacher's row longer than teacher_max_length"


def is_pair(row: Mapping[str, Any], column_mapping: Mapping[str, str] | None = None) -> bool:
    """Tell whether a row, its columns renamed by `column_mapping`, holds a preference pair."""
    names = {(column_mapping or {}).get(column, column) for column in row}
    return {"chosen", "rejected"} <= names


def prepare_pairs(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    column_mapping: Mapping[str, str] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    num_proc: int | None = None,
    drop_bad: bool = False,
    name: str = "train",
    teacher_prompts: TeacherPrompts | None = None,
) -> Dataset | IterableDataset:
    """Tokenise a dataset of pairs, with the `length` of the longer row of each.

    Prompts stay whole, and responses lose their end beyond `max_length`.

    Args:
        drop_bad: leave out pairs that cannot be trained on, with a warning, instead of refusing the dataset.
        teacher_prompts: as of `prepare_dataset`; both responses follow the same prompt of the teacher's.

    Raises:
        DatasetError: no rows, values of the wrong kind, or pairs that cannot be trained on: identical or empty
            responses, a prompt that fills `max_length`, markers of a chat template that the tokenizer does not know.
    """
    from datasets import Dataset

    dataset = apply_column_mapping(plain_dataset(dataset, name=name), column_mapping, name=name)
    row = first_row(dataset, name=name)
    if teacher_prompts is not None:
        dataset = without_late(CONTEXT, dataset, row, name)
        teacher_prompts = teacher_prompts.reading(row, "prompt_completion", column_mapping, name)
    foreign = tuple(marker for marker in MARKERS if marker not in tokenizer.get_vocab())
    work = partial(
        _prepare_row,
        tokenizer=tokenizer,
        max_length=max_length,
        chat_template_kwargs=chat_template_kwargs,
        foreign=foreign,
        features=dataset.features,
        name=name,
        teacher_prompts=teacher_prompts,
    )
    own = teacher_prompts is not None and teacher_prompts.other is not None
    features = _features(views=teacher_prompts is not None, own_tokenizer=own)
    map_rows: Any = partial(dataset.map, work, with_indices=True, remove_columns=list(row), features=features)
    if isinstance(dataset, Dataset):
        # Not from the cache of `datasets`, which does not see changes of the code that tokenises.
        prepared = map_rows(num_proc=num_proc, desc=f"Tokenizing {name}", load_from_cache_file=False)
        prepared = _without_bad(prepared, drop_bad=drop_bad, max_length=max_length, name=name)
        if teacher_prompts is not None:
            teacher_prompts.tell_lacking(prepared["lacks"][:], name)
    else:
        prepared = map_rows().filter(partial(_is_good, drop_bad=drop_bad, name=name))
    return prepared.remove_columns([column for column in ("bad", "cut", "straddled", "lacks") if column in features])


def _prepare_row(
    row: Mapping[str, Any],
    index: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template_kwargs: Mapping[str, Any] | None,
    foreign: Sequence[str],
    features: Mapping[str, Any] | None,
    name: str,
    teacher_prompts: TeacherPrompts | None,
) -> dict[str, Any]:
    from datasets import Json

    other = None if teacher_prompts is None else teacher_prompts.other
    empty = _EMPTY if teacher_prompts is None else {**_EMPTY, **_NO_VIEW, **({} if other is None else _NO_OWN)}

    try:
        row = class_names(without_filling(row, features), features)
        prompt, chosen, rejected = split_pair(row)
        bad = _bad_text(prompt, chosen, rejected, foreign)
        if bad:
            return {**empty, "bad": bad}
        sides = [
            tokenize_row(
                {**row, "prompt": prompt, "completion": completion},
                tokenizer,
                dataset_type="prompt_completion",
                chat_template_kwargs=chat_template_kwargs,
                features=dict.fromkeys((*row, "prompt", "completion"), Json()),  # what they lack is gone already
                teacher_prompts=teacher_prompts,
            )
            for completion in (chosen, rejected)
        ]
        cut = _cut(sides, max_length, empty)
        if teacher_prompts is None or cut["bad"]:
            return cut
        first = min(sides, key=lambda side: side["prompt_length"])
        longest = {**cut, **view_of(first), "input_ids": first["input_ids"][: first["prompt_length"]]}
        longer, written = cut["length"] - cut["prompt_length"], {}
        if other is not None:
            asked = first["teacher_prompt_ids"]
            texts = [other.row_completion(row, asked) for row in rows_of_pair({**cut, **view_of(first)})]
            longer, written = max(map(len, texts)), dict(zip(_NO_OWN, texts, strict=True))
        view, too_long = teacher_prompts.finished(first, longest, longer)
        pair = {**cut, **{key: view[key] for key in _NO_VIEW}, **written}
    except DatasetError as error:
        raise DatasetError(f"Row {index} of dataset {name!r}: {error}") from error
    return {**pair, "bad": _LONG_VIEW if too_long else ""}


def split_pair(row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Split a row into prompt, chosen and rejected; the prompt may stand at the start of both responses.

    As in TRL, a prompt column of another kind than the responses (a string beside conversations) only repeats what they
    begin with. `messages` or `conversations` beside the pair are its prompt, and a single message is a response.
    """
    from trl.data_utils import maybe_extract_prompt

    sides = {side: _as_chat(row[side]) for side in ("chosen", "rejected")}
    prompt = next((_as_chat(row[name]) for name in ("prompt", "messages", "conversations") if row.get(name)), None)
    if prompt is None and "prompt" in row and isinstance(row["prompt"], str | list):
        prompt = row["prompt"]
    if sides["chosen"] == sides["rejected"]:  # nothing tells where a common beginning ends
        return prompt, sides["chosen"], sides["rejected"]
    if not all(sides.values()):
        return prompt, sides["chosen"] or "", sides["rejected"] or ""
    if prompt is not None:
        sides["prompt"] = prompt
    pair = maybe_extract_prompt(sides)
    return pair["prompt"], pair["chosen"], pair["rejected"]


def _as_chat(value: Any) -> Any:
    """Messages with the keys and roles of chat templates; anything else as it is."""
    value = [value] if isinstance(value, Mapping) else value
    return to_chatml(value) if is_conversation(value) else value


def _bad_text(prompt: Any, chosen: Any, rejected: Any, foreign: Sequence[str]) -> str:
    if chosen == rejected:
        return _IDENTICAL
    for side, reason in ((chosen, _NO_CHOSEN), (rejected, _NO_REJECTED)):
        if not _text_of(side).strip():
            return reason
    if not _text_of(prompt).strip():
        return _NO_PROMPT
    texts = [_text_of(value) for value in (prompt, chosen, rejected)]
    marker = next((m for m in foreign if any(m in text for text in texts)), None)
    return "" if marker is None else f"{marker} belongs to the chat template of another tokenizer"


def _text_of(value: Any) -> str:
    """All that a column says, for looking through it."""
    if isinstance(value, str) or value is None:
        return value or ""
    if is_conversation(value):
        parts = (part for message in value for key, part in message.items() if key != "role" and part)
        return "\n".join(map(str, parts))
    return str(value)


def _cut(sides: Sequence[Mapping[str, Any]], max_length: int, empty: Mapping[str, Any]) -> dict[str, Any]:
    # Where a token straddles the border of the prompt in one of the two, both responses begin before it.
    start = min(side["prompt_length"] for side in sides)
    room = max_length - start
    if room < 1:
        return {**empty, "bad": _LONG_PROMPT}
    ids = [side["input_ids"][start : start + room] for side in sides]
    labels = [
        [*side["input_ids"][start : side["prompt_length"]], *side["labels"][side["prompt_length"] :]] for side in sides
    ]
    labels = [side[:room] for side in labels]
    cut = any(len(side["input_ids"]) > max_length for side in sides)
    bad = (_ALIKE_WHEN_CUT if cut else _IDENTICAL) if ids[0] == ids[1] else ""
    bad = bad or _untrained(labels)
    return {
        "input_ids": sides[0]["input_ids"][:start] + ids[0],
        "labels": [IGNORED] * start + labels[0],
        "prompt_length": start,
        "length": start + max(map(len, ids)),
        "rejected_ids": ids[1],
        "rejected_labels": labels[1],
        "bad": bad,
        "cut": cut,
        "straddled": max(side.get("straddled", 0) for side in sides),
    }


def _untrained(labels: Sequence[Sequence[int]]) -> str:
    reasons = zip(labels, (_NO_CHOSEN, _NO_REJECTED), strict=True)
    return next((reason for row, reason in reasons if not any_trained(row)), "")


_EMPTY: dict[str, Any] = {
    "input_ids": [],
    "labels": [],
    "prompt_length": 0,
    "length": 0,
    "rejected_ids": [],
    "rejected_labels": [],
    "bad": "",
    "cut": False,
    "straddled": 0,
}


_NO_VIEW: dict[str, Any] = {"teacher_prompt_ids": [], "view_start": 0, "teacher_length": 0, "lacks": ""}
_REJECTED = "rejected_teacher_ids"  # of the rejected side, of a teacher with a tokenizer of its own
_NO_OWN: dict[str, Any] = {OWN_COMPLETION: [], _REJECTED: []}


def _features(*, views: bool = False, own_tokenizer: bool = False) -> Features:
    from datasets import Features, List, Value

    ids, number = List(Value("int32")), Value("int32")
    kinds = (ids, ids, number, number, ids, ids, Value("string"), Value("bool"), number)
    columns = dict(zip(_EMPTY, kinds, strict=True)) | (view_features(own_tokenizer=own_tokenizer) if views else {})
    columns |= {"lacks": Value("string")} if views else {}
    return Features(columns | ({_REJECTED: ids} if own_tokenizer else {}))


def _without_bad(dataset: Dataset, *, drop_bad: bool, max_length: int, name: str) -> Dataset:
    reasons = dataset["bad"][:]
    good = [i for i, reason in enumerate(reasons) if not reason]
    if len(good) < len(reasons):
        counted = ", ".join(f"{count} × {reason}" for reason, count in Counter(filter(None, reasons)).items())
        first = next(i for i, reason in enumerate(reasons) if reason)
        drop_bad = drop_bad or set(reasons) <= {"", _LONG_VIEW}  # they were found because they are to be dropped
        problem = (
            f"{len(reasons) - len(good)} of the {len(reasons)} pairs of dataset {name!r} cannot be trained on: "
            f"{counted} (the first is row {first}). "
        )
        if not drop_bad or not good:
            raise (DatasetError if good or not drop_bad else NoUsableRowsError)(
                f"{problem}Expected a prompt shorter than max_length={max_length} and two different responses that are "
                "not empty, written for this tokenizer (as conversations, they get its own template). Fix the rows, "
                + ("or set `bad_pairs: drop` to leave them out." if good else "there is none to train on.")
            )
        logger.warning("%sThey are left out.", problem)
    tell_straddled(dataset["straddled"][:], name)
    cut = sum(dataset["cut"][i] for i in good)
    if cut:
        logger.warning("Dataset %r: max_length=%d cut the end of responses of %d pairs.", name, max_length, cut)
    return dataset.select(good)


def _is_good(row: Mapping[str, Any], *, drop_bad: bool, name: str) -> bool:
    if row["bad"] not in ("", _LONG_VIEW) and not drop_bad:
        raise DatasetError(
            f"A pair of the stream {name!r} cannot be trained on: {row['bad']}. Fix it, or set `bad_pairs: drop`."
        )
    return not row["bad"]


# ---- Batches --------------------------------------------------------------------------------------------------------


class PairCollator(DistillCollator):
    """Tokenised pairs to batches `[2B, T]` (see `join_pairs`); rows without a rejected response to ordinary ones."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if "rejected_ids" not in rows[0]:
            return super().__call__(rows)
        sides = rows, [rejected_row(row) for row in rows]
        batch = join_pairs(self.collated(sides[0]), self.collated(sides[1]), self.pad_token_id)
        if self.other is None or not has_view(batch):
            return batch
        known = all(OWN_COMPLETION in row for row in sides[1])
        return self.other.added_to(batch, [row[OWN_COMPLETION] for side in sides for row in side] if known else None)


def rejected_row(pair: Mapping[str, Any]) -> dict[str, Any]:
    """Return the prompt of a tokenised pair with its rejected response, as a tokenised row."""
    start, view = pair["prompt_length"], view_of(pair)
    view.pop(OWN_COMPLETION, None)  # of the chosen side
    return {
        "input_ids": [*pair["input_ids"][:start], *pair["rejected_ids"]],
        "labels": [*pair["labels"][:start], *pair["rejected_labels"]],
        "prompt_length": start,
        **view,
        **({OWN_COMPLETION: pair[_REJECTED]} if _REJECTED in pair else {}),
    }


def rows_of_pair(pair: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the chosen and the rejected row of a tokenised pair."""
    chosen = {name: pair[name] for name in ("input_ids", "labels", "prompt_length")}
    return [chosen | view_of(pair), rejected_row(pair)]


def join_pairs(chosen: Mapping[str, Tensor], rejected: Mapping[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Make one batch of two, whose rows of the same number follow the same prompt.

    Args:
        chosen, rejected: `input_ids`, `attention_mask` and `labels` `[B, T]`, of any two T; whatever else `chosen`
            holds is carried over.

    Returns:
        the three `[2B, T]`, and `[2B, T]` entries that are 1 on all trained tokens of chosen rows (`token_chosen`) and
        of rejected rows (`token_rejected`), and on the first one of each chosen row (`token_pair`). `examples` `[2B]`
        tells the pair of each row. Views of the teacher's are those of the prompts, for both sides.
    """
    width = max(chosen["input_ids"].shape[1], rejected["input_ids"].shape[1])
    joined = {}
    for name, fill in (("input_ids", pad_token_id), ("attention_mask", 0), ("labels", IGNORED)):
        sides = (pad(side[name], (0, width - side[name].shape[1]), value=fill) for side in (chosen, rejected))
        joined[name] = torch.cat(list(sides))
    trained = joined["labels"] != IGNORED
    trained[:, 0] = False  # nothing predicts the first token
    is_chosen = torch.zeros_like(trained)
    is_chosen[: len(chosen["input_ids"])] = True
    entries = {
        "token_chosen": trained & is_chosen,
        "token_rejected": trained & ~is_chosen,
        "token_pair": first_trained(joined["labels"]) & is_chosen,
    }
    chosen = {name: entry for name, entry in chosen.items() if name not in ALIGNED_ENTRIES}  # of one side alone
    joined |= joined_views(chosen, chosen)
    pairs = torch.arange(len(chosen["input_ids"]), device=trained.device).repeat(2)
    return {**chosen, **joined, **{name: entry.float() for name, entry in entries.items()}, "examples": pairs}
