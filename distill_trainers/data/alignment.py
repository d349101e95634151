"""Two tokenisations of one text: the boundaries that both share, and the chunks between them.

Both are compared as bytes, which is what every tokenizer spells in the end. Tokens that spell no text become one byte
that UTF-8 never uses: the end of a text the same one for both tokenizers, so that end meets end, and any other special
token one of each side's own, so that it meets nothing. With that, boundaries are positions in two byte strings.

A border is safe for a tokenizer where no token of it may cross: one of its pre-tokens ends there, or no token holds the
two bytes beside it. Only what lies between borders that are safe for both is comparable (arXiv 2410.09303): a chunk, or
several that are joined by borders which are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray

from .token_bytes import END, END_BYTE, SPECIAL, TokenBytes, characters_of, shared_ids

__all__ = ["END", "SPECIAL", "Alignment", "Retokenised", "TokenBytes", "align", "retokenised", "shared_ids"]

_STUDENT_SPECIAL, _TEACHER_SPECIAL = b"\xfe", b"\xff"  # as END_BYTE; these two meet nothing
_BLOCK, _LONGEST = 4, 4096  # bytes that agree by no accident; bytes among which differences are looked for
_MOST_PAIRS = 10**6  # of equal stretches, about half a second


@dataclass(frozen=True)
class Alignment:
    """Chunks `[K]` of one completion, in order; together they hold all tokens of both sides.

    Attributes:
        student_ends, teacher_ends: int64, index behind the last token of each chunk, within the completion. Chunk k
            begins where chunk k - 1 ends; a chunk may be empty on one side where the two spell different texts.
        num_bytes: int64, bytes of text of each chunk as the student spells it; 0 for an end-of-text token.
        joined: bool, whether a chunk goes on what the chunk before is part of, because a token may cross the border
            between them.
        comparable: bool, whether both spell the same bytes between borders that no token of either may cross, in the
            chunk together with all that it is joined to. The end of the text is a chunk of its own. False where a
            special token is part of a chunk.
        same_start: bool, whether the next byte at the chunk's start is the same event for both: not where one side
            alone writes a space before the text.
        bytes: of text, as the student spells it.
        differing_bytes: of these, how many the teacher does not spell.
    """

    student_ends: NDArray[np.int64]
    teacher_ends: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    joined: NDArray[np.bool_]
    comparable: NDArray[np.bool_]
    same_start: NDArray[np.bool_]
    bytes: int
    differing_bytes: int

    def __len__(self) -> int:
        return len(self.student_ends)

    @property
    def student_starts(self) -> NDArray[np.int64]:
        """Index of the first token of each chunk; of one without tokens, that of the next token."""
        return np.concatenate([[0], self.student_ends[:-1]]).astype(np.int64)[: len(self)]

    @property
    def teacher_starts(self) -> NDArray[np.int64]:
        """The same for the teacher's tokens."""
        return np.concatenate([[0], self.teacher_ends[:-1]]).astype(np.int64)[: len(self)]

    @property
    def shared_boundaries(self) -> int:
        """Number of boundaries within the completion that both tokenisations have."""
        return max(0, len(self) - 1)


class _Side:
    """One tokenisation as bytes: `text`, and where in it each token ends."""

    def __init__(self, ids: Sequence[int], tokenizer: TokenBytes, special: bytes):
        self.tokenizer = tokenizer
        parts = [
            (END_BYTE if tokenizer.is_end(i) else special) if token is None else token
            for i, token in zip(ids, tokenizer.tokens(ids), strict=True)
        ]
        self.text = b"".join(parts)
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def begins_with_added_space(self, other: _Side) -> bool:
        """Whether the first space is only this tokenizer's way to begin a text, which the other does not spell."""
        if not self.tokenizer.adds_space or self.text[:1] != b" ":
            return False
        without, text = self.text[1:], other.text
        before = (_common_prefix(self.text, text), self.text == text)
        return (_common_prefix(without, text), without == text) > before

    def without_first_space(self) -> None:
        self.text, self.ends = self.text[1:], self.ends - 1


