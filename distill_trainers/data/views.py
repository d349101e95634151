"""The teacher's own view of a row: another prompt than the student's, and the student's completion, id for id.

A tokenised row with a view has `teacher_prompt_ids` and `view_start`: the teacher reads `teacher_prompt_ids` and,
behind them, `input_ids[view_start:]`. A batch with views has `teacher_prompt_ids` and `teacher_prompt_mask` `[B, P']`,
padded on the left, and `view_start` `[B]`. Whatever becomes of completions, this is the one place that joins both.

A teacher with a tokenizer of its own reads other ids of the completion, too (see `other_tokenizer.py`): those of
`teacher_completion_ids` stand behind its prompt then, in rows and in batches.

Shapes: B rows, T positions of the student's longest row, T' of the teacher's, P' tokens of its longest prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill_trainers.data.labels import IGNORED
from distill_trainers.data.routing import TEACHER_INDEX
from distill_trainers.exceptions import DatasetError

if TYPE_CHECKING:
    from datasets import Features

BATCH_ENTRIES = ("teacher_prompt_ids", "teacher_prompt_mask", "view_start")
OWN_COMPLETION = "teacher_completion_ids"
# Of batches whose teacher has a tokenizer of its own; they belong to the very completions that a batch holds.
ALIGNED_ENTRIES = (
    *(OWN_COMPLETION, "teacher_completion_mask", "teacher_chunk"),
    *("token_chunk", "token_shared", "token_comparable", "token_alone", "token_cut"),
)


# ---- Rows -----------------------------------------------------------------------------------------------------------


def has_view(row: Mapping[str, Any]) -> bool:
    """Tell whether a row, or a batch, comes with a view of the teacher's."""
    return "view_start" in row


def view_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row, or a batch, has of a view."""
    return {name: row[name] for name in (*BATCH_ENTRIES, *ALIGNED_ENTRIES) if name in row}


def view_features(*, own_tokenizer: bool = False) -> Features:
    """Return the columns of views in a dataset; `teacher_length` is what the teacher's row may come to."""
    from datasets import Features, List, Value

    number = Value("int32")
    columns = {"teacher_prompt_ids": List(number), "view_start": number, "teacher_length": number}
    return Features(columns | ({OWN_COMPLETION: List(number)} if own_tokenizer else {}))


def start_of_view(row: Mapping[str, Any]) -> int:
    """Tell how many tokens of a tokenised row the teacher's prompt stands for: those before the first that is trained.

    It is `prompt_length`, or less where earlier turns are trained too: what follows the first prompt is shared.
    """
    trained = (i for i, label in enumerate(row["labels"]) if i and label != IGNORED)
    return min(row["prompt_length"], next(trained, row["prompt_length"]))


def kept_view(row: Mapping[str, Any], front: int, start: int) -> dict[str, Any]:
    """Return the view of a row that loses its tokens from `front` up to `start`.

    The teacher loses nothing: what is cut behind its own prompt becomes part of it.
    """
    if not has_view(row):
        return {}
    ids, first = row["teacher_prompt_ids"], row["view_start"]
    if start <= first:
        return {"teacher_prompt_ids": ids, "view_start": first - (start - front)}
    return {"teacher_prompt_ids": [*ids, *row["input_ids"][first:start]], "view_start": front}


def viewed_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a tokenised row as the teacher reads it; one without a view stays as it is.

    `teacher_length` is what it may come to, with a completion that is going to be written.
    """
    if not has_view(row):
        return row
    prompt, start = list(row["teacher_prompt_ids"]), row["view_start"]
    if OWN_COMPLETION in row:
        return _row_of_own(row, prompt)
    labels = [IGNORED, *row["labels"][1:]]  # nothing predicts a row's first token, which may be another one here
    ids = [*prompt, *row["input_ids"][start:]]
    viewed: dict[str, Any] = {"input_ids": ids, "labels": [IGNORED] * len(prompt) + labels[start:]}
    viewed["prompt_length"] = len(prompt) + row.get("prompt_length", start) - start
    viewed |= {TEACHER_INDEX: row[TEACHER_INDEX]} if TEACHER_INDEX in row else {}
    return viewed | {"teacher_length": row.get("teacher_length", len(ids))}


def _row_of_own(row: Mapping[str, Any], prompt: list[int]) -> dict[str, Any]:
    """A row as a teacher reads it whose ids of the completion are its own; nothing predicts a row's first token."""
    completion = list(row[OWN_COMPLETION])
    ids, labels = prompt + completion, [IGNORED] * len(prompt) + completion
    labels[:1] = [IGNORED][: len(ids)]
    length = max(row.get("teacher_length", 0), len(ids))
    return {"input_ids": ids, "labels": labels, "prompt_length": len(prompt), "teacher_length": length}


def teacher_prompt(row: Mapping[str, Any]) -> list[int]:
    """Return what the teacher's completion of a tokenised row would follow: its own prompt, or the student's."""
    viewed = viewed_row(row)
    return list(viewed["input_ids"][: viewed["prompt_length"]])


