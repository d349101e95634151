"""A teacher with a tokenizer of its own: its ids of the student's completions, and where both begin a token.

A row of such a teacher is a view (see `views.py`) whose completion has other ids, too. A batch then has, beside the
entries of views (B rows, T positions of the student, C tokens of the teacher's longest completion):

    teacher_completion_ids, teacher_completion_mask  [B, C], padded on the right
    teacher_chunk   [B, C]  1 + the chunk of bytes that a token is part of, chunks joined by borders that a token may
                            cross being one; 0: of none
    token_chunk     [B, T]  the same of the student's tokens
    token_shared    [B, T]  1 + the place of the teacher's token that begins where this one does; 0: none does
    token_comparable [B, T] 1 on tokens of chunks whose likelihoods may be compared
    token_alone     [B, T]  1 on tokens that both tokenisations have between the same boundaries
    token_cut       [B, T]  1 on the last token of a completion that ends within a character, which has no teacher's ids

They follow from the ids of the student and the teacher's prompt alone. So text that has just been sampled gets them as
text of a dataset does, and what has become of a completion since is never forgotten: `replace_completions` drops them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_trainers.data.alignment import TokenBytes, align, retokenised
from distill_trainers.data.chat import Chat, turn_end_id
from distill_trainers.data.labels import IGNORED
from distill_trainers.data.views import ALIGNED_ENTRIES, unpadded_prompts_of
from distill_trainers.exceptions import DatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Side:
    """One of two tokenizers, and how texts end in it.

    Args:
        tokens: which bytes its ids stand for.
        end: id behind text that is no conversation; None: it has none.
        turn_end: id behind an assistant's turn; None: it knows no conversations.
        markers: ids by which a prompt is known to be a conversation.
        spaced_behind: text of a prompt behind which the chat template writes a space before an answer; empty: none.
    """

    tokens: TokenBytes
    end: int | None = None
    turn_end: int | None = None
    markers: frozenset[int] = field(default=frozenset(), repr=False)
    spaced_behind: bytes = b""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, name: str) -> Side:
        """Read a tokenizer; `name` says whose it is, for errors."""
        tokens = TokenBytes.of(tokenizer, name)
        named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        markers = frozenset(tokenizer.added_tokens_decoder.keys() - named)
        return cls(tokens, tokenizer.eos_token_id, turn_end_id(tokenizer), markers, _spaced_behind(tokenizer, tokens))

    def starts_with_space(self, prompt: Sequence[int]) -> bool:
        """Tell whether the chat template writes a space between this prompt and the answer."""
        return bool(self.spaced_behind) and self.tokens.text(prompt).endswith(self.spaced_behind)

    def goes_on(self, prompt: Sequence[int]) -> bool:
        """Tell whether an answer goes on the text of a prompt: a space with which its tokens begin is one of the text.

        Behind nothing, or behind a special token, it is the tokenizer's; where the chat template writes one, its.
        """
        return self.tokens.tokens(prompt[-1:]) not in ([], [None]) and not self.starts_with_space(prompt)

    def end_behind(self, prompt: Sequence[int]) -> int | None:
        """Return the id that ends a text behind a prompt in this tokenizer's ids."""
        is_chat = self.turn_end is not None and self.turn_end != self.end and not self.markers.isdisjoint(prompt)
        return self.turn_end if is_chat else self.end