def align(
    student_ids: Sequence[int], teacher_ids: Sequence[int], student: TokenBytes, teacher: TokenBytes
) -> Alignment:
    """Cut a completion into the chunks between boundaries that both tokenisations share.

    Where the two spell different bytes (a normaliser, a text that was cut, an unknown token), what agrees around the
    difference is aligned all the same, and the difference lies in a chunk that is not comparable.

    Args:
        student_ids, teacher_ids: of the completion of one turn, each in its own tokenizer, ends of text included.
    """
    one = _Side(student_ids, student, _STUDENT_SPECIAL)
    other = _Side(teacher_ids, teacher, _TEACHER_SPECIAL)
    spaces = (one.begins_with_added_space(other), other.begins_with_added_space(one))
    for side, has_space in zip((one, other), spaces, strict=True):
        if has_space:
            side.without_first_space()
    blocks = _equal_blocks(one.text, other.text)
    positions = _shared_positions(one, other, blocks)
    joined, comparable = _events(one, other, positions)
    same_start = np.ones(len(positions) - 1, bool)
    same_start[:1] = not any(spaces)
    is_end = np.frombuffer(one.text, np.uint8) == END_BYTE[0]
    is_text = np.concatenate([[0], np.cumsum(~is_end & (np.frombuffer(one.text, np.uint8) != _STUDENT_SPECIAL[0]))])
    starts, ends = positions[:-1], positions[1:]
    counted = [np.searchsorted(side.ends, ends[:, i], side="right") for i, side in enumerate((one, other))]
    if len(ends):  # tokens that spell nothing belong somewhere, too
        counted[0][-1], counted[1][-1] = len(one.ends), len(other.ends)
    return Alignment(
        counted[0].astype(np.int64),
        counted[1].astype(np.int64),
        (is_text[ends[:, 0]] - is_text[starts[:, 0]]).astype(np.int64),
        joined,
        comparable,
        same_start,
        int(is_text[-1]),
        len(one.text) - sum(size for _, _, size in blocks),
    )


def _equal_blocks(one: bytes, other: bytes) -> list[tuple[int, int, int]]:
    """Stretches (start in one, start in other, size) in which two texts agree, in order."""
    if one == other:
        return [(0, 0, len(one))]
    most = min(len(one), len(other))
    front = _common_prefix(one, other)
    back = min(_common_prefix(one[::-1], other[::-1]), most - front)
    inner = one[front : len(one) - back], other[front : len(other) - back]
    blocks = [(0, 0, front)] if front else []
    if max(map(len, inner)) <= _LONGEST:
        blocks += [(front + i, front + j, size) for i, j, size in _blocks_between(*inner)]
    return [*blocks, (len(one) - back, len(other) - back, back)]


def _blocks_between(one: bytes, other: bytes) -> list[tuple[int, int, int]]:
    """The same of two texts with different bytes in many places, by stretches of `_BLOCK` bytes."""
    stretches = [[text[i : i + _BLOCK] for i in range(len(text) - _BLOCK + 1)] for text in (one, other)]
    counts = [Counter(side) for side in stretches]
    pairs = sum(count * counts[1][stretch] for stretch, count in counts[0].items())
    # All pairs of equal stretches are looked at: where text goes round in circles, only those that are rare in it.
    ours, theirs = stretches
    matches = SequenceMatcher(None, ours, theirs, autojunk=pairs > _MOST_PAIRS).get_matching_blocks()
    blocks, ends = [], (0, 0)
    for m in matches:
        seen = max(0, ends[0] - m.a, ends[1] - m.b)  # stretches overlap
        size = m.size + _BLOCK - 1 - seen
        if m.size and size >= _BLOCK:
            blocks.append((m.a + seen, m.b + seen, size))
            ends = m.a + seen + size, m.b + seen + size
    return blocks


def _common_prefix(one: bytes, other: bytes) -> int:
    size = min(len(one), len(other))
    differs = np.frombuffer(one[:size], np.uint8) != np.frombuffer(other[:size], np.uint8)
    return int(differs.argmax()) if differs.any() else size