def with_teacher_prompt(row: Mapping[str, Any], prompt: Sequence[int] | None) -> dict[str, Any]:
    """Return a tokenised row whose whole prompt is another one for the teacher; None leaves it as it is."""
    if prompt is None:
        return dict(row)
    return {**row, "teacher_prompt_ids": list(prompt), "view_start": row["prompt_length"]}


# ---- Batches --------------------------------------------------------------------------------------------------------


def unpadded_prompts_of(batch: Mapping[str, Tensor]) -> list[list[int]]:
    """Return the teacher's prompts of a batch with views, without padding."""
    both = zip(batch["teacher_prompt_ids"].tolist(), batch["teacher_prompt_mask"].tolist(), strict=True)
    return [[token for token, real in zip(*row, strict=True) if real] for row in both]


def teacher_prompts(batch: Mapping[str, Tensor], prompts: Sequence[Sequence[int]]) -> list[list[int]] | None:
    """Return what the teacher reads before each completion of a batch; None if it has no views.

    Args:
        prompts: the student's, without padding.
    """
    if not has_view(batch):
        return None
    own = zip(unpadded_prompts_of(batch), batch["view_start"].tolist(), prompts, strict=True)
    return [ids + list(prompt[start:]) for ids, start, prompt in own]


def joined_views(*parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the views of batches below one another; none where they have none."""
    if not has_view(parts[0]):
        return {}
    width = max(part["teacher_prompt_ids"].shape[1] for part in parts)
    joined = {"view_start": torch.cat([part["view_start"] for part in parts])}
    for name in ("teacher_prompt_ids", "teacher_prompt_mask"):
        rows = [torch.nn.functional.pad(part[name], (width - part[name].shape[1], 0)) for part in parts]
        joined[name] = torch.cat(rows)
    return joined


def teacher_inputs(batch: Mapping[str, Tensor], predicts: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
    """Return a batch as the teacher reads it, and which of its positions predict; without views both stay as they are.

    Args:
        batch: `input_ids` and `attention_mask` `[B, T]`, padded on the right, and the entries of views.
        predicts: bool `[B, T-1]`; True where position t predicts a trained token t+1.

    Returns:
        `input_ids` and `attention_mask` `[B, T']`, padded on the right, and bool `[B, T'-1]` that marks the positions
        which predict the very same tokens, in the same row-major order.

    Raises:
        DatasetError: a token is trained that is part of what the teacher's prompt stands for.
    """
    if not has_view(batch):
        return batch, predicts
    if OWN_COMPLETION in batch:
        return _own_inputs(batch)
    ids, prompt_ids, start = batch["input_ids"], batch["teacher_prompt_ids"], batch["view_start"][:, None]
    prompt_lengths = batch["teacher_prompt_mask"].sum(1, keepdim=True)
    lengths = prompt_lengths + batch["attention_mask"].sum(1, keepdim=True) - start
    places = torch.arange(int(lengths.max()), device=ids.device)[None]
    of_prompt, real = places < prompt_lengths, places < lengths
    in_prompt = (places + prompt_ids.shape[1] - prompt_lengths).clamp(0, max(0, prompt_ids.shape[1] - 1))
    in_row = (places - prompt_lengths + start).clamp(0, ids.shape[1] - 1)
    shared = ids.gather(1, in_row)
    joined = torch.where(of_prompt, prompt_ids.gather(1, in_prompt), shared) if prompt_ids.shape[1] else shared
    predicted = torch.nn.functional.pad(predicts, (1, 0)).gather(1, in_row) & real & ~of_prompt
    before = predicts.sum()
    if int(predicted[:, 1:].sum()) != int(before):
        raise DatasetError(
            f"Got batches with {int(before)} trained tokens, of which the teacher's view holds "
            f"{int(predicted[:, 1:].sum())}; expected all of them behind `view_start`, where both read the same. Make "
            "the rows with `prepare_dataset`, and the batches with DistillCollator."
        )
    return {"input_ids": joined.masked_fill(~real, 0), "attention_mask": real.long()}, predicted[:, 1:]


def _own_inputs(batch: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Tensor]:
    """`teacher_inputs` of a teacher with its own ids of the completions: it predicts all of them but a row's first."""
    prompt_ids, completion_ids = batch["teacher_prompt_ids"], batch[OWN_COMPLETION]
    prompt_lengths = batch["teacher_prompt_mask"].sum(1, keepdim=True)
    lengths = prompt_lengths + batch["teacher_completion_mask"].sum(1, keepdim=True)
    joined = torch.cat([prompt_ids, completion_ids], dim=1)
    width = prompt_ids.shape[1]
    # A row without any token would have nothing to attend to, not even itself.
    places = torch.arange(max(1, int(lengths.max())), device=joined.device)[None]
    real, of_prompt = places < lengths, places < prompt_lengths
    ids = torch.nn.functional.pad(joined, (0, 1)).gather(
        1, (places + width - prompt_lengths).clamp(max=joined.shape[1])
    )
    predicted = (real & ~of_prompt)[:, 1:]
    mask = real.long()
    mask[:, 0] = 1
    return {"input_ids": ids.masked_fill(~real, 0), "attention_mask": mask}, predicted