@dataclass(frozen=True)
class OtherTokenizer:
    """Writes what a teacher reads in place of the student's completion, and the other way round."""

    student: Side
    teacher: Side

    @classmethod
    def of(cls, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> OtherTokenizer:
        """Read both tokenizers.

        Raises:
            ConfigurationError: one of them loses text, so that nobody knows which bytes its ids stand for.
        """
        return cls(Side.of(student, "the student"), Side.of(teacher, "the teacher"))

    def ended_by(self, student: Iterable[int] = (), teacher: Iterable[int] = ()) -> OtherTokenizer:
        """Return it for models that end their text at these ids, too (`models.eos_ids`)."""
        sides = (self.student, student), (self.teacher, teacher)
        return OtherTokenizer(*(replace(side, tokens=side.tokens.stopping_at(ids)) for side, ids in sides))

    def completion(self, ids: Sequence[int], prompt: Sequence[int], own_prompt: Sequence[int] = ()) -> list[int]:
        """Return the teacher's ids of a completion; of a last character that the student has cut there are none.

        Args:
            ids: the student's.
            prompt: what the teacher reads before it: whether it is a conversation tells how the completion ends.
            own_prompt: what the student reads before it.
        """
        return _rewritten(ids, self.student, self.teacher, own_prompt, prompt)

    def is_cut(self, ids: Sequence[int]) -> bool:
        """Tell whether the student's text ends within a character."""
        (last,) = self.student.tokens.tokens(ids[-1:]) or [None]
        if not last or last[-1] < 0x80:
            return False
        return retokenised(ids[-8:], self.student.tokens, self.teacher.tokens, end=None).cut_bytes > 0

    def answer(self, ids: Sequence[int], prompt: Sequence[int], teacher_prompt: Sequence[int] = ()) -> list[int]:
        """Return the student's ids of what the teacher has written, behind prompts in the ids of either."""
        return _rewritten(ids, self.teacher, self.student, teacher_prompt, prompt)

    def text_of(self, ids: Sequence[int], prompt: Sequence[int]) -> str:
        """Return the text of the student's ids behind a prompt, without special tokens."""
        return self.student.tokens.text(ids, goes_on=self.student.goes_on(prompt)).decode(errors="replace")

    def row_completion(self, row: Mapping[str, Any], prompt: Sequence[int]) -> list[int]:
        """Return the teacher's ids of what is trained of a tokenised row with a view; none without a completion.

        Raises:
            DatasetError: what is trained is not one stretch.
        """
        start, stop = trained_stretch(row["labels"], row["view_start"])
        ids = row["input_ids"]
        return self.completion(ids[start:stop], prompt, ids[:start]) if stop > start else []

    def added_to(
        self, batch: Mapping[str, Tensor], completions: Sequence[Sequence[int]] | None = None
    ) -> dict[str, Tensor]:
        """Return a batch of rows with views together with the entries above, unless it has them.

        Args:
            completions: the teacher's ids of each row's completion, where they are known already.

        Raises:
            DatasetError: what is trained of a row is not one stretch.
        """
        if set(ALIGNED_ENTRIES) <= batch.keys():
            return dict(batch)
        ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
        prompts, starts = unpadded_prompts_of(batch), batch["view_start"].tolist()
        rows = []
        for number, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            start, stop = trained_stretch(labels[number], start)
            own = ids[number][start:stop]
            theirs = self.completion(own, prompt, ids[number][:start]) if completions is None else completions[number]
            ends = self.student.end_behind(ids[number][:start]), self.teacher.end_behind(prompt)
            row = self._aligned(own, theirs, start, ends, has_prompt=bool(prompt))
            rows.append({**row, "token_cut": [0] * (stop - 1) + [int(self.is_cut(own))]})
        width, longest = batch["input_ids"].shape[1], max([1, *(len(row["ids"]) for row in rows)])
        entries = {
            "teacher_completion_ids": _stacked((row["ids"] for row in rows), longest),
            "teacher_completion_mask": _stacked(([1] * len(row["ids"]) for row in rows), longest),
            "teacher_chunk": _stacked((row["teacher_chunk"] for row in rows), longest),
        }
        for name in ("token_chunk", "token_shared", "token_comparable", "token_alone", "token_cut"):
            entries[name] = _stacked((row[name] for row in rows), width)
        device = batch["input_ids"].device
        return {**batch, **{name: entry.to(device) for name, entry in entries.items()}}

    def _aligned(
        self, own: list[int], theirs: Sequence[int], start: int, by_role: tuple[Any, Any], *, has_prompt: bool
    ) -> dict[str, list[int]]:
        """The entries of one row, those of the student's tokens from the row's beginning on.

        Args:
            by_role: ids that end a text here. A text may have ended by another one, which is not the same event.
        """
        found = align(own, theirs, self.student.tokens, self.teacher.tokens)
        begins, their_begins = found.student_starts, found.teacher_starts
        sizes, their_sizes = found.student_ends - begins, found.teacher_ends - their_begins
        # Nothing predicts the first token of a row: chunks of it have no likelihood.
        told = (begins >= int(start == 0)) & (their_begins >= int(not has_prompt)) & (sizes > 0) & (their_sizes > 0)
        whole, joined = _all_of(told, found.joined), found.joined
        numbers = np.where(told, (told & ~(joined & whole)).cumsum(), 0)
        chunks, their_chunks = np.repeat(numbers, sizes), np.repeat(numbers, their_sizes)
        comparable = np.repeat(whole & found.comparable, sizes).astype(int)
        shared, alone = np.zeros((2, len(own)), int)
        shared[begins[told]] = np.where(found.same_start, 1 + their_begins, 0)[told]
        alone[begins[told]] = ((sizes == 1) & (their_sizes == 1))[told]
        before = [0] * start
        if own and theirs and self.student.tokens.is_end(own[-1]) and (own[-1], theirs[-1]) != by_role:
            comparable[-1] = 0
        names = {"token_chunk": chunks, "token_shared": shared, "token_comparable": comparable, "token_alone": alone}
        entries = {"ids": list(theirs), "teacher_chunk": their_chunks.tolist()}
        return entries | {name: before + values.tolist() for name, values in names.items()}


def _all_of(told: NDArray[np.bool_], joined: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether all that a chunk is joined to is told."""
    if not len(told):
        return told
    return np.logical_and.reduceat(told, np.flatnonzero(~joined))[(~joined).cumsum() - 1]


def _rewritten(
    ids: Sequence[int], writer: Side, reader: Side, written_behind: Sequence[int], read_behind: Sequence[int]
) -> list[int]:
    """The reader's ids of what the writer has written, each behind a prompt in its own."""
    end, space = reader.end_behind(read_behind), reader.starts_with_space(read_behind)
    goes_on = writer.goes_on(written_behind)
    return retokenised(ids, writer.tokens, reader.tokens, end=end, starts_text=space, goes_on=goes_on).ids


def _spaced_behind(tokenizer: PreTrainedTokenizerBase, tokens: TokenBytes) -> bytes:
    """The text of a prompt behind its question where the template writes a space before the answer, as Llama 2's."""
    if not (tokens.adds_space and getattr(tokenizer, "chat_template", None)):
        return b""
    chat, question = Chat(tokenizer), [{"role": "user", "content": "a"}]
    try:
        prompt = chat.prompt(question)
        text = chat.conversation([*question, {"role": "assistant", "content": "b"}])
    except DatasetError:  # a template that wants more than messages
        return b""
    behind = tokens.text(chat.ids(prompt)).rpartition(b"a")[2]
    return behind if text.startswith(f"{prompt} ") else b""


def trained_stretch(labels: Sequence[int], start: int) -> tuple[int, int]:
    """Return where the completion behind a view's prompt begins and ends: with the last trained token.

    Raises:
        DatasetError: there are tokens in it that are not trained.
    """
    stop = max((i + 1 for i in range(start, len(labels)) if labels[i] != IGNORED), default=start)
    gap = next((i for i in range(max(start, 1), stop) if labels[i] == IGNORED), None)
    if gap is not None:
        raise DatasetError(
            f"Token {gap} of a row is not trained, but tokens before and behind it are; expected one completion: a "
            "teacher with a tokenizer of its own would render what stands between them otherwise. Set "
            "`assistant_only_loss: false`, and give a conversation as one row for each answer."
        )
    return start, stop


def _stacked(rows: Iterable[Sequence[int]], width: int) -> Tensor:
    padded = [[*row, *[0] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(padded), width)


# ---- What a teacher is asked about a batch ---------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherTokens:
    """The M tokens of a batch that its teacher predicts, in its own ids.

    Attributes:
        ids: `[M]`.
        rows: `[M]`, of the batch.
        chunks: `[M]`, 0 for none.
        places: `[B, C]`, of each token of a completion among the M; that of a token that nothing predicts is not
            among them.
    """

    ids: Tensor
    rows: Tensor
    chunks: Tensor
    places: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> TeacherTokens:
        """Read a batch with the entries of `OtherTokenizer.added_to`."""
        mask = batch["teacher_completion_mask"].bool()
        predicted = mask.clone()
        predicted[:, :1] &= batch["teacher_prompt_mask"].any(1, keepdim=True)
        places = predicted.flatten().cumsum(0).reshape(mask.shape) - 1
        rows = predicted.nonzero()[:, 0]
        return cls(batch["teacher_completion_ids"][predicted], rows, batch["teacher_chunk"][predicted], places)