def _shared_positions(one: _Side, other: _Side, blocks: list[tuple[int, int, int]]) -> NDArray[np.int64]:
    """Pairs `[K + 1, 2]` of positions in both texts: the start, all boundaries that both have, and the end."""
    pairs = [np.zeros((1, 2), np.int64)]
    for start, others_start, size in blocks:
        ours, theirs = one.ends - start, other.ends - others_start
        if start == others_start == 0:
            ours, theirs = ours[ours > 0], theirs[theirs > 0]
        else:  # a boundary right before the stretch is shared as well, even one at the start of a text
            ours, theirs = np.append(ours, -start), np.append(theirs, -others_start)
        shared = np.intersect1d(ours[(ours >= 0) & (ours <= size)], theirs[(theirs >= 0) & (theirs <= size)])
        pairs.append(np.stack([shared + start, shared + others_start], axis=1))
    pairs.append(np.array([[len(one.text), len(other.text)]]))
    joined = np.concatenate(pairs)
    return joined[np.append(True, (np.diff(joined, axis=0) != 0).any(1))]


def _events(one: _Side, other: _Side, positions: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """`joined` and `comparable` of the chunks between positions."""
    safe = one.tokenizer.safe_borders(one.text)[positions[:, 0]]
    safe &= other.tokenizer.safe_borders(other.text)[positions[:, 1]]
    same = np.ones(len(positions) - 1, bool)
    if one.text != other.text:
        for k, ((a, b), (c, d)) in enumerate(zip(positions[:-1].tolist(), positions[1:].tolist(), strict=True)):
            same[k] = one.text[a:c] == other.text[b:d]
    elif _STUDENT_SPECIAL in one.text or _TEACHER_SPECIAL in other.text:  # bytes of no text, written by both
        same &= False
    joined = np.zeros_like(same)
    joined[1:] = ~safe[1:-1] & same[1:] & same[:-1]
    first = np.flatnonzero(~joined)
    fits = same[first] & safe[first] & safe[np.append(first[1:], len(same))[: len(first)]]
    return joined, fits[(~joined).cumsum() - 1]


@dataclass(frozen=True)
class Retokenised:
    """A completion of the student in the teacher's tokens.

    Attributes:
        ids: the teacher's.
        cut_bytes: bytes at its end that are no whole character, which the teacher does not read.
        replaced_bytes: bytes within it that are no UTF-8, each of which the teacher reads as U+FFFD.
    """

    ids: list[int]
    cut_bytes: int
    replaced_bytes: int


def retokenised(
    student_ids: Sequence[int],
    student: TokenBytes,
    teacher: TokenBytes,
    *,
    end: int | None = None,
    starts_text: bool = False,
    goes_on: bool = False,
) -> Retokenised:
    """Write the student's completion in the teacher's tokens.

    Special tokens of the student within it are no text, and names of special tokens in its text are nothing else.

    Args:
        student_ids: of the completion of one turn.
        end: the teacher's id for an end of text at the end of the completion; None adds none.
        starts_text: whether a teacher that puts a space before a text does so here; False where the completion goes on
            a text that the teacher has begun to read.
        goes_on: whether the student's ids go on a text: see `TokenBytes.text`.
    """
    has_end = bool(len(student_ids)) and student.is_end(student_ids[-1])
    text = student.text(student_ids, goes_on=goes_on)
    whole = text if has_end else _whole_characters(text)
    characters, sizes = characters_of(whole)
    ids = _encoded(characters, teacher, starts_text)
    replaced = characters.count("\ufffd") - whole.count("\ufffd".encode())
    return Retokenised([*ids, *([end] if has_end and end is not None else [])], len(text) - len(whole), replaced)


def _encoded(text: str, tokenizer: TokenBytes, starts_text: bool) -> list[int]:
    ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
    if starts_text or not tokenizer.adds_space or not ids or (tokenizer.tokens(ids[:1])[0] or b"")[:1] != b" ":
        return ids
    # The space is put before a line break instead, whose tokens are then left out, unless one goes on into the text.
    behind = tokenizer.backend.encode("\n" + text, add_special_tokens=False).ids
    front = b""
    for place, token in enumerate(tokenizer.tokens(behind)):
        front += token or b""
        if front.lstrip(b" ") == b"\n":
            return behind[place + 1 :]
    return ids


def _whole_characters(text: bytes) -> bytes:
    """A text without the beginning of a character at its end."""
    for back in range(1, min(4, len(text)) + 1):
        byte = text[-back]
        if byte & 0xC0 != 0x80:  # the first byte of a character
            size = 2 if byte >> 5 == 0b110 else 3 if byte >> 4 == 0b1110 else 4 if byte >> 3 == 0b11110 else 1
            return text[:-back] if size > back else text
    return text
