"""A user's data collator: its batches in this package's form, or refused with what is wrong.

What is trained follows from the rows, which the collator gets as well: a batch trains no token that its rows do not,
whatever labels a collator writes. Batches come out padded on the right, or packed (see `packing.py`).

Shapes: B rows of a batch, T positions.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill_trainers.data.collator import DistillCollator, check_ids, pad_rows, view_entries
from distill_trainers.data.labels import IGNORED
from distill_trainers.data.packing import restarts
from distill_trainers.data.routing import TEACHER_INDEX
from distill_trainers.data.views import OWN_COMPLETION, has_view
from distill_trainers.exceptions import ConfigurationError, DatasetError

logger = logging.getLogger(__name__)

# Said once more by `position_ids`, or of no use to anybody once rows are tokenised.
_REDUNDANT = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "special_tokens_mask")
_USED = {"input_ids", "attention_mask", "labels", "prompt_ids", "prompt_mask", "examples", TEACHER_INDEX}
_REMEDY = "Leave `data_collator` out to use DistillCollator, or mend it"
_VIEWS = (
    "teacher_prompt_ids",
    "view_start",
    "teacher_length",
    OWN_COMPLETION,
)  # which a collator cannot pad: batches get them here
Span = tuple[int, int, int]  # row of the batch, where a text begins in it, where it ends


@dataclass
class ForeignCollator:
    """Calls a user's collator and reads what it gives.

    Args:
        collate: from rows `{input_ids, labels, prompt_length, length}` to a batch.
        own: how this package would collate: its padding token, whether prompts are wanted, which ids are known.
        takes: what else the student's forward takes; other entries stay, and are told of once.
    """

    collate: Callable[[list[dict[str, Any]]], Any]
    own: DistillCollator
    takes: Collection[str] = ()
    _said: set[str] = field(default_factory=set)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self._tensors(self._collated(rows))
        batch = self._masked(batch, rows)
        spans = self._packed_spans(batch) if "attention_mask" not in batch else _spans(batch["attention_mask"])
        matches = self._matches(batch, spans, rows)
        batch["labels"] = self._labels(batch, spans, matches, rows)
        real = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for b, start, stop in spans[: None if matches is None else len(rows)]:
            real[b, start:stop] = True
        check_ids([ids[on].tolist() for ids, on in zip(batch["input_ids"], real, strict=True)], self.own.known_ids)
        batch["input_ids"] = batch["input_ids"].masked_fill(~real, self.own.pad_token_id)
        unused = sorted(
            n for n in batch.keys() - _USED - rows[0].keys() - set(self.takes) if not n.startswith("token_")
        )
        if unused:
            self._say(f"gives {unused}, which the student's forward does not take: nobody looks at them")
        if TEACHER_INDEX in rows[0] and TEACHER_INDEX not in batch:
            batch[TEACHER_INDEX] = self._teachers(batch, matches, rows)
        prompts = self._prompts(batch, spans, matches, rows) if self.own.with_prompts else {}
        return batch | prompts | self._views(batch, matches, rows)

    @property
    def name(self) -> str:
        return getattr(self.collate, "__name__", type(self.collate).__name__)

    # ---- What the collator gave -------------------------------------------------------------------------------------

    def _collated(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        given = [{name: value for name, value in row.items() if name not in _VIEWS} for row in rows]
        if self._writes_labels or type(self.collate).__name__ == "DataCollatorWithPadding":
            given = [{"input_ids": row["input_ids"]} for row in given]  # they cannot pad more than these
        try:
            batch = self.collate(given)
        except Exception as error:
            raise DatasetError(
                f"The data collator {self.name} failed on rows with the columns {sorted(rows[0])}: "
                f"{type(error).__name__}: {error}. Rows are of different lengths: it has to pad both `input_ids` and "
                f"`labels`, or to take the ids alone (labels are then those of the rows). {_REMEDY}."
            ) from error
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise self._wrong(f"gave {got}", "a dictionary with `input_ids`")
        return batch

    @property
    def _writes_labels(self) -> bool:
        """transformers' collator for language models takes every id but the padding for a label, the prompt's too."""
        if getattr(self.collate, "mlm", False):
            raise self._wrong("masks tokens (`mlm=True`)", "next-token prediction, `mlm=False`")
        return hasattr(self.collate, "mlm")

    def _tensors(self, given: Mapping[str, Any]) -> dict[str, Any]:
        batch = {}
        for name, value in given.items():
            if value is None or name in _REDUNDANT:
                continue
            if name in ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids"):
                try:
                    value = torch.as_tensor(value)
                except (ValueError, TypeError) as error:
                    raise self._wrong(
                        f"gave {name} that make no tensor ({error})", "rows padded to one length"
                    ) from error
                value = value.long()
            elif not isinstance(value, Tensor):
                with contextlib.suppress(
                    ValueError, TypeError, RuntimeError
                ):  # texts, or what the user's trainer knows
                    value = torch.as_tensor(value)
            batch[name] = value
        if batch["input_ids"].ndim != 2:
            raise self._wrong(f"gave input_ids of the shape {list(batch['input_ids'].shape)}", "[rows, tokens]")
        shape = batch["input_ids"].shape
        if "position_ids" in batch and batch["position_ids"].shape == (1, shape[1]):
            batch["position_ids"] = batch["position_ids"].expand(shape).clone()
        for name in {"labels", "attention_mask", "position_ids", "token_type_ids"} & batch.keys():
            if batch[name].shape != shape:
                raise self._wrong(
                    f"gave {name} of the shape {list(batch[name].shape)}", f"that of input_ids, {list(shape)}"
                )
        if "position_ids" not in batch and "attention_mask" not in batch:
            batch |= self._told_otherwise(given, shape)
        return batch

    def _told_otherwise(self, given: Mapping[str, Any], shape: torch.Size) -> dict[str, Tensor]:
        """Position ids from the other ways to say where packed rows begin."""
        if given.get("seq_idx") is not None:
            numbers = torch.as_tensor(given["seq_idx"]).long().reshape(shape)
            begins = torch.ones_like(numbers, dtype=torch.bool)
            begins[:, 1:] = numbers.diff(dim=1) != 0
        elif given.get("cu_seq_lens_q") is not None:
            begins = torch.zeros(shape, dtype=torch.bool)
            begins.view(-1)[torch.as_tensor(given["cu_seq_lens_q"]).long()[:-1]] = True
        else:
            return {}
        places = torch.arange(shape[1]).expand(shape)
        return {"position_ids": places - torch.where(begins, places, 0).cummax(1).values}

    def _masked(self, batch: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Know the padding and move it to the right; leave no mask where rows are packed."""
        positions = batch.get("position_ids")
        if "attention_mask" not in batch:
            tokens = sum(len(row["input_ids"]) for row in rows)
            if positions is not None and (batch["input_ids"].numel() == tokens or _begins_within(positions)):
                return batch
            batch = {**batch, "attention_mask": self._mask_from_rows(batch["input_ids"], rows)}
        batch = _padded_right(batch)
        if positions is None:
            return batch
        real = batch["attention_mask"].bool()
        places = torch.arange(real.shape[1])
        if not _begins_within(batch["position_ids"].where(real, places)):
            if (self.own.with_prompts or has_view(rows[0])) and bool((batch["position_ids"] == places)[real].all()):
                del batch["position_ids"]  # the usual ones, which completions that are sampled have as well
            return batch
        del batch["attention_mask"]
        after = (~real).cumsum(1) - 1
        return {**batch, "position_ids": batch["position_ids"].where(real, after)}

    def _mask_from_rows(self, ids: Tensor, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        mask = torch.zeros_like(ids)
        width = ids.shape[1]
        for row, tokens, real in zip(rows, ids.tolist(), mask, strict=False):
            own = list(row["input_ids"])[:width]
            if tokens[: len(own)] == own:
                real[: len(own)] = 1
            elif tokens[width - len(own) :] == own:
                real[width - len(own) :] = 1
            else:
                break
        else:
            if len(ids) == len(rows):
                return mask
        raise self._wrong(
            "gave no `attention_mask`, and other texts than the rows", "one: padding cannot be told from text by its id"
        )

    def _packed_spans(self, batch: Mapping[str, Any]) -> list[Span]:
        if self.own.with_prompts:
            raise self._wrong(
                "packs rows (`position_ids` that start anew)", "padded rows, since completions are sampled for prompts"
            )
        begins = restarts(batch["position_ids"])
        width, spans = begins.shape[1], []
        for b, row in enumerate(begins):
            starts = [*row.nonzero()[:, 0].tolist(), width]
            spans += [(b, start, stop) for start, stop in zip(starts, starts[1:], strict=False)]
        return spans

    # ---- What is trained --------------------------------------------------------------------------------------------

    def _matches(
        self, batch: Mapping[str, Any], spans: list[Span], rows: Sequence[Mapping[str, Any]]
    ) -> list[int] | None:
        """Where in its row each text begins; None if texts are not those of the rows, in order."""
        if len(spans) < len(rows) or (len(spans) > len(rows) and "attention_mask" in batch):
            return None
        matches = []
        for (b, start, stop), row in zip(spans, rows, strict=False):
            text, own = batch["input_ids"][b, start:stop].tolist(), list(row["input_ids"])
            cut = len(own) - len(text)
            offset = next((o for o in (0, cut) if cut >= 0 and own[o : o + len(text)] == text), None)
            if offset is None:
                return None
            matches.append(offset)
        return matches

    def _labels(
        self, batch: Mapping[str, Any], spans: list[Span], matches: list[int] | None, rows: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        ids, given = batch["input_ids"], None if self._writes_labels else batch.get("labels")
        if given is not None:
            self._check_unshifted(ids, given)
        if matches is None:
            if given is None:
                raise self._wrong(
                    "gave other texts than the rows, and no labels for them",
                    "`labels`: input_ids with -100 at every position that is not trained",
                )
            self._say("makes other texts than the rows: what its labels mark is trained, prompts too if they do")
            labels = given.clone()
        else:
            labels = torch.full_like(ids, IGNORED)
            for (b, start, stop), offset, row in zip(spans, matches, rows, strict=False):
                own = torch.as_tensor(row["labels"])[offset : offset + stop - start].long()
                labels[b, start:stop] = own
            if given is not None:
                more = (given != IGNORED) & (labels == IGNORED)
                more[:, 0] = False
                if more.any():
                    self._say("marks tokens as trained that the rows do not (prompts?): they stay untrained")
                labels = labels.masked_fill(given == IGNORED, IGNORED)
        for b, start, _ in spans:
            if start:  # nothing predicts the first token of a packed row
                labels[b, start] = IGNORED
        return labels

    def _check_unshifted(self, ids: Tensor, labels: Tensor) -> None:
        trained = labels != IGNORED
        wrong = trained & (labels != ids)
        if not wrong.any():
            return
        shifted = bool((labels[:, :-1] == ids[:, 1:])[trained[:, :-1]].all())
        raise self._wrong(
            "gave labels that are shifted by one already" if shifted else "gave labels that differ from input_ids",
            "them unshifted, as transformers has them: input_ids with -100 at every position that is not trained",
        )

    def _prompts(
        self, batch: Mapping[str, Any], spans: list[Span], matches: list[int] | None, rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """What rollouts start from: given by the collator, else the rows' prompts, else all before the first label."""
        if "prompt_ids" in batch and "prompt_mask" in batch:
            return {"prompt_ids": batch["prompt_ids"].masked_fill(batch["prompt_mask"] == 0, self.own.pad_token_id)}
        extras = sorted({"position_ids", "token_type_ids"} & batch.keys())
        if extras:
            raise self._wrong(f"gave {extras}", "batches without: nobody knows them of completions that are sampled")
        if matches is not None:
            prompts = [list(row["input_ids"])[: row["prompt_length"]] for row in rows]
        else:
            trained = batch["labels"] != IGNORED
            if not trained.any(1).all():
                raise self._wrong(
                    "gave other texts than the rows, of which some have no trained token: where their prompts end is "
                    "unknown",
                    "`prompt_ids` and `prompt_mask` `[B, P]`, padded on the left",
                )
            ends = trained.int().argmax(1).tolist()
            prompts = [batch["input_ids"][b, start : ends[b]].tolist() for b, start, _ in spans]
        multiple = self.own.pad_to_multiple_of
        mask = pad_rows([[1] * len(prompt) for prompt in prompts], 0, multiple, left=True)
        return {"prompt_ids": pad_rows(prompts, self.own.pad_token_id, multiple, left=True), "prompt_mask": mask}

    def _views(
        self, batch: Mapping[str, Any], matches: list[int] | None, rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """The teacher's prompts of the rows, where the batch holds the rows as they are."""
        if not has_view(rows[0]):
            return {}
        got = "packs rows" if "attention_mask" not in batch else "gave other texts than the rows"
        if "attention_mask" not in batch or matches is None or any(matches):
            got = "cuts the beginning of rows" if matches is not None and any(matches) else got
            raise self._wrong(
                f"{got}, so that nobody knows which prompt of the teacher's belongs to which text",
                "each row as it is, padded, since the teacher has prompts of its own (`teacher_prompt`, "
                "`teacher_system_prompt` or a column `privileged_context`)",
            )
        if self.own.with_prompts and "prompt_ids" in batch:
            raise self._wrong(
                "gave `prompt_ids` of its own, while the teacher's prompts belong to those of the rows", "none"
            )
        return view_entries(rows, self.own.pad_token_id, self.own.pad_to_multiple_of)

    def _teachers(
        self, batch: Mapping[str, Any], matches: list[int] | None, rows: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        """Whose row is whose, where the collator leaves it out."""
        if matches is None or len(batch["input_ids"]) != len(rows):
            raise self._wrong(
                "gave other texts than the rows, and not whose they are", f"`{TEACHER_INDEX}` `[B]` of several teachers"
            )
        return torch.tensor([row[TEACHER_INDEX] for row in rows])

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("The data collator %s %s.", self.name, what)

    def _wrong(self, got: str, expected: str) -> DatasetError:
        return DatasetError(f"The data collator {self.name} {got}; expected {expected}. {_REMEDY}.")


def with_ids(own: Any, pad_token_id: int, known_ids: int | None, other: Any = None) -> Any:
    """Tell a collator of this package, if it cares, what to pad with, which ids both models know, and `other`."""
    known = {"pad_token_id": pad_token_id, "known_ids": known_ids, "other": other}
    names = {f.name for f in fields(own)} if is_dataclass(own) else set()
    return replace(own, **{name: value for name, value in known.items() if name in names})


def fitted(given: Any, own: Any, *, method: str, packing: bool = False, takes: Collection[str] = ()) -> Any:
    """Return what makes batches: a user's collator, made to fit, or this package's own.

    Raises:
        ConfigurationError: the method's batches hold more than rows, or rows are packed, which only `own` knows of.
    """
    if given is None:
        return own
    if type(given) is DistillCollator and type(own) is DistillCollator:
        return with_ids(given, own.pad_token_id, own.known_ids, own.other)
    if type(own) is not DistillCollator and isinstance(given, type(own)):
        return given
    if type(own) is not DistillCollator or packing:
        why = "`packing: true` makes the batches itself" if packing else f"a row of {method} is more than one text"
        raise ConfigurationError(
            f"Got the data collator {getattr(given, '__name__', type(given).__name__)}; expected none, or a "
            f"{type(own).__name__}: {why}. Leave `data_collator` out; `pad_to_multiple_of` is a setting."
        )
    return ForeignCollator(given, own, takes)


def _begins_within(position_ids: Tensor) -> bool:
    return bool(restarts(position_ids)[:, 1:].any())


def _spans(mask: Tensor) -> list[Span]:
    return [(b, 0, stop) for b, stop in enumerate(mask.bool().sum(1).tolist())]


def _padded_right(batch: dict[str, Any]) -> dict[str, Any]:
    """Bring what is masked behind the text, in every entry `[B, T]`."""
    mask = batch["attention_mask"].bool()
    if not (mask.int().diff(dim=1) > 0).any():
        return batch
    order = (~mask).int().argsort(dim=1, stable=True)
    moved = {n: v.gather(1, order) for n, v in batch.items() if isinstance(v, Tensor) and v.shape == mask.shape}
    return {**batch, **moved}
