"""Batches: tokenised rows to padded tensors, and batches whose completions were replaced by a rollout.

Shapes: B rows, T tokens of the longest row, P tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill_trainers.data.feedback import FEEDBACK
from distill_trainers.data.labels import IGNORED, completion_labels
from distill_trainers.data.packing import positions_of, restarts
from distill_trainers.data.reward_rows import REWARD_ROW
from distill_trainers.data.routing import TEACHER_INDEX
from distill_trainers.data.views import ALIGNED_ENTRIES, OWN_COMPLETION, has_view
from distill_trainers.exceptions import ConfigurationError, DatasetError

if TYPE_CHECKING:
    from distill_trainers.data.other_tokenizer import OtherTokenizer


@dataclass(frozen=True)
class DistillCollator:
    """Rows `{input_ids, labels, prompt_length}` to one batch of int64 tensors.

    The batch has `input_ids`, `attention_mask` and `labels` `[B, T]`, padded on the right to its own longest row;
    labels are unshifted, -100 where nothing is trained. With prompts it also has `prompt_ids` and `prompt_mask`
    `[B, P]`, padded on the left as generation wants them.

    Padding is known by lengths and never by id, so the padding token may be the EOS token.

    Packed rows (with `seq_lengths`, see `packing.py`) get `position_ids` `[B, T]` in place of a mask. Rows with a view
    of the teacher's get the entries that `views.py` names. Where rows have a `teacher_index` (see `routing.py`), so has
    the batch, `[B]`. Where they have what feedback or rewards are made of (see `feedback.py`,
    `reward_rows.py`), the batch has a list of it.

    Args:
        pad_token_id: fills the padding; any id of the vocabulary will do.
        pad_to_multiple_of: rounds T and P up, for kernels that like it.
        with_prompts: add the prompts that rollouts start from.
        known_ids: ids from here on are unknown to a model, and refused; None looks at none.
        other: adds what a teacher with a tokenizer of its own reads of completions (see `other_tokenizer.py`).

    Raises:
        ConfigurationError: there is no padding token.
        DatasetError: an id that no model knows.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    with_prompts: bool = False
    known_ids: int | None = None
    other: OtherTokenizer | None = None

    def __post_init__(self) -> None:
        if self.pad_token_id is None:
            raise ConfigurationError(
                "pad_token_id is None: the tokenizer has no padding token. Set tokenizer.pad_token = "
                "tokenizer.eos_token; padding is masked by length, so EOS is still trained."
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self.collated(rows)
        if self.other is None or not has_view(batch):
            return batch
        known = all(OWN_COMPLETION in row for row in rows)
        return self.other.added_to(batch, [row[OWN_COMPLETION] for row in rows] if known else None)

    def collated(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch without what only a teacher with a tokenizer of its own reads."""
        ids = [row["input_ids"] for row in rows]
        labels = [row["labels"] for row in rows]
        check_ids(ids, self.known_ids)
        batch: dict[str, Any] = _training_tensors(ids, labels, self.pad_token_id, self.pad_to_multiple_of)
        if "seq_lengths" in rows[0]:
            return self._packed(batch, rows)
        if TEACHER_INDEX in rows[0]:
            batch[TEACHER_INDEX] = torch.tensor([row[TEACHER_INDEX] for row in rows])
        if self.with_prompts:
            prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
            batch["prompt_ids"] = pad_rows(prompts, self.pad_token_id, self.pad_to_multiple_of, left=True)
            batch["prompt_mask"] = _lengths_mask(prompts, self.pad_to_multiple_of, left=True)
            for texts in {FEEDBACK, REWARD_ROW} & rows[0].keys():  # until views or rewards are made of them
                batch[texts] = [row[texts] for row in rows]
        return batch | view_entries(rows, self.pad_token_id, self.pad_to_multiple_of)

    def _packed(self, batch: dict[str, Tensor], rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        positions = positions_of([row["seq_lengths"] for row in rows], batch["input_ids"].shape[1])
        labels = batch["labels"].masked_fill(restarts(positions), IGNORED)
        return {"input_ids": batch["input_ids"], "position_ids": positions, "labels": labels}


def view_entries(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int, multiple: int | None = None
) -> dict[str, Tensor]:
    """Return what a batch has of its rows' views: the teacher's prompts, padded on the left, and what they stand for.

    Raises:
        DatasetError: some rows have a view and others none.
    """
    views = [has_view(row) for row in rows]
    if not any(views):
        return {}
    if not all(views):
        raise DatasetError(
            f"Got a batch of {len(rows)} rows of which {sum(views)} have a teacher's prompt of their own; expected all "
            "or none. Prepare all rows with the same settings."
        )
    prompts = [row["teacher_prompt_ids"] for row in rows]
    return {
        "teacher_prompt_ids": pad_rows(prompts, pad_token_id, multiple, left=True),
        "teacher_prompt_mask": _lengths_mask(prompts, multiple, left=True),
        "view_start": torch.tensor([row["view_start"] for row in rows]),
    }


def check_ids(rows: Iterable[Sequence[int]], known_ids: int | None) -> None:
    """Refuse ids below 0, or from `known_ids` on."""
    if known_ids is None:
        return
    for row in rows:
        if len(row) and not 0 <= min(row) <= max(row) < known_ids:
            raise DatasetError(
                f"Got a row with the ids {min(row)} to {max(row)}; expected ids from 0 to {known_ids - 1}, which both "
                "models know. Tokenise the data with the student's tokenizer, and mark padding by a mask."
            )


def replace_completions(
    batch: Mapping[str, Tensor],
    completion_ids: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """Put new completions, every token of which is trained, behind the prompts of a batch.

    `input_ids`, `attention_mask` and `labels` are built anew, right-padded to their own longest row; whatever else the
    batch holds (the prompts among it) is carried over. An empty completion leaves a row without trained tokens.

    Args:
        batch: with `prompt_ids` and `prompt_mask` `[B, P]`, padded on either side.
        completion_ids: B lists of ids without padding, EOS included where generation ended in it.
        pad_token_id: fills the padding.
        pad_to_multiple_of: rounds the new T up.

    Raises:
        ConfigurationError: the batch was collated without prompts.
        ValueError: not one completion for each prompt.
    """
    if "prompt_ids" not in batch:
        raise ConfigurationError(
            f"The batch has {sorted(batch)} but no prompt_ids, so nothing can be appended to. Collate it with "
            "DistillCollator(..., with_prompts=True)."
        )
    prompts = unpadded_prompts(batch)
    if len(prompts) != len(completion_ids):
        raise ValueError(f"Got {len(completion_ids)} completions for {len(prompts)} prompts, expected one for each.")
    ids = [[*prompt, *completion] for prompt, completion in zip(prompts, completion_ids, strict=True)]
    labels = [completion_labels(*row) for row in zip(prompts, completion_ids, strict=True)]
    rebuilt = _training_tensors(ids, labels, pad_token_id, pad_to_multiple_of)
    device = batch["prompt_ids"].device
    batch = {name: entry for name, entry in batch.items() if name not in ALIGNED_ENTRIES}  # of the completions before
    return {**batch, **{key: value.to(device) for key, value in rebuilt.items()}}


def unpadded_prompts(batch: Mapping[str, Tensor]) -> list[list[int]]:
    """Return the prompts of a batch as lists of ids, without padding (by `prompt_mask`)."""
    ids, mask = batch["prompt_ids"].tolist(), batch["prompt_mask"].tolist()
    return [[token for token, real in zip(*row, strict=True) if real] for row in zip(ids, mask, strict=True)]


def _training_tensors(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad_token_id: int, multiple: int | None
) -> dict[str, Tensor]:
    return {
        "input_ids": pad_rows(ids, pad_token_id, multiple),
        "attention_mask": _lengths_mask(ids, multiple),
        "labels": pad_rows(labels, IGNORED, multiple),
    }


def _lengths_mask(rows: Sequence[Sequence[int]], multiple: int | None, *, left: bool = False) -> Tensor:
    return pad_rows([[1] * len(row) for row in rows], 0, multiple, left=left)


def pad_rows(rows: Sequence[Sequence[int]], value: int, multiple: int | None, *, left: bool = False) -> Tensor:
    """Pad lists of ids to one int64 tensor, as wide as the longest (rounded up to `multiple`)."""
    width = max(map(len, rows))
    if multiple:
        width = -(-width // multiple) * multiple
    padded = torch.full((len(rows), width), value, dtype=torch.int64)
    for padded_row, row in zip(padded, rows, strict=True):
        start = width - len(row) if left else 0
        padded_row[start : start + len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return padded
